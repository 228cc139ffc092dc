"""What this machine can do at best: fused multiply-adds on registers, nothing else."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from .jit import fork, inline, intrinsic, kernel
from .simd import BF16, F32, I64, LANES, MR, NV, VECTOR, _dot_add, _multiply_add, _splat

CHAINS = MR * NV  # independent sums: enough to hide the latency of an FMA
FLOPS_PER_ROUND = 2 * LANES * CHAINS
ROUNDS = 1 << 14


@intrinsic
def _multiply_adds(typingctx: Any, like: Any, rounds: Any, x: Any, y: Any) -> Any:
    """`rounds` times CHAINS vector multiply-adds c := x·y + c, on float32 or pairs of bfloat16 as `like` has them.

    Returns one number that depends on all of them.
    """
    multiply = _dot_add if like.dtype == BF16 else _multiply_add

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        _, rounds, x, y = args
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
    """GFLOP/s of multiply-adds on `threads` threads: the median of short bursts over `seconds`.

    `like` is an array of float32, or of uint16 for pairs of bfloat16: the arithmetic to measure.
    """
    items = min(sink.shape[0], 16 * threads)
    x, y = np.float32(0.999), np.float32(0.001)
    flops = items * ROUNDS * FLOPS_PER_ROUND * (2 if like.dtype == np.uint16 else 1)
    rates: list[float] = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(rates) < 3:
        start = time.perf_counter()
        multiply_adds(threads, like, items, sink, x, y)
        rates.append(flops / (time.perf_counter() - start) / 1e9)
    return float(np.median(rates))
