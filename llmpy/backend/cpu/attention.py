"""Causal self-attention, tile by tile.     B batch, T time, NH heads, NKV key/value heads, HS head size, scale 1/√HS

forward    S = scale·Q·Kᵗ, causal      lse := log Σ_k e^S      out := e^(S − lse)·V
backward   P  = e^(S − lse)            D   = Σ_c dout·out      (one number per row)
           dS = P∘(dout·Vᵗ − D)·scale
           dQ := dS·K      dK := Σ dSᵗ·Q      dV := Σ Pᵗ·dout      over the NH/NKV heads that share K and V

A row of qkv holds NH queries, NKV keys and NKV values, W = (NH + 2·NKV)·HS columns. `positions`, or (0, 0) for none,
separates documents in a row: query t attends to keys t − positions[b, t] … t.

The T × T matrix is never stored. A tile of TILE_Q queries meets tiles of TILE_K keys; tiles above the diagonal or of
earlier documents are skipped. Forward keeps a running maximum and sum per query, and rescales them when the maximum
grows (Dao et al. 2022). Backward recomputes P from `stats`, which is lse. It takes one tile of keys at a time, so that
its dK and dV stay in cache, and sums them over QUERIES rows at once. Powers are of 2, with log₂e folded into the scale:
that saves the range reduction of e.

One item is one head of one sequence in forward, one key/value head in backward, so sums have a fixed order. Operands
are packed once into panels for the microkernel; a tile of S and P stays in L1/L2. Scores and sums are float32; P and dS
take the type of qkv as operands.
"""

from __future__ import annotations

import math

import numpy as np
from numba.extending import overload

from .activation import LOG2_E, exp2
from .gemm import multiply_panel, pack_columns, pack_rows, pack_transposed, panel_width, words
from .jit import fork, inline, kernel
from .simd import (
    ADD,
    BF16,
    HOST,
    LANES,
    MOST_BLOCK,
    MOST_ROWS,
    MR,
    NR,
    WRITE,
    address,
    block,
    configure,
    f32,
    fma,
    from_rank,
    larger,
    per_word,
    tile_rows,
    to,
    to_rank,
    typed,
    write_operands,
)

