"""Linear: one product forward, two backward.     BT rows, C inputs, OC outputs

forward    out     := inp · weightᵀ + bias                        (BT, OC)
           GELU:   pre (BT, OC) := that, out := GELU(pre)
           SwiGLU: pre (BT, 2·OC) := that for a weight of 2·OC rows, out := SiLU(gate)·up, the halves of pre
backward   dinp    := dout · weight                               (BT, C)
           GELU:   times GELU′(pre) if inp was GELU(pre)
           SwiGLU: (BT, 2C), the gradient of pre if inp was SwiGLU(pre)
           dweight += doutᵀ · inp                                  (OC, C)
           dbias   += Σ_rows dout                                  (OC,)

Compute-bound. The packed operand is the weight, or for dweight the input; the other is read in place, except doutᵀ,
which is packed in strips of columns. Sums are float32 in scratch; the epilogue (bias, activation, rounding) and the
write happen while a tile is in L1. An item of SwiGLU computes a panel of gate, keeps its sums in scratch, and then the
panel of up for the same rows and places, with which it writes out.
The microkernel prefetches while it multiplies: the tile's destination, the weight's next panel, the next rows of A,
the next tile of dweight. The input's panels are packed once and shared.
Items are ranges of rows if there are enough, so that a thread reads the rows it wrote. Both products of backward are
items of one fork, so that no core idles between them.
"""

from __future__ import annotations

from .activation import gelu, gelu_gradient, swiglu, swiglu_gradient
from .gemm import (
    EDGE,
    NONE,
    PANEL,
    depth,
    lines_of_tile,
    multiply_tile,
    pack_columns,
    pack_rows,
    pack_transposed,
    panel_width,
    read_tile,
    words,
    write_tile,
)
from .jit import fork, inline, kernel
from .simd import (
    ADD,
    CACHE_LINE,
    KC,
    LANES,
    MOST_ROWS,
    MR,
    NR,
    WRITE,
    address,
    bits_to_float,
    block,
    configure,
    float_to_bits,
    per_word,
    read_row,
    tile_rows,
)

BLOCK_ROWS = 1024 // MR * MR  # rows of A per packed panel, whole tiles; L2 holds no more next to it
PAIR_ROWS = BLOCK_ROWS // 2 // MR * MR  # rows of A for two panels, gate and up
BLOCK_COLS = 8 * MR  # most rows of dweight per item
OWN_ROWS = 512  # fewer are shared, since each thread would pack all panels
SCRATCH = PANEL + EDGE + max(BLOCK_ROWS * NR, KC * BLOCK_COLS)  # floats per thread

# The head's dinp sums over the whole vocabulary. All its columns process SEGMENT·KC of it before the next segment, so
# that this part of dout and weight is read from memory once, not once per panel of columns.
SEGMENT = 4


