"""Rotary position embedding (Su et al. 2021) of the first heads of a row, in place, "rotate half" form.

with x₁, x₂ the halves of a head, and cos, sin (HS/2,) those of the row's position

    x₁ := x₁·cos − x₂·sin        x₂ := x₂·cos + x₁·sin

Backward is the inverse rotation, by −angle.
"""

from __future__ import annotations

import numpy as np

from .jit import fork, inline, kernel
from .simd import f32, to

ROWS = 32  # per item


@inline
def _item(worker, item, x, cos, sin, positions, heads, sign):
    half = cos.shape[1]
    for row in range(item * ROWS, min((item + 1) * ROWS, x.shape[0])):
        position = positions[row]
        cosines, sines = cos[position], sin[position]
        for head in range(heads):
            first, second = x[row, 2 * head * half : (2 * head + 1) * half], x[row, (2 * head + 1) * half :][:half]
            for c in range(half):
                a, b, s = f32(first[c]), f32(second[c]), sines[c] * np.float32(sign)
                first[c] = to(first, a * cosines[c] - b * s)
                second[c] = to(second, b * cosines[c] + a * s)


@kernel
def rope(
    threads,    # int
    x,          # (BT, ≥ heads·HS) in place
    cos,        # (S, HS/2) f32
    sin,        # (S, HS/2) f32
    positions,  # (BT,) i32, < S
    heads,      # int
    sign,       # int: 1, or −1 for the inverse (`graph` replays integers, not floats)
):  # fmt: skip
    fork(_item, threads, (x.shape[0] + ROWS - 1) // ROWS, (x, cos, sin, positions, heads, sign))
