"""Products of matrices: pack a panel of B, then run the microkernel down a block of A.

    C (M, N) (+)= A (M, K) · B (K, N)

B is cut into panels of NR columns and KC rows. A panel is packed, so that the microkernel reads it as
one stream and it stays in L2, and then meets every MR rows of A:

    B (K, N)                            packed panel (KC, width)
    ┌──────┬──────┬──────┐              ┌──────────────┐
  KC│      │▒▒▒▒▒▒│      │   ─────────▶ │ row k: NR b's│ × rows k of A, one number at a time
    ├──────┼──────┼──────┤              │ …            │
    │      │      │      │              └──────────────┘
    └──────┴──────┴──────┘

A is read where it lies, with any strides. K is always cut at multiples of KC and summed in that order,
whatever thread runs what: an element of C has the same bits every time.

`width` is the panel's columns rounded up to whole vectors; columns beyond the matrix are zeros in the
panel, and a tile that sticks out of C is computed aside and copied.
"""

from __future__ import annotations

import numpy as np

from .jit import inline
from .simd import KC, LANES, MR, NR, address, copy_vector, get, microkernel, put, transpose

ZERO = np.float32(0)
PANEL = KC * NR  # floats of a packed panel
EDGE = MR * KC + MR * NR  # floats for a tile at the border: rows of A, then the tile of C


@inline
def panel_width(cols):
    """Columns rounded up to whole vectors, at most NR."""
    return min(NR, (cols + LANES - 1) // LANES * LANES)


@inline
def pack_rows(panel, matrix, row, col, kc, cols):
    """panel (kc, width) := matrix[row : row + kc, col : col + cols], zeros to the right."""
    width = panel_width(cols)
    ld = matrix.shape[1]
    src = address(matrix) + 4 * (row * ld + col)
    dst = address(panel)
    if cols == NR:
        for k in range(kc):
            for j in range(0, NR, LANES):
                copy_vector(dst + 4 * (k * NR + j), src + 4 * (k * ld + j))
    else:
        for k in range(kc):
            for j in range(cols):
                put(dst + 4 * (k * width + j), get(src + 4 * (k * ld + j)))
            for j in range(cols, width):
                put(dst + 4 * (k * width + j), ZERO)


@inline
def pack_transposed(panel, matrix, row, col, kc, cols):
    """panel (kc, width) := matrix[row : row + cols, col : col + kc]ᵀ, zeros to the right."""
    width = panel_width(cols)
    ld = matrix.shape[1]
    blocks = kc - kc % LANES
    for j in range(0, width, LANES):
        if j + LANES <= cols:
            src = address(matrix) + 4 * ((row + j) * ld + col)
            dst = address(panel) + 4 * j
            for k in range(0, blocks, LANES):
                transpose(dst + 4 * k * width, width, src + 4 * k, ld)
            rest = blocks
        else:
            rest = 0
        for i in range(LANES):
            if j + i < cols:
                for k in range(rest, kc):
                    panel[k * width + j + i] = matrix[row + j + i, col + k]
            else:
                for k in range(rest, kc):
                    panel[k * width + j + i] = 0


@inline
def multiply_panel(c, rs_c, a, rs_a, cs_a, panel, rows, cols, kc, add, edge):
    """C (rows, cols) := or += (if `add`) A (rows, kc) · packed panel; c and a are addresses."""
    width = panel_width(cols)
    nv = width // LANES
    b = address(panel)
    whole = rows - rows % MR if cols == width else 0
    for i in range(0, whole, MR):
        microkernel(nv, a + 4 * i * rs_a, rs_a, cs_a, b, width, c + 4 * i * rs_c, rs_c, kc, add)
    for i in range(whole, rows, MR):
        _border_tile(
            c + 4 * i * rs_c, rs_c, a + 4 * i * rs_a, rs_a, cs_a, b, width, min(MR, rows - i), cols, kc, add, edge
        )


@inline
def _border_tile(c, rs_c, a, rs_a, cs_a, b, width, rows, cols, kc, add, edge):
    """One tile of fewer than MR rows or a broken vector: computed in `edge`, then copied to C."""
    tile = address(edge) + 4 * MR * kc
    if rows < MR:
        for i in range(MR):
            for k in range(kc):
                edge[i * kc + k] = get(a + 4 * (i * rs_a + k * cs_a)) if i < rows else 0
        microkernel(width // LANES, address(edge), kc, 1, b, width, tile, width, kc, False)
    else:
        microkernel(width // LANES, a, rs_a, cs_a, b, width, tile, width, kc, False)
    for i in range(rows):
        for j in range(cols):
            where = c + 4 * (i * rs_c + j)
            value = get(tile + 4 * (i * width + j))
            put(where, get(where) + value if add else value)
