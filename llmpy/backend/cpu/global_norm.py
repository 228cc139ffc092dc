"""√Σ x² over a flat array: blocks in float32 lanes, their sums added in float64, in order."""

from __future__ import annotations

import numpy as np

from .jit import fork, inline, kernel

BLOCK = 1 << 14


@inline
def _block(worker, item, partial, x):
    total = np.float32(0)
    part = x[item * BLOCK : min((item + 1) * BLOCK, x.shape[0])]
    for i in range(part.shape[0]):
        total += part[i] * part[i]
    partial[item] = total


@kernel
def global_norm(
    threads,  # int
    x,        # (n,)
    scratch,  # (≥ ceil(n/BLOCK),)
):  # fmt: skip
    items = (x.shape[0] + BLOCK - 1) // BLOCK
    fork(_block, threads, items, (scratch, x))
    total = 0.0
    for i in range(items):
        total += np.float64(scratch[i])
    return np.sqrt(total)
