"""Causal self-attention, tile by tile.     B batch, T time, NH heads, HS head size, scale 1/√HS

forward    S = scale·Q·Kᵗ, causal      lse := log Σ_k e^S      out := e^(S − lse)·V
backward   P  = e^(S − lse)            D   = Σ_c dout·out      (one number a row)
           dS = P∘(dout·Vᵗ − D)·scale
           dQ := dS·K      dK := dSᵗ·Q      dV := Pᵗ·dout

The T × T matrix never exists: a tile of TILE_Q queries meets tiles of TILE_K keys, and the forward pass
keeps a running maximum and sum for each query, rescaling what it has when the maximum grows (Dao et
al. 2022). `stats` is lse, all that backward needs to make P again. Tiles above the diagonal are skipped.

One item is one head of one sequence: its sums have one order. Its operands are packed once into panels
for the microkernel; a tile of S and P stays in L1/L2.
"""

from __future__ import annotations

import math

import numpy as np

from .gelu import exp
from .gemm import multiply_panel, pack_rows, pack_transposed, panel_width
from .jit import fork, inline, kernel
from .simd import LANES, MR, NR, address, maximum

TILE_Q = -(-64 // MR) * MR
TILE_K = -(-96 // NR) * NR
MINUS_INFINITY = np.float32(-np.inf)


def scratch_size(T: int, HS: int) -> int:
    """Floats that each thread needs for a sequence of T and heads of HS."""
    columns = T + LANES  # a row of Kᵗ or Vᵗ, its last panel rounded up
    packed = 2 * columns * HS + 3 * T * (HS + LANES)
    tiles = 2 * TILE_Q * TILE_K + TILE_Q * HS + 3 * TILE_Q
    return packed + tiles + MR * max(HS, TILE_K, TILE_Q) + MR * NR


@inline
def _pack_keys(packed, matrix, first, T, col, HS):
    """Rows of one head, transposed: the panel of keys k … k + NR starts at packed[k·HS]."""
    for k in range(0, T, NR):
        pack_transposed(packed[k * HS :], matrix, first + k, col, HS, min(NR, T - k))


@inline
def _pack_values(packed, matrix, first, T, col, HS):
    """Rows of one head as they lie: the panel of columns c … c + NR starts at packed[c·T]."""
    for c in range(0, HS, NR):
        pack_rows(packed[c * T :], matrix, first, col + c, T, min(NR, HS - c))


@inline
def _scores(tile, matrix, row, col, keys, first_key, last_key, T, rows, HS, edge):
    """tile (rows, TILE_K) := matrix rows · keysᵗ, for the panels that begin before last_key."""
    ld = matrix.shape[1]
    a = address(matrix) + 4 * (row * ld + col)
    for k in range(first_key, last_key, NR):
        c = address(tile) + 4 * (k - first_key)
        multiply_panel(c, TILE_K, a, ld, 1, keys[k * HS :], rows, min(NR, T - k), HS, False, edge)


@inline
def _weighted(c, rs_c, a, rs_a, cs_a, values, first, T, rows, HS, depth, add, edge):
    """C (rows, HS) (+)= A (rows, depth) · packed values[first : first + depth]; c and a are addresses."""
    for col in range(0, HS, NR):
        cols = min(NR, HS - col)
        panel = values[col * T + first * panel_width(cols) :]
        multiply_panel(c + 4 * col, rs_c, a, rs_a, cs_a, panel, rows, cols, depth, add, edge)


@inline
def _softmax_tile(s, acc, top, total, row, first_key, keys, rows, HS, scale):
    """s := e^(scale·s − running maximum), 0 above the diagonal; rescales acc (rows, HS) and total."""
    for i in range(rows):
        valid = min(keys, row + i + 1 - first_key)
        if valid > 0:
            line = s[i]
            highest = top[i]
            for j in range(valid):
                highest = maximum(highest, line[j] * scale)
            shrink = exp(top[i] - highest)
            summed = np.float32(0)
            for j in range(valid):
                p = exp(line[j] * scale - highest)
                line[j] = p
                summed += p
            total[i] = total[i] * shrink + summed
            top[i] = highest
            for c in range(HS):
                acc[i, c] *= shrink
        for j in range(max(0, valid), keys):
            s[i, j] = 0


@inline
def _forward_item(worker, item, out, stats, qkv, scratch):
    NH, T = stats.shape[1], stats.shape[2]
    C = out.shape[1]
    HS = C // NH
    b, h = item // NH, item % NH
    first, col = b * T, h * HS
    scale = np.float32(1.0 / math.sqrt(HS))
    mine = scratch[worker]
    keys, mine = mine[: (T + LANES) * HS], mine[(T + LANES) * HS :]
    values, mine = mine[: T * (HS + LANES)], mine[T * (HS + LANES) :]
    s, mine = mine[: TILE_Q * TILE_K].reshape((TILE_Q, TILE_K)), mine[TILE_Q * TILE_K :]
    acc, mine = mine[: TILE_Q * HS].reshape((TILE_Q, HS)), mine[TILE_Q * HS :]
    top, total, edge = mine[:TILE_Q], mine[TILE_Q : 2 * TILE_Q], mine[2 * TILE_Q :]
    _pack_keys(keys, qkv, first, T, C + col, HS)
    _pack_values(values, qkv, first, T, 2 * C + col, HS)
    for q in range(0, T, TILE_Q):
        rows = min(TILE_Q, T - q)
        for i in range(rows):
            top[i] = MINUS_INFINITY
            total[i] = 0
            for c in range(HS):
                acc[i, c] = 0
        for k in range(0, q + rows, TILE_K):
            depth = min(TILE_K, q + rows - k)
            _scores(s, qkv, first + q, col, keys, k, k + depth, T, rows, HS, edge)
            _softmax_tile(s, acc, top, total, q, k, depth, rows, HS, scale)
            _weighted(address(acc), HS, address(s), TILE_K, 1, values, k, T, rows, HS, depth, True, edge)
        for i in range(rows):
            inverse = np.float32(1) / total[i]
            line = out[first + q + i, col : col + HS]
            for c in range(HS):
                line[c] = acc[i, c] * inverse
            stats[b, h, q + i] = top[i] + np.float32(math.log(total[i]))


@kernel
def attention_forward(
    threads,  # int
    out,      # (BT, C) f32 :=
    stats,    # (B, NH, T) f32 := log-sum-exp
    qkv,      # (BT, 3C)
    scratch,  # (threads, ≥ scratch_size)
):  # fmt: skip
    fork(_forward_item, threads, stats.shape[0] * stats.shape[1], (out, stats, qkv, scratch))


@inline
def _gradient_tile(s, dp, lse, d, row, first_key, keys, rows, scale):
    """From raw scores s and dp = dout·Vᵗ: s := P and dp := dS, both 0 above the diagonal."""
    for i in range(rows):
        valid = max(0, min(keys, row + i + 1 - first_key))
        line, dline, shift, mean = s[i], dp[i], lse[i], d[i]
        for j in range(valid):
            p = exp(line[j] * scale - shift)
            line[j] = p
            dline[j] = p * (dline[j] - mean) * scale
        for j in range(valid, keys):
            s[i, j] = 0
            dp[i, j] = 0


@inline
def _backward_item(worker, item, dqkv, dout, qkv, out, stats, scratch):
    NH, T = stats.shape[1], stats.shape[2]
    C = out.shape[1]
    HS = C // NH
    b, h = item // NH, item % NH
    first, col = b * T, h * HS
    scale = np.float32(1.0 / math.sqrt(HS))
    turned, whole, tile = (T + LANES) * HS, T * (HS + LANES), TILE_Q * TILE_K
    mine = scratch[worker]
    keys_t, values_t, mine = mine[:turned], mine[turned : 2 * turned], mine[2 * turned :]
    queries, keys, mine = mine[:whole], mine[whole : 2 * whole], mine[2 * whole :]
    douts, mine = mine[:whole], mine[whole:]
    s, dp = mine[:tile].reshape((TILE_Q, TILE_K)), mine[tile : 2 * tile].reshape((TILE_Q, TILE_K))
    mine = mine[2 * tile :]
    lse, d, edge = mine[:TILE_Q], mine[TILE_Q : 2 * TILE_Q], mine[2 * TILE_Q :]
    _pack_keys(keys_t, qkv, first, T, C + col, HS)
    _pack_keys(values_t, qkv, first, T, 2 * C + col, HS)
    _pack_values(queries, qkv, first, T, col, HS)
    _pack_values(keys, qkv, first, T, C + col, HS)
    _pack_values(douts, dout, first, T, col, HS)
    for t in range(first, first + T):
        dqkv[t, C + col : C + col + HS] = 0
        dqkv[t, 2 * C + col : 2 * C + col + HS] = 0
    for q in range(0, T, TILE_Q):
        rows = min(TILE_Q, T - q)
        for i in range(rows):
            lse[i] = stats[b, h, q + i]
            total = np.float32(0)
            line, dline = out[first + q + i, col : col + HS], dout[first + q + i, col : col + HS]
            for c in range(HS):
                total += dline[c] * line[c]
            d[i] = total
        dq = address(dqkv) + 4 * ((first + q) * 3 * C + col)
        for k in range(0, q + rows, TILE_K):
            depth = min(TILE_K, q + rows - k)
            _scores(s, qkv, first + q, col, keys_t, k, k + depth, T, rows, HS, edge)
            _scores(dp, dout, first + q, col, values_t, k, k + depth, T, rows, HS, edge)
            _gradient_tile(s, dp, lse, d, q, k, depth, rows, scale)
            _weighted(dq, 3 * C, address(dp), TILE_K, 1, keys, k, T, rows, HS, depth, k > 0, edge)
            dk = address(dqkv) + 4 * ((first + k) * 3 * C + C + col)
            _weighted(dk, 3 * C, address(dp), 1, TILE_K, queries, q, T, depth, HS, rows, True, edge)
            dv = dk + 4 * C
            _weighted(dv, 3 * C, address(s), 1, TILE_K, douts, q, T, depth, HS, rows, True, edge)


@kernel
def attention_backward(
    threads,  # int
    dqkv,     # (BT, 3C) f32 :=
    dout,     # (BT, C)
    qkv,      # (BT, 3C)
    out,      # (BT, C)
    stats,    # (B, NH, T)
    scratch,  # (threads, ≥ scratch_size)
):  # fmt: skip
    fork(_backward_item, threads, stats.shape[0] * stats.shape[1], (dqkv, dout, qkv, out, stats, scratch))
