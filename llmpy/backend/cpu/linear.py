"""Linear: one product forward, two backward.     BT rows, C inputs, OC outputs

forward    out     := inp · weightᵀ + bias                        (BT, OC)
           with GELU: pre_gelu := that, out := GELU(pre_gelu)
backward   dinp    := dout · weight, times GELU′ if inp was a GELU  (BT, C)
           dweight += doutᵀ · inp                                  (OC, C)
           dbias   += Σ_rows dout                                  (OC,)

Compute-bound. The weight, or for dweight the input, is the packed operand; the other is read where it
lies, except doutᵀ, whose columns are too far apart for the first-level cache and are packed by MR.
The input's panels are packed once and shared. Both products of backward are items of one fork, so that no
core waits between them.
"""

from __future__ import annotations

from .gelu import gelu, gelu_gradient
from .gemm import EDGE, PANEL, ZERO, multiply_panel, pack_rows, pack_transposed
from .jit import fork, inline, kernel
from .simd import KC, MR, NR, address, get, put

BLOCK_ROWS = 1024  # rows of A that meet one packed panel; more would not fit in L2 beside it
BLOCK_COLS = 16 * MR  # rows of dweight that one item computes, at most
SCRATCH = PANEL + EDGE + KC * BLOCK_COLS  # floats for each thread


@inline
def _forward_item(worker, item, out, pre_gelu, inp, weight, bias, block, scratch):
    BT, C = inp.shape
    OC = weight.shape[0]
    panels = (OC + NR - 1) // NR
    col, row = item % panels * NR, item // panels * block
    cols, rows = min(NR, OC - col), min(block, BT - row)
    panel, edge = scratch[worker, :PANEL], scratch[worker, PANEL : PANEL + EDGE]
    product = pre_gelu if pre_gelu.size > 0 else out
    for k in range(0, C, KC):
        kc = min(KC, C - k)
        pack_transposed(panel, weight, col, k, kc, cols)
        multiply_panel(
            address(product) + 4 * (row * OC + col), OC, address(inp) + 4 * (row * C + k), C, 1,
            panel, rows, cols, kc, k > 0, edge,
        )  # fmt: skip
    for i in range(row, row + rows):
        line = product[i, col : col + cols]
        if bias.size > 0:
            shift = bias[col : col + cols]
            for j in range(cols):
                line[j] += shift[j]
        if pre_gelu.size > 0:
            activated = out[i, col : col + cols]
            for j in range(cols):
                activated[j] = gelu(line[j])


