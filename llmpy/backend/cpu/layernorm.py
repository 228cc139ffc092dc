"""LayerNorm, row by row.     BT = batch·time rows, C = channels

forward    mean := Σ inp/C       rstd := 1/√(Σ(inp−mean)²/C + eps)
           n     = (inp−mean)·rstd        not stored: one fma to recompute
           out  := n·weight + bias
           residual form: inp is resid := inp1 + inp2, in the same pass
backward   dn       = dout·weight
           dinp    += rstd·(dn − Σdn/C − n·Σ(dn·n)/C)    added to the gradient of the residual stream
           dweight += Σ_rows dout·n       dbias += Σ_rows dout       unless both are frozen

Memory-bound; a row stays in L1 between passes. Sums over rows are taken in blocks of BLOCK rows, then the partial
sums are added in order: bitwise identical at any number of threads.
"""

from __future__ import annotations

import numpy as np

from .jit import fork, inline, kernel
from .simd import f32, to

EPS = np.float32(1e-5)
BLOCK = 32  # rows per item
COLUMNS = 64  # columns per item when partial sums are added


@inline
def _normalise(row, out, mean, rstd, inp, weight, bias):
    C = inp.shape[1]
    total = np.float32(0)
    for c in range(C):
        total += inp[row, c]
    mu = total / np.float32(C)
    squares = np.float32(0)
    for c in range(C):
        squares += (inp[row, c] - mu) * (inp[row, c] - mu)
    r = np.float32(1) / np.sqrt(squares / np.float32(C) + EPS)
    for c in range(C):
        out[row, c] = to(out, (inp[row, c] - mu) * r * weight[c] + bias[c])
    mean[row] = mu
    rstd[row] = r


@inline
def _forward_item(worker, item, out, mean, rstd, inp, weight, bias):
    for row in range(item * BLOCK, min((item + 1) * BLOCK, inp.shape[0])):
        _normalise(row, out, mean, rstd, inp, weight, bias)


@inline
def _residual_item(worker, item, resid, out, mean, rstd, inp1, inp2, weight, bias):
    for row in range(item * BLOCK, min((item + 1) * BLOCK, inp1.shape[0])):
        for c in range(inp1.shape[1]):
            resid[row, c] = inp1[row, c] + f32(inp2[row, c])
        _normalise(row, out, mean, rstd, resid, weight, bias)


@kernel
def layernorm_forward(
    threads,  # int
    out,      # (BT, C) :=
    mean,     # (BT,) f32 :=
    rstd,     # (BT,) f32 :=
    inp,      # (BT, C) f32, the residual stream
    weight,   # (C,)
    bias,     # (C,)
):  # fmt: skip
    items = (inp.shape[0] + BLOCK - 1) // BLOCK
    fork(_forward_item, threads, items, (out, mean, rstd, inp, weight, bias))


@kernel
def residual_layernorm_forward(
    threads,  # int
    resid,    # (BT, C) f32 := inp1 + inp2
    out,      # (BT, C) :=
    mean,     # (BT,) f32 :=
    rstd,     # (BT,) f32 :=
    inp1,     # (BT, C) f32, the residual stream
    inp2,     # (BT, C), the branch
    weight,   # (C,)
    bias,     # (C,)
):  # fmt: skip
    items = (inp1.shape[0] + BLOCK - 1) // BLOCK
    fork(_residual_item, threads, items, (resid, out, mean, rstd, inp1, inp2, weight, bias))


@inline
def _backward_item(worker, item, dinp, partial, dout, inp, mean, rstd, weight):
    C = inp.shape[1]
    summed = partial.shape[0] > 0
    if summed:
        for c in range(C):
            partial[item, 0, c] = 0
            partial[item, 1, c] = 0
    for row in range(item * BLOCK, min((item + 1) * BLOCK, inp.shape[0])):
        mu, r = mean[row], rstd[row]
        sum_dn, sum_dn_n = np.float32(0), np.float32(0)
        for c in range(C):
            dn = f32(dout[row, c]) * weight[c]
            sum_dn += dn
            sum_dn_n += dn * ((inp[row, c] - mu) * r)
        a, b = sum_dn / np.float32(C), sum_dn_n / np.float32(C)
        if summed:
            for c in range(C):
                n, d = (inp[row, c] - mu) * r, f32(dout[row, c])
                dinp[row, c] += r * (d * weight[c] - a - n * b)
                partial[item, 0, c] += d * n
                partial[item, 1, c] += d
        else:
            for c in range(C):
                dinp[row, c] += r * (f32(dout[row, c]) * weight[c] - a - (inp[row, c] - mu) * r * b)


@inline
def _sum_item(worker, item, dweight, dbias, partial, accumulate):
    part = slice(item * COLUMNS, min((item + 1) * COLUMNS, dweight.shape[0]))
    dweight, dbias, partial = dweight[part], dbias[part], partial[:, :, part]
    for c in range(dweight.shape[0]):
        dweight[c] = dweight[c] + partial[0, 0, c] if accumulate else partial[0, 0, c]
        dbias[c] = dbias[c] + partial[0, 1, c] if accumulate else partial[0, 1, c]
    for block in range(1, partial.shape[0]):
        for c in range(dweight.shape[0]):
            dweight[c] += partial[block, 0, c]
            dbias[c] += partial[block, 1, c]


@kernel
def layernorm_backward(
    threads,     # int
    dinp,        # (BT, C) f32 +=
    dweight,     # (C,) f32 := or += by accumulate; (0,): weight and bias are frozen
    dbias,       # (C,) f32 := or += by accumulate
    dout,        # (BT, C)
    inp,         # (BT, C) f32, the residual stream
    mean,        # (BT,)
    rstd,        # (BT,)
    weight,      # (C,)
    accumulate,  # bool
    scratch,     # (≥ ceil(BT/BLOCK)·2·C,) unless frozen
):  # fmt: skip
    BT, C = inp.shape
    blocks = (BT + BLOCK - 1) // BLOCK
    kept = blocks if dweight.shape[0] > 0 else 0
    partial = scratch[: kept * 2 * C].reshape((kept, 2, C))
    fork(_backward_item, threads, blocks, (dinp, partial, dout, inp, mean, rstd, weight))
    fork(_sum_item, threads, (dweight.shape[0] + COLUMNS - 1) // COLUMNS, (dweight, dbias, partial, accumulate))
