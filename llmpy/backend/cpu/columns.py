"""Some columns of a matrix, scaled: how LoRA's products join those of the layer.     BT rows, N columns of M

    add     out[:, first : first + N] += scale · x       out (BT, M), x (BT, N)
    take    out := scale · x[:, first : first + N]       out (BT, N), x (BT, M)

Memory-bound: each row is read once. Arithmetic is float32, rounded once.
"""

from __future__ import annotations

from .jit import fork, inline, kernel
from .simd import f32, to

BLOCK = 16  # rows per item


@inline
def _add_rows(worker, item, out, x, first, scale):
    for i in range(item * BLOCK, min((item + 1) * BLOCK, x.shape[0])):
        line, addend = out[i, first : first + x.shape[1]], x[i]
        for j in range(addend.shape[0]):
            line[j] = to(line, f32(line[j]) + scale[0] * f32(addend[j]))


@kernel
def add_columns(
    threads,  # int
    out,      # (BT, M): columns from `first` +=
    x,        # (BT, N)
    first,    # int
    scale,    # (1,) f32
):  # fmt: skip
    fork(_add_rows, threads, (x.shape[0] + BLOCK - 1) // BLOCK, (out, x, first, scale))


@inline
def _take_rows(worker, item, out, x, first, scale):
    for i in range(item * BLOCK, min((item + 1) * BLOCK, out.shape[0])):
        line, given = out[i], x[i, first : first + out.shape[1]]
        for j in range(line.shape[0]):
            line[j] = to(line, scale[0] * f32(given[j]))


@kernel
def take_columns(
    threads,  # int
    out,      # (BT, N) :=
    x,        # (BT, M)
    first,    # int
    scale,    # (1,) f32
):  # fmt: skip
    fork(_take_rows, threads, (out.shape[0] + BLOCK - 1) // BLOCK, (out, x, first, scale))