@kernel
def linear_forward(
    threads,   # int
    out,       # (BT, OC) f32 :=
    pre_gelu,  # (BT, OC) f32 :=, or (0, 0) for none
    inp,       # (BT, C)
    weight,    # (OC, C)
    bias,      # (OC,), or (0,) for none
    scratch,   # (threads, ≥ SCRATCH)
):  # fmt: skip
    BT, OC = out.shape
    panels = (OC + NR - 1) // NR
    block = _rows_per_item(BT, panels, threads)
    items = panels * ((BT + block - 1) // block)
    fork(_forward_item, threads, items, (out, pre_gelu, inp, weight, bias, block, scratch))


@inline
def _rows_per_item(rows, panels, threads):
    """Rows of one item: as many as the cache takes, fewer if that leaves threads without work."""
    block = min(BLOCK_ROWS, (rows + MR - 1) // MR * MR)
    while block > 8 * MR and panels * ((rows + block - 1) // block) < 4 * threads:
        block = (block // 2 + MR - 1) // MR * MR
    return block


@inline
def _dinp_item(worker, item, dinp, dout, weight, pre_gelu, block, scratch):
    BT, OC = dout.shape
    C = weight.shape[1]
    panels = (C + NR - 1) // NR
    col, row = item % panels * NR, item // panels * block
    cols, rows = min(NR, C - col), min(block, BT - row)
    panel, edge = scratch[worker, :PANEL], scratch[worker, PANEL : PANEL + EDGE]
    for k in range(0, OC, KC):
        kc = min(KC, OC - k)
        pack_rows(panel, weight, k, col, kc, cols)
        multiply_panel(
            address(dinp) + 4 * (row * C + col), C, address(dout) + 4 * (row * OC + k), OC, 1,
            panel, rows, cols, kc, k > 0, edge,
        )  # fmt: skip
    if pre_gelu.size > 0:
        for i in range(row, row + rows):
            line, before = dinp[i, col : col + cols], pre_gelu[i, col : col + cols]
            for j in range(cols):
                line[j] *= gelu_gradient(before[j])


@inline
def _pack_columns(packed, matrix, row, col, kc, cols):
    """packed (cols/MR, kc, MR) := matrix[row : row + kc, col : col + cols] by MR columns, zeros at the end."""
    ld = matrix.shape[1]
    for i in range(0, cols, MR):
        src = address(matrix) + 4 * (row * ld + col + i)
        dst = address(packed) + 4 * i * kc
        if i + MR <= cols:
            for k in range(kc):
                for j in range(MR):
                    put(dst + 4 * (k * MR + j), get(src + 4 * (k * ld + j)))
        else:
            for k in range(kc):
                for j in range(MR):
                    put(dst + 4 * (k * MR + j), get(src + 4 * (k * ld + j)) if i + j < cols else ZERO)


@inline
def _pack_inputs(worker, item, packed, inp, k, kc):
    """Panel `item` of inp[k : k + kc], for all items of dweight to share."""
    col = item * NR
    pack_rows(packed[col * kc :], inp, k, col, kc, min(NR, inp.shape[1] - col))


@inline
def _dweight_item(worker, item, dweight, dbias, dout, packed_inp, k, kc, block, add, scratch):
    OC, C = dweight.shape
    first = item * block
    rows = min(block, OC - first)
    edge, packed = scratch[worker, PANEL : PANEL + EDGE], scratch[worker, PANEL + EDGE :]
    _pack_columns(packed, dout, k, first, kc, rows)
    if dbias.size > 0:
        _add_columns(dbias, packed, first, rows, kc, add)
    for col in range(0, C, NR):
        cols = min(NR, C - col)
        for i in range(0, rows, MR):
            multiply_panel(
                address(dweight) + 4 * ((first + i) * C + col), C, address(packed) + 4 * i * kc, 1, MR,
                packed_inp[col * kc :], min(MR, rows - i), cols, kc, add, edge,
            )  # fmt: skip


@inline
def _add_columns(dbias, packed, first, rows, kc, add):
    """dbias[first + i] := or += the sum over k of column i of what `_pack_columns` made."""
    for i in range(0, rows, MR):
        strip = packed[i * kc : (i + MR) * kc].reshape((kc, MR))
        for j in range(min(MR, rows - i)):
            total = ZERO
            for k in range(kc):
                total += strip[k, j]
            dbias[first + i + j] = dbias[first + i + j] + total if add else total


@inline
def _backward_item(worker, item, split, dinp, dweight, dbias, dout, packed_inp, weight, pre_gelu, k, kc, row_block,
                   col_block, add, scratch):  # fmt: skip
    if item < split:
        _dinp_item(worker, item, dinp, dout, weight, pre_gelu, row_block, scratch)
    else:
        _dweight_item(worker, item - split, dweight, dbias, dout, packed_inp, k, kc, col_block, add, scratch)


@kernel
def linear_backward(
    threads,     # int
    dinp,        # (BT, C) f32 :=
    dweight,     # (OC, C) f32 := or += by accumulate
    dbias,       # (OC,) f32 := or += by accumulate, or (0,) for none
    dout,        # (BT, OC)
    inp,         # (BT, C)
    weight,      # (OC, C)
    pre_gelu,    # (BT, C), or (0, 0) for none
    accumulate,  # bool
    scratch,     # (threads, ≥ SCRATCH)
    packed_inp,  # (≥ min(BT, KC)·(C + LANES),)
):  # fmt: skip
    BT, OC = dout.shape
    C = weight.shape[1]
    panels = (C + NR - 1) // NR
    row_block = _rows_per_item(BT, panels, threads)
    col_block = min(BLOCK_COLS, max(MR, OC // (4 * threads) // MR * MR))
    dinp_items = panels * ((BT + row_block - 1) // row_block)
    dweight_items = (OC + col_block - 1) // col_block
    for k in range(0, BT, KC):
        kc = min(KC, BT - k)
        split = dinp_items if k == 0 else 0
        fork(_pack_inputs, threads, panels, (packed_inp, inp, k, kc))
        fork(
            _backward_item, threads, split + dweight_items,
            (split, dinp, dweight, dbias, dout, packed_inp, weight, pre_gelu, k, kc, row_block, col_block,
             accumulate or k > 0, scratch),
        )  # fmt: skip
