"""Token and position embedding.     out[b, t] := wte[tokens[b, t]] + wpe[positions[b, t]], by default wpe[t]

backward   dwte[token] += Σ dout rows with that token        dwpe[position] += Σ dout rows at that position

A token may occur in many rows. Backward is therefore cut by columns, and each item takes all rows in order: no two
threads write to the same element, and sums have a fixed order. wpe and dwpe are (0, 0) if there is no such table.
"""

from __future__ import annotations

from .jit import fork, inline, kernel
from .simd import f32

ROWS = 32  # per item, forward
COLUMNS = 64  # per item, backward: four cache lines


@inline
def _forward_item(worker, item, out, tokens, wte, wpe, positions):
    B, T = tokens.shape
    for row in range(item * ROWS, min((item + 1) * ROWS, B * T)):
        b, t = row // T, row % T
        token = tokens[b, t]
        if wpe.size == 0:
            for c in range(out.shape[1]):
                out[row, c] = f32(wte[token, c])
            continue
        at = positions[b, t] if positions.size > 0 else t
        for c in range(out.shape[1]):
            out[row, c] = f32(wte[token, c]) + f32(wpe[at, c])


@kernel
def embedding_forward(
    threads,    # int
    out,        # (BT, C) f32 :=
    tokens,     # (B, T) i32
    wte,        # (Vp, C)
    wpe,        # (≥T, C), or (0, 0) for none
    positions,  # (B, T) i32, or (0, 0) for t
):  # fmt: skip
    items = (out.shape[0] + ROWS - 1) // ROWS
    fork(_forward_item, threads, items, (out, tokens, wte, wpe, positions))


@inline
def _backward_item(worker, item, dwte, dwpe, dout, tokens, accumulate, positions):
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
            if dwpe.size == 0:
                for c in range(columns):
                    dwte[token, c] += dout[row, c]
                continue
            at = positions[b, t] if positions.size > 0 else t
            for c in range(columns):
                dwte[token, c] += dout[row, c]
                dwpe[at, c] += dout[row, c]


@kernel
def embedding_backward(
    threads,     # int
    dwte,        # (Vp, C) f32 +=
    dwpe,        # (≥T, C) f32 := or += by accumulate, or (0, 0) for none
    dout,        # (BT, C)
    tokens,      # (B, T) i32
    accumulate,  # bool
    positions,   # (B, T) i32, or (0, 0) for t
):  # fmt: skip
    items = (dout.shape[1] + COLUMNS - 1) // COLUMNS
    fork(_backward_item, threads, items, (dwte, dwpe, dout, tokens, accumulate, positions))
