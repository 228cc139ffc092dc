"""Kernels of decoding: products of few rows with packed weights, and attention of one query over a cache.

    packed    weight (OC, C) → panels of NR outputs, each (words, width) as `gemm` packs it, one after another
    linear    out (BT, OC) := inp · weightᵀ + bias, or GELU or SwiGLU of that; each panel is streamed once for all rows
    attention one query per sequence and head meets keys and values 0 … t of its cache, tile by tile as in training;
              heads that share keys and values read them together

Memory-bound: a token costs one pass over all weights. Packed, they are one stream at full bandwidth; unpacked,
transposing them in registers took as long as reading them (dev/LOG.md).

Every sum has the order of the training kernels: along k, from zero, cut at KC, then added, or continued from what C
holds where `amx` multiplies; softmax by the same tiles. A row is bitwise identical here and in a full forward pass,
whatever other rows the batch holds, on every instruction set.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import overload

from . import amx
from .activation import activate, gelu
from .attention import MINUS_INFINITY, TILE_K, _softmax_tile, operand_tile
from .gemm import depth, pack_rows, pack_transposed, panel_width, whole_tile, words, write_tile
from .jit import fork, inline, intrinsic, kernel
from .simd import (
    BF16,
    F32,
    HOST,
    I8,
    I64,
    IN_L2,
    LANES,
    MOST_BLOCK,
    MOST_ROWS,
    MR,
    NR,
    NV,
    VECTOR,
    _at,
    _dot_add,
    _load,
    _multiply_add,
    _multiply_tiles,
    _prefetch,
    _splat,
    _store,
    address,
    block,
    f32,
    per_word,
    tile_rows,
    to,
    typed,
)

ZERO = np.float32(0)
TILE = MOST_ROWS * NR
LINEAR_SCRATCH = 2 * TILE + MOST_ROWS * MOST_BLOCK  # floats per thread
AHEAD = 4096  # words from a load of B to the prefetch, which keeps a core reading (dev/LOG.md#read-ahead)
TILES_AHEAD = 3072  # bytes, into L1, for tiles


def attention_scratch(HS: int, group: int) -> int:
    """Return floats of scratch per thread for heads of HS, `group` per key/value head."""
    return NR * max(HS, TILE_K) + group * (2 * TILE_K + NR + HS + max(HS, MOST_BLOCK) + 3)


def packed_words(OC: int, C: int, per: int) -> int:
    """Return the words of a packed weight (OC, C), `per` elements per word, in whole vectors and blocks."""
    K = MOST_BLOCK if per > 1 else 1
    return -(-OC // LANES) * LANES * -(-C // (per * K)) * K


@intrinsic
def multiply_rows(
    typingctx: Any, like: Any, rows: Any, nv: Any, c: Any, rs_c: Any, a: Any, rs_a: Any, b: Any, rs_b: Any, words: Any
) -> Any:
    """C (rows, nv·LANES) += A (rows, words) · B (words, nv·LANES); each sum starts from the value in C.

    1 ≤ rows ≤ `tile_rows(like)`, 1 ≤ nv ≤ NV, words ≥ 1 in whole blocks. a, b and c are addresses; rs_a in bytes, rs_b
    and rs_c in words. C is float32; `like` is any array of the operands' type, as in `simd.microkernel`.
    """
    i64 = types.int64
    multiply = _dot_add if like.dtype == BF16 else _multiply_add

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        _, rows, nv, c, rs_c, a, rs_a, b, rs_b, words = args
        if like.dtype == BF16 and HOST.tiles:

            def read_ahead(count: int, block: Any, b: Any) -> None:
                for line in range(count * amx.ROWS):
                    _prefetch(bd, _at(bd, bd.add(b, I64(TILES_AHEAD + amx.WIDTH * line))))

            amx.configure(bd, rows)
            step_a, adding = I64(amx.WIDTH), ir.IntType(1)(1)
            _multiply_tiles(bd, nv, c, rs_c, a, rs_a, step_a, b, words, adding, read_ahead)
            return context.get_dummy_value()
        a, b, c = _at(bd, a, I8), _at(bd, b), _at(bd, c)
        finish = bd.append_basic_block("finish")
        choice = bd.switch(bd.add(bd.mul(rows, I64(NV + 1)), nv), finish)
        for m, n in ((m, n) for m in range(1, MR + 1) for n in range(1, NV + 1)):
            block, loop, end = (bd.append_basic_block(f"{name}{m}x{n}") for name in ("tile", "k", "done"))
            choice.add_case(I64(m * (NV + 1) + n), block)
            bd.position_at_end(block)
            rows_a = [bd.bitcast(bd.gep(a, [bd.mul(rs_a, I64(i))]), F32.as_pointer()) for i in range(m)]
            rows_c = [bd.gep(c, [bd.mul(rs_c, I64(i))]) for i in range(m)]
            start = [_load(bd, rows_c[i], I64(LANES * j)) for i in range(m) for j in range(n)]
            bd.branch(loop)
            bd.position_at_end(loop)
            k, row_b = bd.phi(I64), bd.phi(F32.as_pointer())
            before = [bd.phi(VECTOR) for _ in start]
            vectors = [_load(bd, row_b, I64(LANES * j)) for j in range(n)]
            after = []
            for j in range(n):
                _prefetch(bd, bd.gep(row_b, [I64(AHEAD + LANES * j)]), IN_L2)
            for i in range(m):
                scalar = bd.load(bd.gep(rows_a[i], [k]))
                scalar.align = 2
                broadcast = _splat(bd, scalar)
                after += [multiply(bd, broadcast, vectors[j], before[i * n + j]) for j in range(n)]
            next_k, next_b = bd.add(k, I64(1)), bd.gep(row_b, [rs_b])
            for phi, first, then in zip(
                (k, row_b, *before), (I64(0), b, *start), (next_k, next_b, *after), strict=True
            ):
                phi.add_incoming(first, block)
                phi.add_incoming(then, loop)
            bd.cbranch(bd.icmp_signed("<", next_k, words), loop, end)
            bd.position_at_end(end)
            for i in range(m):
                for j in range(n):
                    _store(bd, after[i * n + j], rows_c[i], I64(LANES * j))
            bd.branch(finish)
        bd.position_at_end(finish)
        return context.get_dummy_value()

    return types.void(like, i64, i64, i64, i64, i64, i64, i64, i64, i64), codegen


def as_words(array):
    """Return a flat array of stored numbers as float32 words: the inverse of `simd.typed`."""
    raise NotImplementedError("for kernels")


@overload(as_words)
def _as_words(array):
    if array.dtype == BF16:
        return lambda array: array.view(np.float32)
    return lambda array: array


@inline
def _pack_item(worker, item, packed, weight):
    OC, C = weight.shape
    col = item * NR
    pack_transposed(as_words(packed)[col * words(weight, C) :], weight, col, 0, C, min(NR, OC - col))


@kernel
def pack(
    threads,  # int
    packed,   # (2·packed_words,) or (packed_words,) :=
    weight,   # (OC, C)
):  # fmt: skip
    fork(_pack_item, threads, (weight.shape[0] + NR - 1) // NR, (packed, weight))


@inline
def start_sums(sums, bias, col, rows, cols):
    """sums (rows, width of cols) := bias[col : col + cols], or 0 without a bias; it has room for NR − 1 more."""
    width = panel_width(cols)
    for i in range(rows):
        for j in range(NR):
            sums[i * width + j] = ZERO
        if bias.size > 0:
            for j in range(cols):
                sums[i * width + j] = bias[col + j]


@inline
def write_sums(out, pre, row, col, rows, cols, sums, part):
    """out[row : row + rows, col : col + cols] := sums (rows, width of cols), or with `pre` that, and out := its GELU.

    part: scratch of NR.
    """
    width = panel_width(cols)
    for i in range(rows):
        tile = sums[i * width : i * width + NR]
        if pre.size > 0:
            write_tile(pre, row + i, col, tile, 1, cols)
            for j in range(NR):  # constant length, for whole vectors
                part[j] = gelu(f32(to(pre, tile[j])))
            tile = part
        write_tile(out, row + i, col, tile, 1, cols)


@inline
def _linear_item(worker, item, out, pre, inp, packed, bias, scratch):
    BT, C = inp.shape
    OC, R, K = out.shape[1], tile_rows(inp), block(inp)
    col = item * NR
    cols, total, per = min(NR, OC - col), words(inp, C), per_word(inp)
    width, size = panel_width(cols), 4 // per
    panel = address(packed) + 4 * col * total
    sums, part, last = scratch[worker, :TILE], scratch[worker, TILE : 2 * TILE], scratch[worker, 2 * TILE :]
    into = sums if K > 1 else part  # tiles of `amx` continue sums; others start from 0 at every cut
    for row in range(0, BT, R):
        rows = min(R, BT - row)
        start_sums(sums, bias, col, rows, cols)
        for k in range(0, C, depth(inp)):
            kc = min(depth(inp), C - k)
            whole = kc // (per * K) * K
            a, b = address(inp) + size * (row * C + k), panel + 4 * width * (k // per)
            if K == 1:
                part[: rows * NR] = ZERO
            if whole > 0:
                multiply_rows(inp, rows, width // LANES, address(into), width, a, size * C, b, width, whole)
            if whole * per < kc:  # part of a block: the next element in memory is not part of this row
                tail, rs_tail = whole_tile(last, inp, a + 4 * whole, size * C, rows, kc - whole * per)
                b += 4 * width * whole
                multiply_rows(inp, rows, width // LANES, address(into), width, tail, rs_tail, b, width, K)
            if K == 1:
                for i in range(rows * width):
                    sums[i] += part[i]
        write_sums(out, pre, row, col, rows, cols, sums, part)


@kernel
def packed_linear_forward(
    threads,   # int
    out,       # (BT, OC) :=
    pre,       # (BT, OC) or (BT, 2·OC) :=, or (0, 0) for none
    inp,       # (BT, C)
    packed,    # weight (columns of pre, C), from `pack`
    bias,      # (columns of pre,) f32, or (0,) for none
    scratch,   # (threads, ≥ LINEAR_SCRATCH) f32
):  # fmt: skip
    paired = pre.shape[1] > out.shape[1]
    sums, before = (pre, pre[:0]) if paired else (out, pre)
    fork(_linear_item, threads, (sums.shape[1] + NR - 1) // NR, (sums, before, inp, packed, bias, scratch))
    if paired:  # panels of gate and up start at different columns; few rows are one item, without helpers
        activate(threads, out, pre)


@inline
def _multiply_few(like, c, rs_c, a, rs_a, panel, rows, cols, depth):
    """C (rows, cols) += A (rows, depth) · panel (words, width of cols).

    c and a are addresses, rs_c in floats, rs_a in bytes.
    """
    width = panel_width(cols)
    R = tile_rows(like)
    for i in range(0, rows, R):
        some, b = min(R, rows - i), address(panel)
        multiply_rows(
            like, some, width // LANES, c + 4 * i * rs_c, rs_c, a + i * rs_a, rs_a, b, width, words(like, depth)
        )


@inline
def _attention_item(worker, item, out, cache, qkv, slots, positions, scratch):
    NKV, HS = cache.shape[1], cache.shape[4]
    group = out.shape[1] // HS // NKV
    row, key = item // NKV, item % NKV
    keys, values, t = cache[slots[row], key, 0], cache[slots[row], key, 1], positions[row]
    first, key_col, value_col = key * group * HS, (NKV * group + key) * HS, (NKV * (group + 1) + key) * HS
    length, per = words(qkv, HS), per_word(qkv)
    size = 4 // per
    mine = scratch[worker]
    panel, mine = mine[: NR * max(HS, TILE_K)], mine[NR * max(HS, TILE_K) :]
    scores, mine = mine[: group * TILE_K], mine[group * TILE_K :]
    s = scores.reshape((group, TILE_K))
    p, mine = operand_tile(s, mine[: group * TILE_K], qkv), mine[group * TILE_K :]
    part, mine = mine[: group * NR], mine[group * NR :]
    top, total, mine = mine[:group], mine[group : 2 * group], mine[2 * group :]
    sums, queries = mine[: group * HS], mine[group * HS : group * (HS + length)]
    for c in range(HS):
        keys[t, c] = qkv[row, key_col + c]
        values[t, c] = qkv[row, value_col + c]
    # A copy, so that a final half word pairs with a zero.
    q = typed(queries, qkv)
    for i in range(group):
        line, head = q[i * length * per : (i + 1) * length * per], qkv[row, first + i * HS :]
        for c in range(HS):  # assigning an array compiles for two seconds: Numba formats its errors
            line[c] = head[c]
        line[HS:] = 0
    sums[:] = ZERO
    top[:] = MINUS_INFINITY
    total[:] = ZERO
    for k in range(0, t + 1, TILE_K):
        n = min(TILE_K, t + 1 - k)
        scores[:] = ZERO
        for j in range(0, n, NR):
            # Whole vectors: this covers some later keys, which softmax masks.
            cols = min(panel_width(n - j), keys.shape[0] - k - j)
            pack_transposed(panel, keys, k + j, 0, HS, cols)
            _multiply_few(qkv, address(s) + 4 * j, TILE_K, address(q), 4 * length, panel, group, cols, HS)
        for i in range(group):
            _softmax_tile(s[i : i + 1], p[i : i + 1], sums[i * HS :], top[i:], total[i:], t, k, 1, HS)
        for c in range(0, HS, NR):
            cols = min(NR, HS - c)
            pack_rows(panel, values, k, c, n, cols)
            part[:] = ZERO
            if block(qkv) > 1:  # as in `_linear_item`; whole vectors of part, since cols may be fewer
                for i in range(group):
                    for j in range(cols):
                        part[i * NR + j] = sums[i * HS + c + j]
            _multiply_few(qkv, address(part), NR, address(p), size * TILE_K, panel, group, cols, n)
            for i in range(group):
                acc, more = sums[i * HS + c : i * HS + c + cols], part[i * NR :]
                for j in range(cols):
                    acc[j] = more[j] if block(qkv) > 1 else acc[j] + more[j]
    for i in range(group):
        inverse = np.float32(1) / total[i]
        line, acc = out[row, first + i * HS : first + (i + 1) * HS], sums[i * HS : (i + 1) * HS]
        for c in range(HS):
            line[c] = to(line, acc[c] * inverse)


@kernel
def attention_decode(
    threads,    # int
    out,        # (B, NH·HS) :=
    cache,      # (≥B, NKV, 2, S, HS) keys and values; position t of each slot :=
    qkv,        # (B, W)
    slots,      # (B,) i32, sequence of each row
    positions,  # (B,) i32, t < S
    scratch,    # (threads, ≥ attention_scratch) f32
):  # fmt: skip
    fork(_attention_item, threads, out.shape[0] * cache.shape[1], (out, cache, qkv, slots, positions, scratch))