def shared_sums(BT: int, OC: int, C: int) -> int:
    """Return the floats that `linear_backward` needs for sums of dinp between segments; 0 for one segment."""
    rows, panels = -(-BT // MOST_ROWS) * MOST_ROWS, -(-C // NR)
    return rows * panels * NR if OC > SEGMENT * KC else 0


@inline
def _rows_per_item(rows, panels, threads, most, R):
    """Return rows per item, tiles of R: as many as fit in cache (`most`), fewer if threads would otherwise be idle.

    Each thread has its own rows if these are at least OWN_ROWS.
    """
    own = (rows + threads - 1) // threads
    whole = own if own >= OWN_ROWS else rows
    parts = (whole + most - 1) // most
    each = (whole + parts * R - 1) // (parts * R) * R
    while each > 8 * MR and panels * ((rows + each - 1) // each) < 4 * threads:
        each = (each // 2 + R - 1) // R * R
    return each


@inline
def _forward_item(worker, item, out, pre, inp, weight, bias, each, scratch):
    BT, C = inp.shape
    OC, R = out.shape[1], tile_rows(inp)
    halves = weight.shape[0] // OC  # 2: gate and up
    panels = (OC + NR - 1) // NR
    col, row = item % panels * NR, item // panels * each
    cols, rows = min(NR, OC - col), min(each, BT - row)
    width, size = panel_width(cols), 4 // per_word(inp)
    panel, edge = scratch[worker, :PANEL], scratch[worker, PANEL : PANEL + EDGE]
    gates = scratch[worker, PANEL + EDGE :]
    configure(inp, R)
    for k in range(0, C, depth(inp)):
        kc = min(depth(inp), C - k)
        last = k + kc == C
        for half in range(halves):
            first, final = half * OC + col, last and half == halves - 1
            sums = gates[half * each * NR :]
            pack_transposed(panel, weight, first, k, kc, cols)
            next_col, next_k = ((item + 1) % panels * NR, 0) if last else (col, k + kc)
            if half < halves - 1:
                next_col, next_k = first + OC, k
            for i in range(0, rows, R):
                some = min(R, rows - i)
                a, tile = address(inp) + size * ((row + i) * C + k), sums[i * NR : (i + R) * NR]
                if k == 0 and bias.size > 0:
                    _start_with_bias(tile, bias, first, some, cols)
                mode = ADD if k > 0 or bias.size > 0 else WRITE
                # Prefetch the tile's destination; then the first tiles prefetch rows of the next panel, the others the
                # rows of A for the next tile.
                goes = lines_of_tile(out, row + i, col, cols) if final else NONE
                also = lines_of_tile(pre, row + i, first, cols) if last and pre.size > 0 else NONE
                soon = a + R * size * C if i >= cols else address(weight) + size * ((next_col + i) * C + next_k)
                ahead = goes, also, (soon, size * C, CACHE_LINE, size * kc // CACHE_LINE)
                multiply_tile(address(tile), width, inp, a, size * C, panel, some, cols, kc, mode, edge, ahead)
                if last and pre.size > 0:
                    write_tile(pre, row + i, first, tile, some, cols)
                    if per_word(pre) > 1:  # activation of the stored, rounded value
                        read_tile(tile, pre, row + i, first, some, cols)
                    if final:
                        _activate_tile(tile, gates[i * NR : (i + R) * NR], R * NR, halves > 1)
                if final:
                    write_tile(out, row + i, col, tile, some, cols)


@inline
def _activate_tile(tile, gate, size, paired):
    """tile (size,) := SwiGLU(gate, tile) if `paired`, else GELU(tile)."""
    if paired:
        for j in range(size):  # constant length, for whole vectors; the unused part is ignored
            tile[j] = swiglu(gate[j], tile[j])
    else:
        for j in range(size):
            tile[j] = gelu(tile[j])


@inline
def _start_with_bias(tile, bias, col, rows, cols):
    """Every row of the tile := bias[col : col + cols]."""
    width, whole = panel_width(cols), cols // LANES * LANES
    for i in range(rows):
        for j in range(0, whole, LANES):
            read_row(bias, address(tile) + 4 * (i * width + j), address(bias) + 4 * (col + j))
        for j in range(whole, cols):
            tile[i * width + j] = bias[col + j]


@kernel
def linear_forward(
    threads,  # int
    out,      # (BT, OC) :=
    pre,      # (BT, OC) for GELU, (BT, 2·OC) for SwiGLU :=, or (0, 0) for none
    inp,      # (BT, C)
    weight,   # (OC, C), or (2·OC, C)
    bias,     # (OC,) or (2·OC,) f32, or (0,) for none
    scratch,  # (threads, ≥ SCRATCH) f32
):  # fmt: skip
    BT, OC = out.shape
    panels = (OC + NR - 1) // NR
    each = _rows_per_item(BT, panels, threads, BLOCK_ROWS if weight.shape[0] == OC else PAIR_ROWS, tile_rows(inp))
    items = panels * ((BT + each - 1) // each)
    fork(_forward_item, threads, items, (out, pre, inp, weight, bias, each, scratch))


@inline
def _dinp_item(worker, item, dinp, dout, weight, pre, each, start, stop, shared, scratch):
    BT, OC = dout.shape
    C, R = weight.shape[1], tile_rows(dout)
    panels = (C + NR - 1) // NR
    col, row = item % panels * NR, item // panels * each
    cols, rows = min(NR, C - col), min(each, BT - row)
    width, per, size = panel_width(cols), per_word(dout), 4 // per_word(dout)
    panel, edge = scratch[worker, :PANEL], scratch[worker, PANEL : PANEL + EDGE]
    sums = scratch[worker, PANEL + EDGE :]
    if shared.size > 0:
        sums = shared[(col * ((BT + R - 1) // R * R)) + row * NR :]
    configure(dout, R)
    for k in range(start, stop, depth(dout)):
        kc = min(depth(dout), OC - k)
        last = k + kc == OC
        pack_rows(panel, weight, k, col, kc, cols)
        next_col, next_k = ((item + 1) % panels * NR, start) if last else (col, k + kc)
        for i in range(0, rows, R):
            some = min(R, rows - i)
            a, tile = address(dout) + size * ((row + i) * OC + k), sums[i * NR : (i + R) * NR]
            # As in forward; each tile prefetches one line per row of the next panel, or per second row of pairs.
            # SwiGLU has four tiles: the two to read, and one to write instead of rows of A (dev/LOG.md#swiglu).
            four = last and pre.shape[1] > C
            goes = lines_of_tile(dinp, row + i, col, cols) if last else NONE
            if four:
                goes = lines_of_tile(pre, row + i, C + col, cols)
            also = lines_of_tile(pre, row + i, col, cols) if last and pre.size > 0 else NONE
            line, half = i // R // per * CACHE_LINE, i // R % per
            if line <= size * cols:
                soon = address(weight) + size * ((next_k + half) * C + next_col) + line
                then = soon, per * size * C, R * per * size * C, words(dout, kc) // R
            elif four:
                then = lines_of_tile(dinp, row + i, C + col, cols)
            else:
                then = a + R * size * OC, size * OC, CACHE_LINE, size * kc // CACHE_LINE
            mode, ahead = ADD if k > 0 else WRITE, (goes, also, then)
            multiply_tile(address(tile), width, dout, a, size * OC, panel, some, cols, kc, mode, edge, ahead)
            if last:
                _finish_dinp(dinp, pre, C, tile, edge, row + i, col, some, cols)


@inline
def _finish_dinp(dinp, pre, C, tile, edge, row, col, rows, cols):
    """Write a tile of finished sums, through the gradient of the activation that the input was."""
    size = tile_rows(dinp) * NR
    before, up = edge[:size], edge[size : 2 * size]
    if pre.size > 0:
        read_tile(before, pre, row, col, rows, cols)
        if pre.shape[1] == C:
            for j in range(size):
                tile[j] *= gelu_gradient(before[j])
        else:
            read_tile(up, pre, row, C + col, rows, cols)
            for j in range(size):
                tile[j], up[j] = swiglu_gradient(tile[j], before[j], up[j])
            write_tile(dinp, row, C + col, up, rows, cols)
    write_tile(dinp, row, col, tile, rows, cols)


@inline
def _pack_inputs(worker, item, packed, inp, k, kc):
    """Pack panel `item` of inp[k : k + kc], shared by all items of dweight."""
    col = item * NR
    pack_rows(packed[col * words(inp, kc) :], inp, k, col, kc, min(NR, inp.shape[1] - col))


@inline
def _dweight_item(worker, item, dweight, dbias, dout, packed_inp, k, kc, each, add, scratch):
    OC, C = dweight.shape
    R, first, total = tile_rows(dout), item * each, words(dout, kc)
    rows = min(each, OC - first)
    edge, packed = scratch[worker, PANEL : PANEL + EDGE], scratch[worker, PANEL + EDGE :]
    pack_columns(packed, dout, k, first, kc, rows, total)
    configure(dout, R)
    if dbias.size > 0:
        _add_columns(dbias, packed, dout, first, rows, total, add, edge)
    for col in range(0, C, NR):
        cols, panel = min(NR, C - col), packed_inp[col * total :]
        for i in range(0, rows, R):
            c, a = address(dweight) + 4 * ((first + i) * C + col), address(packed) + 4 * i * total
            # The next tile to write: its lines come from memory.
            soon = c + 4 * R * C if i + R < rows else address(dweight) + 4 * (first * C + col + NR)
            ahead = (soon, 4 * C, CACHE_LINE, 4 * NR // CACHE_LINE), NONE, NONE
            some, k_total, mode = min(R, rows - i), total * per_word(dout), ADD if add else WRITE
            multiply_tile(c, C, dout, a, None, panel, some, cols, k_total, mode, edge, ahead)


@inline
def _add_columns(dbias, packed, like, first, rows, total, add, sums):
    """dbias[first + i] := or += Σ_k of column i of strips from `pack_columns`. sums: scratch of at least `many`."""
    R, K = tile_rows(like), block(like)
    many, step = (8 * R, R) if K == 1 else (R * K, 1)  # partial sums, enough to hide latency; `step` within a column
    for i in range(0, rows, R):
        strip = packed[i * total : (i + R) * total]
        for j in range(many):
            sums[j] = 0
        together = total * R // many * many
        for start in range(0, together, many):
            several = strip[start : start + many]
            for j in range(many):  # constant length, for whole vectors
                sums[j] += _word_sum(like, several[j])
        for j in range(together, total * R):  # none of whole blocks
            sums[j % R] += _word_sum(like, strip[j])
        for j in range(min(R, rows - i)):
            s = sums[j * K]
            for part in range(1, many // R):
                s += sums[j * K + part * step]
            dbias[first + i + j] = dbias[first + i + j] + s if add else s


@inline
def _word_sum(like, word):
    """Return the sum of a word's elements."""
    if per_word(like) == 1:
        return word
    bits = float_to_bits(word)
    return bits_to_float(bits << 16) + bits_to_float(bits & -65536)


@inline
def _backward_item(worker, item, dinp_items, dweight_items, each, threads, dinp, dweight, dbias, dout, packed_inp,
                   weight, pre, k, kc, row_block, col_block, add, start, stop, shared, scratch):  # fmt: skip
    """Run an item of either product: each thread's range is its part of dinp, then its part of dweight."""
    part, i = item // each, item % each
    first, last = part * dinp_items // threads, (part + 1) * dinp_items // threads
    if i < last - first:
        _dinp_item(worker, first + i, dinp, dout, weight, pre, row_block, start, stop, shared, scratch)
        return
    i += part * dweight_items // threads - (last - first)
    if i < (part + 1) * dweight_items // threads:
        _dweight_item(worker, i, dweight, dbias, dout, packed_inp, k, kc, col_block, add, scratch)


@kernel
def linear_backward(
    threads,     # int
    dinp,        # (BT, C) :=, or (BT, 2C) for SwiGLU
    dweight,     # (OC, C) f32 := or += by accumulate, or (0, 0) for none: dinp only
    dbias,       # (OC,) f32 := or += by accumulate, or (0,) for none
    dout,        # (BT, OC)
    inp,         # (BT, C), or (0, 0) without dweight
    weight,      # (OC, C)
    pre,         # (BT, C) of GELU, (BT, 2C) of SwiGLU, or (0, 0) for none
    accumulate,  # bool
    scratch,     # (threads, ≥ SCRATCH) f32
    packed_inp,  # (≥ max(MOST_BLOCK, min(BT, KC))·(C + LANES),) f32, or (0,) without dweight
    shared,      # (≥ shared_sums(BT, OC, C),) f32
):  # fmt: skip
    BT, OC = dout.shape
    C = weight.shape[1]
    panels, frozen = (C + NR - 1) // NR, dweight.size == 0
    R = tile_rows(dout)
    row_block = _rows_per_item(BT, panels, threads, BLOCK_ROWS, R)
    col_block = min(BLOCK_COLS, max(R, OC // (16 * threads) // R * R))
    dinp_items = panels * ((BT + row_block - 1) // row_block)
    dweight_items = 0 if frozen else (OC + col_block - 1) // col_block
    segment = SEGMENT * depth(dout)
    start = 0
    while start + segment < OC:
        fork(
            _dinp_item, threads, dinp_items,
            (dinp, dout, weight, pre, row_block, start, start + segment, shared, scratch),
        )  # fmt: skip
        start += segment
    for k in range(0, 1 if frozen else BT, depth(dout)):
        kc = min(depth(dout), BT - k)
        dinp_now = dinp_items if k == 0 else 0
        each = (dinp_now + threads - 1) // threads + (dweight_items + threads - 1) // threads  # items per range
        fork(_pack_inputs, threads, 0 if frozen else panels, (packed_inp, inp, k, kc))
        fork(
            _backward_item, threads, threads * each,
            (dinp_now, dweight_items, each, threads, dinp, dweight, dbias, dout, packed_inp, weight, pre, k, kc,
             row_block, col_block, accumulate or k > 0, start, OC, shared[:0] if start == 0 else shared, scratch),
        )  # fmt: skip
