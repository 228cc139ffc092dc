"""RMSNorm, row by row, and of the heads of queries and keys.     BT = batch·time rows, C = channels

forward    rstd := 1/√(Σinp²/C + eps)
           n     = inp·rstd        not stored
           out  := n·weight
           residual form: inp is resid := inp1 + inp2, in the same pass
backward   dn       = dout·weight
           dinp    += rstd·(dn − n·Σ(dn·n)/C)    added to the gradient of the residual stream
           dweight += Σ_rows dout·n, unless the weight is frozen
heads      a row is NH + NKV heads of HS channels, queries and keys, each a row of the above, then NKV heads of values,
           which are copied; all queries share one weight, all keys another; dinp := …

Memory-bound; a row stays in L1 between passes. Sums over rows are taken in blocks of BLOCK rows, as in `layernorm`.
"""

from __future__ import annotations

import numpy as np

from .jit import fork, inline, kernel
from .simd import address, f32, to

BLOCK = 32  # rows per item
COLUMNS = 64  # columns per item when partial sums are added


@inline
def _normalise(out, inp, weight, eps):
    """out (C,) := RMSNorm of inp (C,); return rstd."""
    C = inp.shape[0]
    squares = np.float32(0)
    for c in range(C):
        squares += f32(inp[c]) * f32(inp[c])
    r = np.float32(1) / np.sqrt(squares / np.float32(C) + eps[0])
    for c in range(C):
        out[c] = to(out, f32(inp[c]) * r * weight[c])
    return r


@inline
def _forward_item(worker, item, out, rstd, inp, weight, eps):
    for row in range(item * BLOCK, min((item + 1) * BLOCK, inp.shape[0])):
        rstd[row] = _normalise(out[row], inp[row], weight, eps)


@inline
def _residual_item(worker, item, resid, out, rstd, inp1, inp2, weight, eps):
    for row in range(item * BLOCK, min((item + 1) * BLOCK, inp1.shape[0])):
        for c in range(inp1.shape[1]):
            resid[row, c] = inp1[row, c] + f32(inp2[row, c])
        rstd[row] = _normalise(out[row], resid[row], weight, eps)


@inline
def _heads_item(worker, item, out, rstd, inp, q_weight, k_weight, eps):
    HS, normalised, NKV = q_weight.shape[0], rstd.shape[1], inp.shape[1] // q_weight.shape[0] - rstd.shape[1]
    for row in range(item * BLOCK, min((item + 1) * BLOCK, inp.shape[0])):
        for head in range(normalised):
            part = slice(head * HS, (head + 1) * HS)
            weight = q_weight if head < normalised - NKV else k_weight
            rstd[row, head] = _normalise(out[row, part], inp[row, part], weight, eps)
        values, copied = inp[row, normalised * HS :], out[row, normalised * HS :]
        for c in range(values.shape[0]):
            copied[c] = values[c]


@kernel
def rmsnorm_forward(
    threads,  # int
    out,      # (BT, C) :=
    rstd,     # (BT,) f32 :=
    inp,      # (BT, C) f32, the residual stream
    weight,   # (C,)
    eps,      # (1,) f32: an array, for `graph`
):  # fmt: skip
    items = (inp.shape[0] + BLOCK - 1) // BLOCK
    fork(_forward_item, threads, items, (out, rstd, inp, weight, eps))


@kernel
def residual_rmsnorm_forward(
    threads,  # int
    resid,    # (BT, C) f32 := inp1 + inp2
    out,      # (BT, C) :=
    rstd,     # (BT,) f32 :=
    inp1,     # (BT, C) f32, the residual stream
    inp2,     # (BT, C), the branch
    weight,   # (C,)
    eps,      # (1,) f32
):  # fmt: skip
    items = (inp1.shape[0] + BLOCK - 1) // BLOCK
    fork(_residual_item, threads, items, (resid, out, rstd, inp1, inp2, weight, eps))


@kernel
def head_rmsnorm_forward(
    threads,   # int
    out,       # (BT, (NH + 2·NKV)·HS) :=
    rstd,      # (BT, NH + NKV) f32 :=
    inp,       # (BT, (NH + 2·NKV)·HS)
    q_weight,  # (HS,)
    k_weight,  # (HS,)
    eps,       # (1,) f32
):  # fmt: skip
    items = (inp.shape[0] + BLOCK - 1) // BLOCK
    fork(_heads_item, threads, items, (out, rstd, inp, q_weight, k_weight, eps))


@inline
def _mean_dn_n(dout, inp, weight, r):
    """Return Σ(dn·n)/C of a row."""
    C = inp.shape[0]
    total = np.float32(0)
    for c in range(C):
        total += f32(dout[c]) * weight[c] * (f32(inp[c]) * r)
    return total / np.float32(C)


