"""float32 → the dtype that products read, rounded to nearest even."""

from __future__ import annotations

from .jit import fork, inline, kernel
from .simd import to

BLOCK = 1 << 14  # elements per item


@inline
def _block(worker, item, out, x):
    part = slice(item * BLOCK, min((item + 1) * BLOCK, x.shape[0]))
    out, x = out[part], x[part]
    for i in range(x.shape[0]):
        out[i] = to(out, x[i])


@kernel
def narrow(
    threads,  # int
    out,      # (n,) :=
    x,        # (n,) f32
):  # fmt: skip
    fork(_block, threads, (x.shape[0] + BLOCK - 1) // BLOCK, (out, x))
