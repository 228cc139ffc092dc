"""Predict a training step at many threads from one measured at one thread; see docs/many-cores.md.

python dev/many_cores.py --model gpt2 -B 4 -T 1024            threads 2, 16, 64 and 128
python dev/many_cores.py --model llama:d30 -B 2 -T 512 --dtype float32

time of a call = Σ over its forks of max(items of whole work, shared by a greedy schedule; bytes / bandwidth) + fork
"""

from __future__ import annotations

import argparse
import functools
import heapq
import time
from collections import Counter
from typing import Any, cast

import numpy as np

from llmpy import backend
from llmpy.backend.cpu import CLASSIFIER_ROWS, activation, adamw, columns, embedding, layernorm, linear, rotary, simd
from llmpy.backend.machine import Machine
from llmpy.bench.ops import FLOPS, moved_bytes
from llmpy.bench.roofline import TimedOps
from llmpy.formats import config_of
from llmpy.model.families import language_model
from llmpy.model.initialise import initialise
from llmpy.system.terminal import aside
from llmpy.train.optimizer import AdamW

STEPS = 3
ROWS = {  # per item; norms: layernorm.BLOCK
    "rope": rotary.ROWS,
    "add_columns": columns.BLOCK,
    "take_columns": columns.BLOCK,
    "embedding_forward": embedding.ROWS,
}
Items = list[tuple[int, float]]  # of a fork: their number, and the share of the call's time that they take


