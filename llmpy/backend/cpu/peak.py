"""Peak rates of this machine: fused multiply-adds on registers alone, and streams through memory alone.

The stream is McCalpin's triad  a := b + s·c  on arrays far larger than the last-level cache. It moves 16 bytes
per element: b and c are read, and a line of a is read before it is overwritten (write-allocate), then written back.
A CPU that detects whole-line writes (some Arm) saves that read; its bandwidth is then overstated by up to a third.

Work that only reads, such as decoding, is bounded by a read-only stream:  Σ a.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from . import amx
from .jit import fork, inline, intrinsic, kernel
from .simd import BF16, F32, HOST, I64, LANES, MR, NV, VECTOR, _dot_add, _multiply_add, _splat

CHAINS = MR * NV  # independent sums: enough to hide the latency of an FMA
FLOPS_PER_ROUND = 2 * LANES * CHAINS
ROUNDS = 1 << 14


@intrinsic
def _multiply_adds(typingctx: Any, like: Any, rounds: Any, x: Any, y: Any) -> Any:
    """Do `rounds` times CHAINS vector multiply-adds c := x·y + c, on float32 or pairs of bfloat16, like `like`.

    Return one number that depends on all of them. Where `amx` multiplies bfloat16: its products, and x.
    """
    multiply, tiles = _dot_add if like.dtype == BF16 else _multiply_add, like.dtype == BF16 and HOST.tiles

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        _, rounds, x, y = args
        if tiles:
            amx.multiply_adds(bd, rounds)
            return x
        x, y = _splat(bd, x), _splat(bd, y)
        entry, loop, end = bd.block, bd.append_basic_block("round"), bd.append_basic_block("done")
        bd.branch(loop)
        bd.position_at_end(loop)
        k = bd.phi(I64)
        k.add_incoming(I64(0), entry)
        sums = [bd.phi(VECTOR) for _ in range(CHAINS)]
        after = [multiply(bd, x, y, c) for c in sums]
        for i, (c, n) in enumerate(zip(sums, after, strict=True)):
            c.add_incoming(ir.Constant(VECTOR, [ir.Constant(F32, float(i + 1))] * LANES), entry)
            c.add_incoming(n, loop)
        next_k = bd.add(k, I64(1))
        k.add_incoming(next_k, loop)
        bd.cbranch(bd.icmp_signed("<", next_k, rounds), loop, end)
        bd.position_at_end(end)
        total = after[0]
        for n in after[1:]:
            total = bd.fadd(total, n)
        return bd.extract_element(total, ir.Constant(ir.IntType(32), 0))

    return types.float32(like, types.int64, types.float32, types.float32), codegen


@inline
def _item(worker, item, like, sink, x, y):
    sink[item] = _multiply_adds(like, ROUNDS, x, y)


@kernel
def multiply_adds(threads, like, items, sink, x, y):
    """items × ROUNDS × CHAINS vector multiply-adds on `threads` threads; sink (items,) float32 :=."""
    fork(_item, threads, items, (like, sink, x, y))


def measure(threads: int, like: np.ndarray, sink: np.ndarray, seconds: float = 0.2) -> float:
    """Measure GFLOP/s of multiply-adds on `threads` threads: the median of short bursts over `seconds`.

    `like` selects the arithmetic: an array of float32, or of uint16 for pairs of bfloat16.
    """
    items = min(sink.shape[0], 16 * threads)
    x, y = np.float32(0.999), np.float32(0.001)
    pairs = like.dtype == np.uint16
    each = amx.FLOPS_PER_ROUND if pairs and HOST.tiles else FLOPS_PER_ROUND * (2 if pairs else 1)
    flops = items * ROUNDS * each
    rates: list[float] = []
    multiply_adds(threads, like, items, sink, x, y)  # untimed: loads the kernel and wakes the helpers
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(rates) < 3:
        start = time.perf_counter()
        multiply_adds(threads, like, items, sink, x, y)
        rates.append(flops / (time.perf_counter() - start) / 1e9)
    return float(np.median(rates))


STREAM = 32 << 20  # elements per array: 3 × 128 MiB, larger than nearly all caches
STREAM_BYTES = 16  # moved per element, write-allocate included
STREAM_BLOCK = 1 << 15  # elements per item: 128 KiB of each array
READ_BLOCK = 1 << 18  # 1 MiB


@inline
def _triad_item(worker, item, a, b, c, s):
    part = slice(item * STREAM_BLOCK, min((item + 1) * STREAM_BLOCK, a.shape[0]))
    a, b, c = a[part], b[part], c[part]
    for i in range(a.shape[0]):
        a[i] = b[i] + s * c[i]


@kernel
def triad(threads, a, b, c, s):
    """a := b + s·c for float32 (n,) arrays and a float32 s."""
    fork(_triad_item, threads, (a.shape[0] + STREAM_BLOCK - 1) // STREAM_BLOCK, (a, b, c, s))


def measure_bandwidth(threads: int, a: np.ndarray, b: np.ndarray, c: np.ndarray, seconds: float = 0.3) -> float:
    """Measure GB/s (10⁹ bytes, write-allocate counted) of the triad on `threads` threads: the median over `seconds`.

    a, b and c: float32 (STREAM,), any content; they are overwritten.
    """
    for x in (a, b, c):
        x.fill(1)  # touches every page
    s = np.float32(0.5)
    triad(threads, a, b, c, s)  # untimed: compiles or loads the kernel
    rates: list[float] = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(rates) < 3:
        start = time.perf_counter()
        triad(threads, a, b, c, s)
        rates.append(STREAM_BYTES * a.size / (time.perf_counter() - start) / 1e9)
    return float(np.median(rates))


@inline
def _read_item(worker, item, sink, a):
    part = a[item * READ_BLOCK : min((item + 1) * READ_BLOCK, a.shape[0])]
    total = np.float32(0)
    for i in range(part.shape[0]):
        total += part[i]
    sink[item] = total


@kernel
def read(threads, sink, a):
    """sink (≥ ceil(n/READ_BLOCK),) float32 := the sums of the blocks of a float32 (n,)."""
    fork(_read_item, threads, (a.shape[0] + READ_BLOCK - 1) // READ_BLOCK, (sink, a))


def measure_reading(threads: int, sink: np.ndarray, a: np.ndarray, seconds: float = 0.3) -> float:
    """Measure GB/s (10⁹ bytes) of reading a float32 (n,) on `threads` threads: the median over `seconds`.

    sink: (≥ ceil(n/READ_BLOCK),) float32. The rate holds for these pages only: other pages of the same machine can be
    twice as fast or half as fast (dev/LOG.md).
    """
    read(threads, sink, a)  # untimed: compiles or loads the kernel
    rates: list[float] = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(rates) < 3:
        start = time.perf_counter()
        read(threads, sink, a)
        rates.append(a.nbytes / (time.perf_counter() - start) / 1e9)
    return float(np.median(rates))