TILE_Q = -(-48 // MR) * MR
TILE_K = -(-96 // NR) * NR
QUERIES = 4 * TILE_Q  # rows summed into dK and dV at once, whole tiles: with one, start and end would dominate
BLOCKS_Q = 64 if HOST.tiles else TILE_Q  # TILE_Q in whole blocks of `amx`: P and dS are packed tile by tile
STRIPS = QUERIES * (TILE_K + MOST_ROWS)  # floats of QUERIES rows of P or dS, packed by columns
COLUMN = np.arange(TILE_K, dtype=np.int32)  # as wide as a score, so that comparisons fill whole vectors
MINUS_INFINITY = np.float32(-np.inf)
LOWEST = np.finfo(np.float32).min  # a maximum of no scores: unlike −∞, it can be subtracted from −∞
HIDDEN = np.full(BLOCKS_Q, MINUS_INFINITY)


def scratch_size(T: int, HS: int, group: int) -> int:
    """Return floats of scratch per thread for T tokens, heads of HS and `group` heads per key/value head.

    float32 leaves tiles of P and dS unused.
    """
    operands = 2 * (T + LANES) * max(HS, MOST_BLOCK) + 3 * (T + MOST_BLOCK) * (HS + LANES)
    sums = T * HS + 2 * (TILE_K if group == 1 else max(T, TILE_K)) * HS + 2 * T
    tiles = 4 * BLOCKS_Q * TILE_K + 2 * STRIPS
    return operands + sums + tiles + MOST_ROWS * (max(HS, TILE_K, QUERIES) + NR)


@inline
def _tile_q(like):
    """Return the rows of a tile of queries."""
    return TILE_Q if block(like) == 1 else BLOCKS_Q


@inline
def _cut(cols):
    """Return the panel width for `cols` columns: few panels of about equal width, since narrow ones are slow."""
    panels = (cols + NR - 1) // NR
    return (cols + panels * LANES - 1) // (panels * LANES) * LANES


@inline
def _pack_turned(packed, matrix, first, T, col, HS):
    """Pack T rows of one head, transposed; the panel that starts at row k is at packed[k·words(HS)]."""
    width = _cut(min(T, TILE_K))
    for k in range(0, T, width):
        pack_transposed(packed[k * words(matrix, HS) :], matrix, first + k, col, HS, min(width, T - k))


@inline
def _pack_lying(packed, matrix, first, T, col, HS):
    """Pack T rows of one head, not transposed; the panel that starts at column c is at packed[c·words(T)]."""
    width = _cut(HS)
    for c in range(0, HS, width):
        pack_rows(packed[c * words(matrix, T) :], matrix, first, col + c, T, min(width, HS - c))


@inline
def _scores(tile, matrix, row, col, turned, first_key, last_key, T, rows, HS, edge):
    """tile (rows, TILE_K) := rows of one head · turned rowsᵗ, for the panels that start before last_key."""
    ld, size = matrix.shape[1], 4 // per_word(matrix)
    a = address(matrix) + size * (row * ld + col)
    width = _cut(min(T, TILE_K))
    for k in range(first_key, min(last_key, T), width):
        c, panel = address(tile) + 4 * (k - first_key), turned[k * words(matrix, HS) :]
        multiply_panel(c, TILE_K, matrix, a, size * ld, panel, rows, min(width, T - k), HS, WRITE, edge)


@inline
def _weighted(sums, like, a, rs_a, lying, first, T, rows, HS, depth, edge):
    """sums (rows, HS) += A (rows, depth) · lying rows first … first + depth.  For a, rs_a see `microkernel`."""
    width = _cut(HS)
    for col in range(0, HS, width):
        cols = min(width, HS - col)
        panel = lying[col * words(like, T) + first // per_word(like) * panel_width(cols) :]
        multiply_panel(address(sums) + 4 * col, HS, like, a, rs_a, panel, rows, cols, depth, ADD, edge)


@inline
def _whole_words(like, count):
    """Return `count` rounded up to whole blocks of words; rows after the last are zeros."""
    return words(like, count) * per_word(like)


def operand_tile(tile, room, like):
    """Return where a tile becomes an operand of products with `like`: in place, or in other scratch."""
    raise NotImplementedError("for kernels")


@overload(operand_tile)
def _operand_tile(tile, room, like):
    if like.dtype == BF16:
        return lambda tile, room, like: typed(room, like)[: tile.size].reshape(tile.shape)
    return lambda tile, room, like: tile


@inline
def _to_operands(out, line):
    """out (TILE_K,) := line; a no-op if out is line."""
    if per_word(out) > 1:
        for j in range(0, TILE_K, LANES):
            write_operands(out, address(out) + 4 // per_word(out) * j, address(line) + 4 * j)


@inline
def _scale_of_powers(HS):
    """Return scale·log₂e, rounded once, so that forward and backward get the same P."""
    return np.float32(LOG2_E / math.sqrt(HS))


@inline
def _softmax_tile(s, p, sums, top, total, row, first_key, rows, HS):
    """p := 2^(scale·log₂e·s − running maximum), 0 above the diagonal; rescales sums (rows, HS) and total.

    Loops cover whole tiles, a constant length; scores above the diagonal are set to −∞.
    """
    scale = _scale_of_powers(HS)
    for i in range(rows):
        valid = np.int32(row + i + 1 - first_key)
        line, weight = s[i], p[i]
        if valid < TILE_K:
            for j in range(TILE_K):
                line[j] = line[j] if COLUMN[j] < valid else MINUS_INFINITY
        rank = to_rank(MINUS_INFINITY)
        for j in range(TILE_K):
            rank = larger(rank, to_rank(line[j]))
        highest = from_rank(rank) * scale
        if highest < top[i]:
            highest = top[i]
        summed = np.float32(0)
        for j in range(TILE_K):
            line[j] = exp2(fma(line[j], scale, -highest))  # the same in `decode`: see `jit.FASTMATH`
            summed += line[j]
        _to_operands(weight, line)
        if highest != top[i]:
            shrink = exp2(top[i] - highest)
            total[i] *= shrink
            acc = sums[i * HS : (i + 1) * HS]
            for c in range(HS):
                acc[c] *= shrink
            top[i] = highest
        total[i] += summed


@inline
def _hide_earlier(tile, fill, positions, row, first_key, rows):
    """tile[i] := fill[i] for keys before the document of query row + i; positions (≥rows,) starts at that of `row`."""
    for i in range(rows):
        start = np.int32(row + i - positions[i] - first_key)
        if start > 0:
            line, value = tile[i], fill[i]
            for j in range(TILE_K):
                line[j] = value if COLUMN[j] < start else line[j]


@inline
def _forward_item(worker, item, out, stats, qkv, positions, scratch):
    NH, T = stats.shape[1], stats.shape[2]
    HS = out.shape[1] // NH
    NKV = (qkv.shape[1] // HS - NH) // 2
    b, h = item // NH, item % NH
    first, col, key = b * T, h * HS, NH + h // (NH // NKV)
    documents, most = positions.size > 0, _tile_q(qkv)
    tile = most * TILE_K
    turned, lying = (T + LANES) * max(HS, block(qkv)), (T + block(qkv)) * (HS + LANES)
    mine = scratch[worker]
    keys, mine = mine[:turned], mine[turned:]
    values, mine = mine[:lying], mine[lying:]
    s, mine = mine[:tile].reshape((most, TILE_K)), mine[tile:]
    p, mine = operand_tile(s, mine[:tile], qkv), mine[tile:]
    sums, mine = mine[: most * HS], mine[most * HS :]
    top, total, edge = mine[:most], mine[most : 2 * most], mine[2 * most :]
    size = 4 // per_word(qkv)
    configure(qkv, tile_rows(qkv))
    _pack_turned(keys, qkv, first, T, key * HS, HS)
    _pack_lying(values, qkv, first, T, (key + NKV) * HS, HS)
    for q in range(0, T, most):
        rows = min(most, T - q)
        top[:] = LOWEST if documents else MINUS_INFINITY
        total[:] = 0
        sums[:] = 0
        start = (q - positions[b, q]) // TILE_K * TILE_K if documents else 0
        for k in range(start, q + rows, TILE_K):
            depth = _whole_words(qkv, min(TILE_K, q + rows - k))
            _scores(s, qkv, first + q, col, keys, k, k + depth, T, rows, HS, edge)
            if documents:
                _hide_earlier(s, HIDDEN, positions[b, q:], q, k, rows)
            _softmax_tile(s, p, sums, top, total, q, k, rows, HS)
            _weighted(sums, qkv, address(p), size * TILE_K, values, k, T, rows, HS, depth, edge)
        for i in range(rows):
            inverse = np.float32(1) / total[i]
            line, acc = out[first + q + i, col : col + HS], sums[i * HS : (i + 1) * HS]
            for c in range(HS):
                line[c] = to(line, acc[c] * inverse)
            stats[b, h, q + i] = (top[i] + np.float32(math.log2(total[i]))) / LOG2_E


@kernel
def attention_forward(
    threads,    # int
    out,        # (BT, NH·HS) :=
    stats,      # (B, NH, T) f32 := log-sum-exp
    qkv,        # (BT, W)
    positions,  # (B, T) i32, or (0, 0) for one document
    scratch,    # (threads, ≥ scratch_size) f32
):  # fmt: skip
    fork(_forward_item, threads, stats.shape[0] * stats.shape[1], (out, stats, qkv, positions, scratch))


@inline
def _gradient_tile(s, ds, p, dp, lse, d, row, first_key, rows, HS):
    """From raw scores s and ds = dout·Vᵗ: p := P and dp := dS, both 0 above the diagonal. lse is in base 2."""
    scale, scale_2 = np.float32(1.0 / math.sqrt(HS)), _scale_of_powers(HS)
    for i in range(rows):
        valid = np.int32(row + i + 1 - first_key)
        line, dline, weight, dweight, shift, mean = s[i], ds[i], p[i], dp[i], lse[i], d[i]
        if valid < TILE_K:
            for j in range(TILE_K):
                line[j] = line[j] if COLUMN[j] < valid else MINUS_INFINITY
                dline[j] = dline[j] if COLUMN[j] < valid else mean
        for j in range(TILE_K):
            line[j] = exp2(fma(line[j], scale_2, -shift))
            dline[j] = line[j] * (dline[j] - mean) * scale
        _to_operands(weight, line)
        _to_operands(dweight, dline)


@inline
def _write_out(matrix, row, col, sums, rows, HS):
    """matrix[row : row + rows, col : col + HS] := sums (rows, HS)."""
    for i in range(rows):
        line, acc = matrix[row + i, col : col + HS], sums[i * HS : (i + 1) * HS]
        for c in range(HS):
            line[c] = to(line, acc[c])


@inline
def _end_of_readers(positions, b, after, T, most):
    """Return the end of the query tiles that see keys before `after`, the end of a tile of keys."""
    if positions.size > 0:
        for t in range(after, T):
            if t - positions[b, t] >= after:
                return min(T, (t + most - 1) // most * most)
    return T


@inline
def _backward_item(worker, item, dqkv, dout, qkv, out, stats, positions, scratch):
    NH, T = stats.shape[1], stats.shape[2]
    HS = out.shape[1] // NH
    NKV = (qkv.shape[1] // HS - NH) // 2
    group, b, key = NH // NKV, item // NKV, item % NKV
    first, key_col, value_col = b * T, (NH + key) * HS, (NH + NKV + key) * HS
    most = _tile_q(qkv)
    turned, lying, tile = (T + LANES) * max(HS, block(qkv)), (T + block(qkv)) * (HS + LANES), most * TILE_K
    kept = (TILE_K if group == 1 else T) * HS  # sums of all tiles of keys, from one head to the next
    mine = scratch[worker]
    keys_t, values_t, mine = mine[:turned], mine[turned : 2 * turned], mine[2 * turned :]
    queries, keys, mine = mine[:lying], mine[lying : 2 * lying], mine[2 * lying :]
    douts, mine = mine[:lying], mine[lying:]
    dq, mine = mine[: T * HS], mine[T * HS :]
    dks, dvs, mine = mine[:kept], mine[kept : 2 * kept], mine[2 * kept :]
    s, ds = mine[:tile].reshape((most, TILE_K)), mine[tile : 2 * tile].reshape((most, TILE_K))
    mine = mine[2 * tile :]
    p, mine = operand_tile(s, mine[:tile], qkv), mine[tile:]
    dp, mine = operand_tile(ds, mine[:tile], qkv), mine[tile:]
    dp_turned, p_turned, mine = mine[:STRIPS], mine[STRIPS : 2 * STRIPS], mine[2 * STRIPS :]
    lse, d, edge = mine[:T], mine[T : 2 * T], mine[2 * T :]
    size, R = 4 // per_word(qkv), tile_rows(qkv)
    configure(qkv, R)
    _pack_turned(keys_t, qkv, first, T, key_col, HS)
    _pack_turned(values_t, qkv, first, T, value_col, HS)
    _pack_lying(keys, qkv, first, T, key_col, HS)
    for h in range(key * group, (key + 1) * group):
        col = h * HS
        _pack_lying(queries, qkv, first, T, col, HS)
        _pack_lying(douts, dout, first, T, col, HS)
        for t in range(T):
            lse[t] = stats[b, h, t] * LOG2_E
            inner = np.float32(0)
            line, dline = out[first + t, col : col + HS], dout[first + t, col : col + HS]
            for c in range(HS):
                inner += f32(dline[c]) * f32(line[c])
            d[t] = inner
        dq[:] = 0
        for k in range(0, T, TILE_K):
            some = min(TILE_K, T - k)
            at = 0 if group == 1 else k * HS
            dk, dv = dks[at : at + TILE_K * HS], dvs[at : at + TILE_K * HS]
            if h == key * group:
                dk[:] = 0
                dv[:] = 0
            end = _end_of_readers(positions, b, k + some, T, most)
            for q in range(k // most * most, end, QUERIES):
                together = min(QUERIES, end - q)
                total = words(qkv, together)
                for half in range(q, q + together, most):
                    rows, start = min(most, T - half), (half - q) // per_word(qkv) * R
                    depth = _whole_words(qkv, min(TILE_K, half + rows - k))
                    _scores(s, qkv, first + half, col, keys_t, k, k + depth, T, rows, HS, edge)
                    _scores(ds, dout, first + half, col, values_t, k, k + depth, T, rows, HS, edge)
                    if positions.size > 0:
                        _hide_earlier(s, HIDDEN, positions[b, half:], half, k, rows)
                        _hide_earlier(ds, d[half:], positions[b, half:], half, k, rows)
                    _gradient_tile(s, ds, p, dp, lse[half:], d[half:], half, k, rows, HS)
                    _weighted(dq[half * HS :], qkv, address(dp), size * TILE_K, keys, k, T, rows, HS, depth, edge)
                    pack_columns(dp_turned[start:], dp, 0, 0, rows, some, total)
                    pack_columns(p_turned[start:], p, 0, 0, rows, some, total)
                _add_turned(dk, qkv, dp_turned, queries, q, T, some, HS, together, edge)
                _add_turned(dv, qkv, p_turned, douts, q, T, some, HS, together, edge)
            if h == key * group + group - 1:
                _write_out(dqkv, first + k, key_col, dk, some, HS)
                _write_out(dqkv, first + k, value_col, dv, some, HS)
        _write_out(dqkv, first, col, dq, T, HS)


@inline
def _add_turned(sums, like, strips, lying, q, T, keys, HS, rows, edge):
    """sums (keys, HS) += (rows, keys)ᵗ, packed by `pack_columns`, · lying rows q … q + rows."""
    R, total = tile_rows(like), words(like, rows)
    for i in range(0, keys, R):
        a, some = address(strips) + 4 * i * total, min(R, keys - i)
        _weighted(sums[i * HS :], like, a, None, lying, q, T, some, HS, total * per_word(like), edge)


@kernel
def attention_backward(
    threads,    # int
    dqkv,       # (BT, W) :=
    dout,       # (BT, NH·HS)
    qkv,        # (BT, W)
    out,        # (BT, NH·HS)
    stats,      # (B, NH, T) f32
    positions,  # (B, T) i32, or (0, 0) for one document
    scratch,    # (threads, ≥ scratch_size) f32
):  # fmt: skip
    key_heads = (qkv.shape[1] // (out.shape[1] // stats.shape[1]) - stats.shape[1]) // 2
    fork(_backward_item, threads, stats.shape[0] * key_heads, (dqkv, dout, qkv, out, stats, positions, scratch))
