"""A hash of an array's bits, to compare two computations of it.

    h = Σ_i mix(w_i + i·φ) mod 2⁶⁴         over words w of 8 bytes; the last is padded

mix is a bijection, so a change within one word always changes h; other changes are missed with probability 2⁻⁶⁴. The
sum is exact, so its order does not matter. Source: mix is splitmix64's (Steele, Lea and Flood 2014).
"""

from __future__ import annotations

import numpy as np

from .jit import fork, inline, kernel

BLOCK = 1 << 14  # words per item
PHI, FIRST, SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
S1, S2, S3, BYTE = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(8)


@inline
def _mix(z):
    z = (z ^ (z >> S1)) * FIRST
    z = (z ^ (z >> S2)) * SECOND
    return z ^ (z >> S3)


@inline
def _block(worker, item, partial, words):
    first = item * BLOCK
    part, total = words[first : min(first + BLOCK, words.shape[0])], np.uint64(0)
    for i in range(part.shape[0]):
        total += _mix(part[i] + np.uint64(first + i) * PHI)
    partial[item] = total


@kernel
def digest(
    threads,  # int
    x,        # (n,) u8
    partial,  # (ceil(n/(8·BLOCK)),) u64
):  # fmt: skip
    n = x.shape[0]
    words = x[: n // 8 * 8].view(np.uint64)
    fork(_block, threads, partial.shape[0], (partial, words))
    rest = np.uint64(n)
    for i in range(n // 8 * 8, n):
        rest = rest << BYTE | np.uint64(x[i])
    total = _mix(rest)
    for i in range(partial.shape[0]):
        total += partial[i]
    return total
