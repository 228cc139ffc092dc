"""Matrix products: pack a panel of B, then run the microkernel down a block of A.

    C (M, N) (+)= A (M, K) · B (K, N)

B is cut into panels of NR columns. A panel is packed, so that the microkernel reads it as one stream and it
stays in L2, and is then multiplied by every MR rows of A:

    B (K, N)                            packed panel (words, width)
    ┌──────┬──────┬──────┐              ┌──────────────┐
  kc│      │▒▒▒▒▒▒│      │   ─────────▶ │ row k: NR b's│ × rows k of A, one word at a time
    ├──────┼──────┼──────┤              │ …            │
    │      │      │      │              └──────────────┘
    └──────┴──────┴──────┘

A is read in place if its words along k are contiguous there; else it is packed in strips of MR rows. K is always cut
at the same places and summed in that order, on any thread: every element of C is bitwise reproducible.

A word is one float32, or two bfloat16 adjacent along k (`simd`); for odd K the last word's high half is 0. `width` is
the panel's columns rounded up to whole vectors. Columns beyond the matrix are zeros in the panel; a tile that overlaps
the edge of C is computed in scratch and copied.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from .jit import inline
from .simd import (
    ADD,
    BF16,
    CACHE_LINE,
    KC,
    LANES,
    MR,
    NR,
    STRIP,
    WRITE,
    address,
    bits_to_float,
    copy_row,
    copy_strip,
    f32,
    get,
    get_half,
    microkernel,
    per_word,
    put,
    read_row,
    to,
    transpose,
    write_row,
)

ZERO = np.float32(0)
NONE = (0, 0, 0, 0)  # nothing to prefetch
PANEL = KC * NR  # words of a packed panel
EDGE = MR * KC + MR * NR  # words for a border tile: rows of A, then the tile of C


@inline
def depth(array):
    """Return KC in elements: where K is cut."""
    return KC * per_word(array)


@inline
def words(array, k):
    """Return the words that hold k elements."""
    return (k + per_word(array) - 1) // per_word(array)


@inline
def panel_width(cols):
    """Return columns rounded up to whole vectors, at most NR."""
    return min(NR, (cols + LANES - 1) // LANES * LANES)


def word_along(matrix, row, col, down, left):
    """Return the word that starts at an element and extends along its row, or `down` its column; `left` remain."""
    raise NotImplementedError("for kernels")


@overload(word_along)
def _word_along(matrix, row, col, down, left):
    if matrix.dtype != BF16:
        return lambda matrix, row, col, down, left: matrix[row, col]

    def pair(matrix, row, col, down, left):
        word = np.int32(matrix[row, col])
        if left > 1:
            word |= np.int32(matrix[row + 1, col] if down else matrix[row, col + 1]) << np.int32(16)
        return bits_to_float(word)

    return pair


@inline
def pack_rows(panel, matrix, row, col, kc, cols):
    """panel (words, width) := matrix[row : row + kc, col : col + cols], zeros to the right."""
    width, per, ld = panel_width(cols), per_word(matrix), matrix.shape[1]
    size = 4 // per
    src, dst = address(matrix) + size * (row * ld + col), address(panel)
    vectors = cols // LANES * LANES
    whole = kc // per
    for k in range(whole):
        for j in range(0, vectors, LANES):
            copy_row(matrix, dst + 4 * (k * width + j), src + size * (k * per * ld + j), size * ld)
    for k in range(words(matrix, kc)):
        for j in range(vectors if k < whole else 0, width):
            left = kc - k * per
            panel[k * width + j] = word_along(matrix, row + k * per, col + j, True, left) if j < cols else ZERO


@inline
def pack_transposed(panel, matrix, row, col, kc, cols):
    """panel (words, width) := matrix[row : row + cols, col : col + kc]ᵀ, zeros to the right."""
    width, per, ld = panel_width(cols), per_word(matrix), matrix.shape[1]
    size = 4 // per
    blocks = kc // per // LANES * LANES
    for j in range(0, width, LANES):
        rest = 0
        if j + LANES <= cols:
            src = address(matrix) + size * ((row + j) * ld + col)
            dst = address(panel) + 4 * j
            for k in range(0, blocks, LANES):
                transpose(dst + 4 * k * width, width, src + 4 * k, size * ld)
            rest = blocks
        for i in range(j, j + LANES):
            for k in range(rest, words(matrix, kc)):
                left = kc - k * per
                panel[k * width + i] = word_along(matrix, row + i, col + k * per, False, left) if i < cols else ZERO


@inline
def pack_columns(packed, matrix, row, col, kc, cols, total):
    """packed (cols/MR, total, MR) := matrix[row : row + kc, col : col + cols] by MR columns, zeros at the end.

    Of the `total` words of a strip, only the first, those that hold kc, are written.
    """
    per, ld = per_word(matrix), matrix.shape[1]
    size = 4 // per
    whole, strips = kc // per, cols // MR * MR
    src, dst = address(matrix) + size * (row * ld + col), address(packed)
    for k in range(whole):  # row by row: strip by strip would read every cache line twice
        for i in range(0, strips, MR):
            copy_strip(matrix, dst + 4 * (i * total + k * MR), src + size * (k * per * ld + i), size * ld)
    for i in range(0, cols, MR):
        for k in range(whole if i < strips else 0, words(matrix, kc)):
            for j in range(MR):
                left = kc - k * per
                word = word_along(matrix, row + k * per, col + i + j, True, left) if i + j < cols else ZERO
                packed[i * total + k * MR + j] = word


def strides(rs_a):
    """Return bytes from row to row and from word to word of A, for rs_a as `microkernel` takes it."""
    raise NotImplementedError("for kernels")


@overload(strides)
def _strides(rs_a):
    return (lambda rs_a: STRIP) if rs_a == types.none else (lambda rs_a: (rs_a, 4))


@inline
def multiply_panel(c, rs_c, like, a, rs_a, panel, rows, cols, kc, mode, edge):
    """C (rows, cols) float32 := or += (by `mode`, see `microkernel`) A (rows, kc) · packed panel.

    c and a are addresses, `like` any array of the operands' type; rs_c in floats, rs_a as in `microkernel`. A packed A
    is a single strip.
    """
    down, _ = strides(rs_a)
    for i in range(0, rows, MR):
        some = min(MR, rows - i)
        multiply_tile(c + 4 * i * rs_c, rs_c, like, a + i * down, rs_a, panel, some, cols, kc, mode, edge, None)


@inline
def multiply_tile(c, rs_c, like, a, rs_a, panel, rows, cols, kc, mode, edge, ahead):
    """Multiply as `multiply_panel`, for at most MR rows; ahead: see `microkernel`."""
    width, total = panel_width(cols), words(like, kc)
    nv, b = width // LANES, address(panel)
    if rows == MR and cols == width and kc % per_word(like) == 0:
        microkernel(like, nv, a, rs_a, b, width, c, rs_c, total, mode, ahead)
    else:
        _border_tile(c, rs_c, like, a, rs_a, b, width, rows, cols, kc, mode, edge)


@inline
def lines_of_tile(matrix, row, col, cols):
    """Return the cache lines of MR rows of a tile, for `microkernel` to prefetch."""
    size = 4 // per_word(matrix)
    where, stride = address(matrix) + size * (row * matrix.shape[1] + col), size * matrix.shape[1]
    return where, stride, CACHE_LINE, (size * cols + CACHE_LINE - 1) // CACHE_LINE


@inline
def write_tile(matrix, row, col, tile, rows, cols):
    """matrix[row : row + rows, col : col + cols] := tile (rows, width) float32."""
    width, ld, size = panel_width(cols), matrix.shape[1], 4 // per_word(matrix)
    whole = cols // LANES * LANES
    for i in range(rows):
        dst, src = address(matrix) + size * ((row + i) * ld + col), address(tile) + 4 * i * width
        for j in range(0, whole, LANES):
            write_row(matrix, dst + size * j, src + 4 * j)
        for j in range(whole, cols):
            matrix[row + i, col + j] = to(matrix, tile[i * width + j])


@inline
def read_tile(tile, matrix, row, col, rows, cols):
    """tile (rows, width) float32 := matrix[row : row + rows, col : col + cols]; padding columns are unchanged."""
    width, ld, size = panel_width(cols), matrix.shape[1], 4 // per_word(matrix)
    whole = cols // LANES * LANES
    for i in range(rows):
        src, dst = address(matrix) + size * ((row + i) * ld + col), address(tile) + 4 * i * width
        for j in range(0, whole, LANES):
            read_row(matrix, dst + 4 * j, src + size * j)
        for j in range(whole, cols):
            tile[i * width + j] = f32(matrix[row + i, col + j])


@inline
def _border_tile(c, rs_c, like, a, rs_a, b, width, rows, cols, kc, mode, edge):
    """Multiply a tile of fewer than MR rows, a partial vector or a half word: in `edge`, then copy it to C."""
    total, whole = words(like, kc), kc // per_word(like)
    down, along = strides(rs_a)
    for i in range(MR):
        for k in range(total):
            where = a + i * down + k * along
            if i >= rows:
                edge[i * total + k] = ZERO
            else:
                edge[i * total + k] = get(where) if k < whole else get_half(where)
    tile = address(edge) + 4 * MR * total
    microkernel(like, width // LANES, address(edge), 4 * total, b, width, tile, width, total, WRITE, None)
    for i in range(rows):
        for j in range(cols):
            where = c + 4 * (i * rs_c + j)
            value = get(tile + 4 * (i * width + j))
            put(where, get(where) + value if mode == ADD else value)