@inline
def _backward_item(worker, item, dinp, partial, dout, inp, rstd, weight):
    C = inp.shape[1]
    summed = partial.shape[0] > 0
    if summed:
        for c in range(C):
            partial[item, c] = 0
    for row in range(item * BLOCK, min((item + 1) * BLOCK, inp.shape[0])):
        r = rstd[row]
        b = _mean_dn_n(dout[row], inp[row], weight, r)
        if summed:
            for c in range(C):
                n, d = inp[row, c] * r, f32(dout[row, c])
                dinp[row, c] += r * (d * weight[c] - n * b)
                partial[item, c] += d * n
        else:
            for c in range(C):
                dinp[row, c] += r * (f32(dout[row, c]) * weight[c] - inp[row, c] * r * b)


@inline
def _heads_backward_item(worker, item, dinp, partial, dout, inp, rstd, q_weight, k_weight, gradients):
    HS, normalised, NKV = q_weight.shape[0], rstd.shape[1], inp.shape[1] // q_weight.shape[0] - rstd.shape[1]
    summed = partial.shape[1] > 0
    if summed:
        for c in range(HS):
            partial[0, item, c] = 0
            partial[1, item, c] = 0
    dn = gradients[worker]  # a copy: dinp may be dout, and loops over arrays that overlap are not vectorised
    for row in range(item * BLOCK, min((item + 1) * BLOCK, inp.shape[0])):
        for head in range(normalised):
            part = slice(head * HS, (head + 1) * HS)
            key = head >= normalised - NKV
            weight, r = k_weight if key else q_weight, rstd[row, head]
            d, x, dx = dout[row, part], inp[row, part], dinp[row, part]
            b = _mean_dn_n(d, x, weight, r)
            for c in range(HS):
                dn[c] = f32(d[c]) * weight[c]
            if summed:
                sums = partial[1 if key else 0, item]
                for c in range(HS):
                    sums[c] += f32(d[c]) * (f32(x[c]) * r)
            for c in range(HS):
                dx[c] = to(dx, r * (dn[c] - f32(x[c]) * r * b))
        if address(dinp) != address(dout):
            values, copied = dout[row, normalised * HS :], dinp[row, normalised * HS :]
            for c in range(values.shape[0]):
                copied[c] = values[c]


@inline
def _sum_item(worker, item, dweight, partial, accumulate):
    part = slice(item * COLUMNS, min((item + 1) * COLUMNS, dweight.shape[0]))
    dweight, partial = dweight[part], partial[:, part]
    for c in range(dweight.shape[0]):
        dweight[c] = dweight[c] + partial[0, c] if accumulate else partial[0, c]
    for block in range(1, partial.shape[0]):
        for c in range(dweight.shape[0]):
            dweight[c] += partial[block, c]


@kernel
def rmsnorm_backward(
    threads,     # int
    dinp,        # (BT, C) f32 +=
    dweight,     # (C,) f32 := or += by accumulate; (0,): the weight is frozen
    dout,        # (BT, C)
    inp,         # (BT, C) f32, the residual stream
    rstd,        # (BT,)
    weight,      # (C,)
    accumulate,  # bool
    scratch,     # (≥ ceil(BT/BLOCK)·C,) unless frozen
):  # fmt: skip
    BT, C = inp.shape
    blocks = (BT + BLOCK - 1) // BLOCK
    kept = blocks if dweight.shape[0] > 0 else 0
    partial = scratch[: kept * C].reshape((kept, C))
    fork(_backward_item, threads, blocks, (dinp, partial, dout, inp, rstd, weight))
    fork(_sum_item, threads, (dweight.shape[0] + COLUMNS - 1) // COLUMNS, (dweight, partial, accumulate))


@kernel
def head_rmsnorm_backward(
    threads,     # int
    dinp,        # (BT, (NH + 2·NKV)·HS) :=, may be dout
    dq_weight,   # (HS,) f32 := or += by accumulate; (0,): both weights are frozen
    dk_weight,   # (HS,) f32 := or += by accumulate
    dout,        # (BT, (NH + 2·NKV)·HS)
    inp,         # (BT, (NH + 2·NKV)·HS)
    rstd,        # (BT, NH + NKV)
    q_weight,    # (HS,)
    k_weight,    # (HS,)
    accumulate,  # bool
    scratch,     # (≥ (threads + 2·ceil(BT/BLOCK))·HS,)
):  # fmt: skip
    HS = q_weight.shape[0]
    blocks = (inp.shape[0] + BLOCK - 1) // BLOCK
    kept = blocks if dq_weight.shape[0] > 0 else 0
    gradients = scratch[: threads * HS].reshape((threads, HS))
    partial = scratch[threads * HS : (threads + 2 * kept) * HS].reshape((2, kept, HS))
    fork(_heads_backward_item, threads, blocks, (dinp, partial, dout, inp, rstd, q_weight, k_weight, gradients))
    items = (dq_weight.shape[0] + COLUMNS - 1) // COLUMNS
    fork(_sum_item, threads, items, (dq_weight, partial[0], accumulate))
    fork(_sum_item, threads, items, (dk_weight, partial[1], accumulate))
