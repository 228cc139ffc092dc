"""Matrix products: pack a panel of B, then run the microkernel down a block of A.

    C (M, N) (+)= A (M, K) · B (K, N)

B is cut into panels of NR columns. A panel is packed, so that the microkernel reads it as one stream and it
stays in L2, and is then multiplied by every MR rows of A (`tile_rows`):

    B (K, N)                            packed panel (words, width)
    ┌──────┬──────┬──────┐              ┌──────────────┐
  kc│      │▒▒▒▒▒▒│      │   ─────────▶ │ row k: NR b's│ × rows k of A, one word at a time
    ├──────┼──────┼──────┤              │ …            │
    │      │      │      │              └──────────────┘
    └──────┴──────┴──────┘

A is read in place if its words along k are contiguous there; else it is packed in strips of MR rows. K is always cut
at the same places and summed in the same order, on any thread: every element of C is bitwise reproducible.

A word is one float32, or two bfloat16 adjacent along k (`simd`); for odd K the last word's high half is 0. `width` is
the panel's columns rounded up to whole vectors. Columns beyond the matrix are zeros in the panel; a tile that overlaps
the edge of C is computed in scratch and copied. Where `amx` multiplies, a tile has 16 rows for MR, panels and strips
consist of its tiles, K is filled up with zeros to whole blocks of 16 words, and sums continue from cut to cut.
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
    MOST_ROWS,
    NR,
    address,
    bits_to_float,
    block,
    copy_row,
    copy_strip,
    f32,
    get,
    get_half,
    microkernel,
    per_word,
    put,
    read_row,
    tile_rows,
    to,
    transpose,
    write_row,
)

ZERO = np.float32(0)
NONE = (0, 0, 0, 0)  # nothing to prefetch
PANEL = KC * NR  # words of a packed panel
EDGE = MOST_ROWS * KC + MOST_ROWS * NR  # words for a border tile: rows of A, then the tile of C


@inline
def depth(array):
    """Return KC in elements: where K is cut."""
    return KC * per_word(array)


@inline
def words(array, k):
    """Return the words that hold k elements, in whole blocks; the rest of the last block is 0."""
    some = per_word(array) * block(array)
    return (k + some - 1) // some * block(array)


@inline
def panel_width(cols):
    """Return columns rounded up to whole vectors, at most NR."""
    return min(NR, (cols + LANES - 1) // LANES * LANES)


def word_along(matrix, row, col, down, left):
    """Return the word that starts at an element and extends along its row, or `down` its column; `left` remain.

    It is 0 if none remain.
    """
    raise NotImplementedError("for kernels")


@overload(word_along)
def _word_along(matrix, row, col, down, left):
    if matrix.dtype != BF16:
        return lambda matrix, row, col, down, left: matrix[row, col]

    def pair(matrix, row, col, down, left):
        word = np.int32(matrix[row, col] if left > 0 else 0)
        if left > 1:
            word |= np.int32(matrix[row + 1, col] if down else matrix[row, col + 1]) << np.int32(16)
        return bits_to_float(word)

    return pair


@inline
def place(like, k, j, width):
    """Return where word k of column j is in a panel of `width`: by rows, or for `amx` by tiles, block after block."""
    K = block(like)
    if K == 1:
        return k * width + j
    return k // K * K * width + j // LANES * LANES * K + k % K * LANES + j % LANES


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
            copy_row(matrix, dst + 4 * place(matrix, k, j, width), src + size * (k * per * ld + j), size * ld)
    for k in range(words(matrix, kc)):
        for j in range(vectors if k < whole else 0, width):
            left = kc - k * per
            word = word_along(matrix, row + k * per, col + j, True, left) if j < cols else ZERO
            panel[place(matrix, k, j, width)] = word


@inline
def pack_transposed(panel, matrix, row, col, kc, cols):
    """panel (words, width) := matrix[row : row + cols, col : col + kc]ᵀ, zeros to the right."""
    width, per, ld = panel_width(cols), per_word(matrix), matrix.shape[1]
    size = 4 // per
    blocks = kc // per // LANES * LANES
    for j in range(0, width, LANES):
        rest = 0
        if j + LANES <= cols:
            src, dst = address(matrix) + size * ((row + j) * ld + col), address(panel)
            step = width if block(matrix) == 1 else LANES
            for k in range(0, blocks, LANES):
                transpose(dst + 4 * place(matrix, k, j, width), step, src + 4 * k, size * ld)
            rest = blocks
        for i in range(j, j + LANES):
            for k in range(rest, words(matrix, kc)):
                left = kc - k * per
                word = word_along(matrix, row + i, col + k * per, False, left) if i < cols else ZERO
                panel[place(matrix, k, i, width)] = word


@inline
def pack_columns(packed, matrix, row, col, kc, cols, total):
    """packed (cols/R, total/K, R, K) := matrix[row : row + kc, col : col + cols], R = `tile_rows`, K = `block`.

    Columns and words at the end are zeros. Of the `total` words of a strip, only the first, those that hold kc, are
    written. Strips of one word have their R columns adjacent.
    """
    R, K = tile_rows(matrix), block(matrix)
    per, ld = per_word(matrix), matrix.shape[1]
    size = 4 // per
    whole, strips = kc // (per * K) * K, cols // R * R
    src, dst = address(matrix) + size * (row * ld + col), address(packed)
    for k in range(0, whole, K):  # row by row: strip by strip would read every cache line twice
        for i in range(0, strips, R):
            to_block, from_rows = dst + 4 * (i * total + k * R), src + size * (k * per * ld + i)
            if K == 1:
                copy_strip(matrix, to_block, from_rows, size * ld)
            else:
                for n in range(K):
                    copy_row(matrix, to_block + 4 * n * R, from_rows + size * n * per * ld, size * ld)
                transpose(to_block, K, to_block, 4 * R)
    for i in range(0, cols, R):
        for k in range(whole if i < strips else 0, words(matrix, kc)):
            for j in range(R):
                left = kc - k * per
                word = word_along(matrix, row + k * per, col + i + j, True, left) if i + j < cols else ZERO
                packed[i * total + k // K * K * R + j * K + k % K] = word


@inline
def multiply_panel(c, rs_c, like, a, rs_a, panel, rows, cols, kc, mode, edge):
    """C (rows, cols) float32 := or += (by `mode`, see `microkernel`) A (rows, kc) · packed panel.

    c and a are addresses, `like` any array of the operands' type; rs_c in floats, rs_a as in `microkernel`. A packed A
    is a single strip.
    """
    R = tile_rows(like)
    for i in range(0, rows, R):
        some, here = min(R, rows - i), row_of(a, rs_a, i)
        multiply_tile(c + 4 * i * rs_c, rs_c, like, here, rs_a, panel, some, cols, kc, mode, edge, None)


def row_of(a, rs_a, i):
    """Return the address of row i of A; a strip is taken whole."""
    raise NotImplementedError("for kernels")


@overload(row_of)
def _row_of(a, rs_a, i):
    return (lambda a, rs_a, i: a) if rs_a == types.none else (lambda a, rs_a, i: a + i * rs_a)


@inline
def multiply_tile(c, rs_c, like, a, rs_a, panel, rows, cols, kc, mode, edge, ahead):
    """Multiply as `multiply_panel`, for at most `tile_rows` rows; ahead: see `microkernel`."""
    width, total = panel_width(cols), words(like, kc)
    nv, b = width // LANES, address(panel)
    if rows == tile_rows(like) and cols == width and kc == total * per_word(like):
        microkernel(like, nv, a, rs_a, b, width, c, rs_c, total, mode, ahead)
    else:
        _border_tile(c, rs_c, like, a, rs_a, b, width, rows, cols, kc, mode, edge)


@inline
def lines_of_tile(matrix, row, col, cols):
    """Return the cache lines of a whole tile's rows, for `microkernel` to prefetch."""
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
    """Multiply a tile of few rows, a partial vector or a partial block: in `edge`, then copy it to C."""
    total = words(like, kc)
    tile = address(edge) + 4 * tile_rows(like) * total
    if mode == ADD:
        for i in range(rows):
            for j in range(cols):
                put(tile + 4 * (i * width + j), get(c + 4 * (i * rs_c + j)))
    whole_a, whole_rs_a = whole_tile(edge, like, a, rs_a, rows, kc)
    microkernel(like, width // LANES, whole_a, whole_rs_a, b, width, tile, width, total, mode, None)
    for i in range(rows):
        for j in range(cols):
            put(c + 4 * (i * rs_c + j), get(tile + 4 * (i * width + j)))


def whole_tile(edge, like, a, rs_a, rows, kc):
    """Return address and rs_a of whole rows and blocks of A: of a copy in `edge`, with zeros, or of the strip A is."""
    raise NotImplementedError("for kernels")


@overload(whole_tile)
def _whole_tile(edge, like, a, rs_a, rows, kc):
    if rs_a == types.none:
        return lambda edge, like, a, rs_a, rows, kc: (a, None)

    def copied(edge, like, a, rs_a, rows, kc):
        total, whole = words(like, kc), kc // per_word(like)
        for i in range(tile_rows(like)):
            some = whole if i < rows else 0
            for k in range(some):
                edge[i * total + k] = get(a + i * rs_a + 4 * k)
            edge[i * total + some : (i + 1) * total] = ZERO
            if i < rows and whole * per_word(like) < kc:
                edge[i * total + whole] = get_half(a + i * rs_a + 4 * whole)
        return address(edge), 4 * total

    return copied