def up(a: int, b: int) -> int:
    return -(-a // b)


def product(
    rows: int, OC: int, C: int, narrow: bool, threads: int, backward: bool, frozen: bool = False
) -> list[Items]:
    """Return the forks of `linear_forward` or `linear_backward`; see those."""
    R = simd.MOST_ROWS if narrow else simd.MR
    depth = simd.KC * (2 if narrow else 1)

    def tiles(columns: int) -> int:
        panels = up(columns, simd.NR)
        return panels * up(rows, linear._rows_per_item.py_func(rows, panels, threads, linear.BLOCK_ROWS, R))

    if not backward:
        return [[(tiles(OC), 1.0)]]
    dinp, block = tiles(C), min(linear.BLOCK_COLS, max(R, OC // (16 * threads) // R * R))
    half = 1.0 if frozen else 0.5  # of the time, for each product
    segments, blocks = up(OC, linear.SEGMENT * depth), 1 if frozen else up(rows, depth)
    forks: list[Items] = [[(dinp, half / segments)]] * (segments - 1)
    for k in range(blocks):
        forks.append([(up(C, simd.NR), 0.02 / blocks)])  # packing the inputs
        parts = [(dinp, half / segments)] if k == 0 else []
        forks.append(parts if frozen else [*parts, (up(OC, block), (half - 0.02) / blocks)])
    return forks


def forks_of(op: str, a: dict[str, Any], threads: int) -> list[Items]:
    """Return the forks of an operation."""
    if op.startswith("linear"):
        out = a["dout" if "dout" in a else "out"]
        rows, OC, C = out.size // out.shape[-1], out.shape[-1], a["weight"].shape[1]
        return product(rows, OC, C, out.dtype.itemsize == 2, threads, "dout" in a, a.get("dweight", 0) is None)
    if op == "classifier":
        rows, (OC, C), narrow = a["inp"].size // a["inp"].shape[-1], a["wte"].shape, a["wte"].dtype.itemsize == 2
        chunks, size = up(rows, CLASSIFIER_ROWS), min(rows, CLASSIFIER_ROWS)
        each = {False: 0.3, True: 0.6}  # and 0.1 for the softmax
        forks: list[Items] = [[(size, 0.1 / chunks)]]
        for backward, share in each.items():
            for fork in product(size, OC, C, narrow, threads, backward):
                forks.append([(items, share * part / chunks) for items, part in fork])
        return forks * chunks
    if op.startswith("attention"):
        B, NH, _ = a["stats"].shape
        HS = a["out"].shape[-1] // NH
        heads = NH if op == "attention_forward" else (a["qkv"].shape[-1] // HS - NH) // 2
        return [[(B * heads, 1.0)]]
    if op in ("adamw", "global_norm", "narrow"):
        return [[(up(max(x.size for x in a.values() if isinstance(x, np.ndarray)), adamw.BLOCK), 1.0)]]
    if op == "zero":  # NumPy, one thread
        return [[(1, 1.0)]]
    x = next(x for x in a.values() if isinstance(x, np.ndarray) and x.ndim > 1)
    rows, C = (x.size // x.shape[-1], x.shape[-1]) if x.ndim > 1 else (1, 1)
    if op == "embedding_backward":
        return [[(up(C, embedding.COLUMNS), 1.0)]]
    if op.startswith("activation"):
        return [[(up(rows, max(1, activation.BLOCK // C)), 1.0)]]
    sums: list[Items] = [[(up(C, layernorm.COLUMNS), 0.02)]] if op.endswith("norm_backward") else []
    return [[(up(rows, ROWS.get(op, layernorm.BLOCK)), 1 - 0.02 * len(sums))], *sums]


def bytes_of(op: str, a: dict[str, Any]) -> int:
    """Return the bytes from and to memory: as the roofline's, but gradients of weights once per block of rows."""
    total = moved_bytes(op, a)
    if op == "linear_backward" and a["dweight"] is not None:
        rows, depth = a["dout"].size // a["dout"].shape[-1], simd.KC * 4 // a["dout"].dtype.itemsize
        total += 2 * a["dweight"].nbytes * (up(rows, depth) - 1)
    if op == "classifier" and a["dwte"] is not None:
        rows = a["inp"].size // a["inp"].shape[-1]
        logits = rows * a["wte"].shape[0] * a["wte"].dtype.itemsize
        total += 6 * logits + (up(rows, CLASSIFIER_ROWS) - 1) * (2 * a["dwte"].nbytes + 2 * a["wte"].nbytes)
    return total


@functools.cache
def makespan(items: tuple[tuple[int, float], ...], threads: int) -> float:
    """Return the time of a fork, as a share of the call's on one thread: a free thread takes the next item."""
    free = [0.0] * threads
    for count, share in items:
        for _ in range(count):
            heapq.heapreplace(free, free[0] + share / count)
    return max(free)


def predicted(calls: list[Any], rest: float, threads: int, o: argparse.Namespace) -> Counter[str]:
    """Return seconds by operation, of `forks` and of `Python`, one thread, which `rest` was measured."""
    sockets = up(threads, o.socket)
    bandwidth = min(threads * o.core_bandwidth, sockets * o.socket_bandwidth) * 1e9
    line = 1e-9 * (o.line if sockets == 1 else o.far_line)
    cost = (o.lines * threads * line) if threads > 1 else 0.0
    found: Counter[str] = Counter({"Python": rest})
    for op, a, seconds in calls:
        forks = forks_of(op, a, threads)
        work = sum(makespan(tuple(fork), threads) for fork in forks) * seconds
        found[op] += max(work, bytes_of(op, a) / bandwidth)
        found["forks"] += cost * sum(sum(items for items, _ in fork) > 1 for fork in forks)
        found["count"] += len(forks)
    return found


def measured(o: argparse.Namespace, threads: int) -> tuple[list[Any], float, float]:
    """Return the calls of a step with their seconds, those of Python, and the step's: CPU time if `threads` is 1."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    timed = TimedOps(backend.load("cpu", threads=threads, dtype=o.dtype), clock)
    config = config_of(o.model)
    model = language_model(config, cast(Machine, timed))
    timed.warm_up(aside, kinds=config.kinds)
    initialise(model.params, model.config)
    model.store_weights()
    model.reserve(o.B, o.T, training=True)
    optimizer = AdamW(model)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, o.B, o.T), dtype=np.int32)
    times, steps = [], []
    for n in range(STEPS + 1):
        timed.calls, timed.on = [], n > 0  # the first touches memory
        start = clock()
        model.loss_and_grads(*tokens)
        optimizer.step(1e-4)
        times.append(clock() - start)
        steps.append(timed.calls)
    calls = [(op, a, min(s[i][2] for s in steps[1:])) for i, (op, a, _) in enumerate(steps[-1])]
    rest = min(t - sum(seconds for _, _, seconds in s) for t, s in zip(times[1:], steps[1:], strict=True))
    return calls, rest, min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("-B", type=int, default=4)
    parser.add_argument("-T", type=int, default=1024)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 16, 64, 128])
    parser.add_argument("--socket", type=int, default=64, help="cores per socket")
    parser.add_argument("--core-bandwidth", type=float, default=17.0, help="GB/s of one core")
    parser.add_argument("--socket-bandwidth", type=float, default=300.0, help="GB/s")
    parser.add_argument("--line", type=float, default=70.0, help="ns for a cache line from core to core")
    parser.add_argument("--far-line", type=float, default=150.0, help="the same, in the mean, with two sockets")
    parser.add_argument("--lines", type=float, default=4.5, help="such transfers per thread and fork")
    o = parser.parse_args()
    calls, rest, _ = measured(o, 1)
    whole = rest + sum(seconds for _, _, seconds in calls)
    flops = sum(FLOPS[op](a) for op, a, _ in calls if op in FLOPS)
    print(f"1 thread: {whole:.3f} s, {flops / whole / 1e9:,.0f} GFLOP/s; Python {1e3 * rest:.1f} ms")
    both = measured(o, 2)[2] if 2 in o.threads else 0.0
    ops = Counter[str]()
    for op, _, seconds in calls:
        ops[op] += seconds  # type: ignore[assignment]
    columns = {n: predicted(calls, rest, n, o) for n in o.threads}
    print("threads".ljust(28), *(f"{n:>9}" for n in [1, *o.threads]))
    for op in [*sorted(ops, key=lambda op: -ops[op]), "forks", "Python"]:
        print(
            op.ljust(28),
            *(f"{1e3 * row[op]:9.2f}" for row in [Counter(ops) | Counter({"Python": rest}), *columns.values()]),
        )
    sums = {n: sum(v for k, v in row.items() if k != "count") for n, row in columns.items()}
    print("step, ms".ljust(28), f"{1e3 * whole:9.1f}", *(f"{1e3 * s:9.1f}" for s in sums.values()))
    print("speed-up".ljust(28), f"{1:9.1f}", *(f"{whole / s:9.1f}" for s in sums.values()))
    print("forks, number".ljust(28), f"{'':9}", *(f"{row['count']:9}" for row in columns.values()))
    print(f"measured with 2 threads: {1e3 * both:.1f} ms" if both else "")


if __name__ == "__main__":
    main()
