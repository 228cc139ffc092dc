"""Token and position embedding.     out[b, t] := wte[tokens[b, t]] + wpe[t]

backward   dwte[token] += Σ dout rows with that token        dwpe[t] += Σ_b dout[b, t]

A token may occur in many rows. Backward is therefore cut by columns, and each item takes all rows in order: no two
threads write to the same element, and sums have a fixed order.
"""

from __future__ import annotations

from .jit import fork, inline, kernel
from .simd import f32

ROWS = 32  # per item, forward
COLUMNS = 64  # per item, backward: four cache lines


@inline
def _forward_item(worker, item, out, tokens, wte, wpe):
    B, T = tokens.shape
    for row in range(item * ROWS, min((item + 1) * ROWS, B * T)):
        b, t = row // T, row % T
        token = tokens[b, t]
        for c in range(out.shape[1]):
            out[row, c] = f32(wte[token, c]) + f32(wpe[t, c])


@kernel
def embedding_forward(
    threads,  # int
    out,      # (BT, C) f32 :=
    tokens,   # (B, T) i32
    wte,      # (Vp, C)
    wpe,      # (≥T, C)
):  # fmt: skip
    fork(_forward_item, threads, (out.shape[0] + ROWS - 1) // ROWS, (out, tokens, wte, wpe))


@inline
def _backward_item(worker, item, dwte, dwpe, dout, tokens, accumulate):
    B, T = tokens.shape
    part = slice(item * COLUMNS, min((item + 1) * COLUMNS, dout.shape[1]))
    dwte, dwpe, dout = dwte[:, part], dwpe[:, part], dout[:, part]
    columns = dout.shape[1]
    if not accumulate:
        for t in range(dwpe.shape[0]):
            for c in range(columns):
                dwpe[t, c] = 0
    for b in range(B):
        for t in range(T):
            token, row = tokens[b, t], b * T + t
            for c in range(columns):
                dwte[token, c] += dout[row, c]
                dwpe[t, c] += dout[row, c]


@kernel
def embedding_backward(
    threads,     # int
    dwte,        # (Vp, C) f32 +=
    dwpe,        # (≥T, C) f32 := or += by accumulate
    dout,        # (BT, C)
    tokens,      # (B, T) i32
    accumulate,  # bool
):  # fmt: skip
    items = (dout.shape[1] + COLUMNS - 1) // COLUMNS
    fork(_backward_item, threads, items, (dwte, dwpe, dout, tokens, accumulate))
