"""One matrix product of GPT-2 in nine versions: from three loops in Python to the training kernel.

    out (BT, OC) := inp (BT, C) · weight (OC, C)ᵀ

    python dev/ladder.py              all rungs, as a table
    python dev/ladder.py 4 5 --json   some of them, as JSON

Each rung changes one thing; docs/peak.md explains it. Every product is checked against NumPy in float64 before it
is timed. Rungs 2 to 4 read a transposed copy of the weight, made before timing; from rung 5 on the weight is read in
place. FLOPs are those of the product, without bias and GELU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from llmpy import backend
from llmpy.backend.cpu.gemm import EDGE, PANEL, multiply_panel, pack_transposed
from llmpy.backend.cpu.jit import kernel
from llmpy.backend.cpu.simd import ADD, KC, LANES, MR, NR, NV, WRITE, address, microkernel
from llmpy.backend.reference import gelu
from llmpy.system.words import columns

SHAPE = (256, 768, 3072)  # BT, C, OC: the first product of the MLP in GPT-2 124M, four rows of 64 tokens
PYTHON_ROWS = 2  # rows of out that rung 0 computes; all 256 would take minutes
BUDGET, REPEATS = 0.5, 5  # seconds per rung, and minimum repetitions
BLOCK_K, BLOCK_COLS = 32, 768  # rung 3: 96 KiB of the weight, in L2; as fast as any of 16 … 256 by 48 … 1536


def loops_in_python(out: list, inp: list, weight: list) -> None:
    """Multiply lists of lists of floats: every number is an object."""
    for t in range(len(out)):
        for o in range(len(weight)):
            total = 0.0
            for c in range(len(inp[t])):
                total += inp[t][c] * weight[o][c]
            out[t][o] = total


@numba.njit
def loops_compiled(out, inp, weight):
    """Compile the same loops. LLVM may not vectorize: that would change the order of additions in a sum."""
    for t in range(out.shape[0]):
        for o in range(out.shape[1]):
            total = np.float32(0)
            for c in range(inp.shape[1]):
                total += inp[t, c] * weight[o, c]
            out[t, o] = total


@numba.njit
def columns_innermost(out, inp, weight_t):
    """Add in the same order, but several sums at once: neighbouring columns fill the lanes of a vector."""
    for t in range(out.shape[0]):
        row = out[t]
        row[:] = 0
        for c in range(inp.shape[1]):
            x, line = inp[t, c], weight_t[c]
            for o in range(row.shape[0]):
                row[o] += x * line[o]


@numba.njit
def blocked_for_caches(out, inp, weight_t):
    """Use a block of the weight for all rows before the next one; sums are still loaded and stored in L1."""
    out[:] = 0
    for o in range(0, out.shape[1], BLOCK_COLS):
        for k in range(0, inp.shape[1], BLOCK_K):
            for t in range(out.shape[0]):
                row = out[t, o : o + BLOCK_COLS]
                for c in range(k, min(k + BLOCK_K, inp.shape[1])):
                    x, line = inp[t, c], weight_t[c, o : o + BLOCK_COLS]
                    for i in range(row.shape[0]):
                        row[i] += x * line[i]


@kernel
def tile_in_registers(out, inp, weight_t):
    """Keep MR × NR sums in registers for all of C. The weight is read in pieces of NR, a row apart."""
    BT, C = inp.shape
    OC = out.shape[1]
    for o in range(0, OC, NR):
        col = min(o, OC - NR)  # the last tile may overlap the one before
        for t in range(0, BT, MR):
            row = min(t, BT - MR)
            a, b, c = address(inp) + 4 * row * C, address(weight_t) + 4 * col, address(out) + 4 * (row * OC + col)
            microkernel(inp, NV, a, 4 * C, b, OC, c, OC, C, WRITE, None)


@kernel
def packed_panels(out, inp, weight, panel, edge):
    """Pack the pieces, transposed, into contiguous panels: one sequential stream from L2."""
    BT, C = inp.shape
    OC = out.shape[1]
    for col in range(0, OC, NR):
        cols = min(NR, OC - col)
        for k in range(0, C, KC):
            kc = min(KC, C - k)
            pack_transposed(panel, weight, col, k, kc, cols)
            a, c = address(inp) + 4 * k, address(out) + 4 * col
            multiply_panel(c, OC, inp, a, 4 * C, panel, BT, cols, kc, ADD if k > 0 else WRITE, edge)


@dataclass(frozen=True)
class Rung:
    """A version of the product; `prepare(problem, ops)` returns a call and its outputs."""

    name: str
    prepare: Callable[[Problem, Any], tuple[Callable[[], object], Any]]
    threads: int | None = 1  # None: all
    dtype: str = "float32"
    rows: int | None = None  # of out, if not all: its time is extrapolated
    finished: bool = False  # with bias and GELU: writes (out, pre_gelu)


@dataclass(frozen=True)
class Problem:
    """Operands in float32 with values exact in bfloat16, so that all rungs compute the same."""

    inp: np.ndarray  # (BT, C)
    weight: np.ndarray  # (OC, C)
    bias: np.ndarray  # (OC,)

    @classmethod
    def draw(cls, BT: int, C: int, OC: int) -> Problem:
        rng = np.random.default_rng(1)
        stored = np.dtype("bfloat16")

        def normal(std: float, *shape: int) -> np.ndarray:
            return (std * rng.standard_normal(shape, np.float32)).astype(stored).astype(np.float32)

        return cls(normal(1, BT, C), normal(C**-0.5, OC, C), normal(1, OC))

    @property
    def flops(self) -> int:
        return 2 * self.inp.size * self.weight.shape[0]


def on_lists(p: Problem, ops: Any) -> tuple[Callable[[], object], Any]:
    inp, weight = p.inp[:PYTHON_ROWS].tolist(), p.weight.tolist()
    out = [[0.0] * len(weight) for _ in inp]
    return lambda: loops_in_python(out, inp, weight), out


def on_arrays(function: Callable, turned: bool = False) -> Callable:
    def prepare(p: Problem, ops: Any) -> tuple[Callable[[], object], Any]:
        out = ops.empty((p.inp.shape[0], p.weight.shape[0]), np.float32)
        inp, weight = (copied(ops, x, np.float32) for x in (p.inp, p.weight.T if turned else p.weight))
        return lambda: function(out, inp, weight), out

    return prepare


def on_panels(p: Problem, ops: Any) -> tuple[Callable[[], object], Any]:
    panel, edge = ops.empty(PANEL, np.float32), ops.empty(EDGE, np.float32)
    return on_arrays(lambda *arrays: packed_panels(*arrays, panel, edge))(p, ops)


def on_the_seam(p: Problem, ops: Any) -> tuple[Callable[[], object], Any]:
    out, pre_gelu = (ops.empty((p.inp.shape[0], p.weight.shape[0]), ops.dtype) for _ in range(2))
    inp, weight = (copied(ops, x, ops.dtype) for x in (p.inp, p.weight))
    return lambda: ops.linear_forward(out, inp, weight, p.bias, pre_gelu), (out, pre_gelu)


def copied(ops: Any, x: np.ndarray, dtype: Any) -> np.ndarray:
    """Return a copy of x that starts on a cache line."""
    y = ops.empty(x.shape, dtype)
    y[...] = x
    return y


RUNGS = (
    Rung("three loops in Python", on_lists, rows=PYTHON_ROWS),
    Rung("the same loops, compiled", on_arrays(loops_compiled)),
    Rung("columns innermost: vectors", on_arrays(columns_innermost, turned=True)),
    Rung("blocks that stay in cache", on_arrays(blocked_for_caches, turned=True)),
    Rung("a tile of sums in registers", on_arrays(tile_in_registers, turned=True)),
    Rung("packed panels", on_panels),
    Rung("linear_forward, bias and GELU", on_the_seam, finished=True),
    Rung("the same on all threads", on_the_seam, threads=None, finished=True),
    Rung("the same in bfloat16", on_the_seam, threads=None, dtype="bfloat16", finished=True),
)


def check(rung: Rung, p: Problem, written: Any) -> float:
    """Assert that a rung computed the product; return its largest error as a share of the rounding bound.

    A sum of n products in float32, in any order, is within (n + 1)·2⁻²⁴·Σ|inp·weight| of the exact one (Higham,
    Accuracy and Stability of Numerical Algorithms, §3.1). Rounding to bfloat16 has a relative error of at most 2⁻⁸.
    GELU is x·s(u): the roundings of u and e^u, weighted by s′·u and s, which stay below 1, add at most 2⁻²¹·|x|.
    """
    inp, weight, bias = (x.astype(np.float64) for x in (p.inp[: rung.rows], p.weight, p.bias * rung.finished))
    rounding = 2.0**-8 if rung.dtype == "bfloat16" else 2.0**-24
    out, pre_gelu = (np.asarray(x, np.float64) for x in (written if rung.finished else (written, written)))
    exact, terms = inp @ weight.T + bias, np.abs(inp) @ np.abs(weight.T) + np.abs(bias)
    share = _share(pre_gelu - exact, (inp.shape[1] + 2) * 2.0**-24 * terms + rounding * np.abs(exact))
    if rung.finished:
        exact = gelu(pre_gelu)
        share = max(share, _share(out - exact, 2.0**-21 * np.abs(pre_gelu) + rounding * np.abs(exact)))
    assert share <= 1, f"{rung.name}: the error is {share:.3g} times the rounding bound"
    return share


def _share(error: np.ndarray, bound: np.ndarray) -> float:
    """Return max |error|/bound; NaN counts as infinite."""
    return float(np.max(np.nan_to_num(np.abs(error), nan=np.inf) / np.maximum(bound, 2.0**-126)))


def seconds(call: Callable[[], object], budget: float) -> float:
    """Return the median time of as many calls as fit into the budget, at least REPEATS."""
    times: list[float] = []
    stop = time.perf_counter() + budget
    while time.perf_counter() < stop or len(times) < REPEATS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def climb(numbers: list[int], shape: tuple[int, int, int] = SHAPE, budget: float = BUDGET) -> dict[str, Any]:
    """Check and time some rungs; after each, measure the peak of its threads and dtype."""
    problem = Problem.draw(*shape)
    results = []
    peaks: dict[tuple[int, str], list[float]] = {}
    for number in numbers:
        rung = RUNGS[number]
        ops = backend.load("cpu", threads=rung.threads, dtype=rung.dtype)
        call, written = rung.prepare(problem, ops)
        call()  # compiles and wakes the threads
        error = check(rung, problem, written)
        share = 1 if rung.rows is None else min(rung.rows, shape[0]) / shape[0]
        took = seconds(call, budget) / share
        peaks.setdefault((ops.threads, rung.dtype), []).append(ops.measure_peak(budget / 2))
        results.append({
            "rung": number, "name": rung.name, "threads": ops.threads, "dtype": rung.dtype, "ms": 1e3 * took,
            "extrapolated": share < 1, "gflops": problem.flops / took / 1e9, "error_of_bound": error,
        })  # fmt: skip
    for r in results:
        r["share_of_peak"] = r["gflops"] / statistics.median(peaks[r["threads"], r["dtype"]])
        r["times_first"] = r["gflops"] / results[0]["gflops"]
    return {
        "shape": dict(zip(("BT", "C", "OC"), shape, strict=True)),
        "isa": ops.isa,
        "lanes": LANES,
        "peaks": [{"threads": t, "dtype": d, "gflops": statistics.median(g)} for (t, d), g in peaks.items()],
        "rungs": results,
    }


def table(numbers: dict[str, Any]) -> str:
    """Return the result of `climb` as a table."""
    head = "({BT} × {C}) · ({C} × {OC}), ".format(**numbers["shape"]) + numbers["isa"]
    peaks = [
        (f"peak, {p['dtype']}, {p['threads']} thread{'s' * (p['threads'] > 1)}", f"{p['gflops']:,.1f} GFLOP/s")
        for p in numbers["peaks"]
    ]
    body = [
        (
            f"{r['rung']}  {r['name']}", f"{'~' * r['extrapolated']}{r['ms']:,.1f}", f"{r['gflops']:,.3g}",
            f"{100 * r['share_of_peak']:.2g} %", f"{r['times_first']:,.0f}",
        )
        for r in numbers["rungs"]
    ]  # fmt: skip
    rungs = columns([("rung", "ms", "GFLOP/s", "of peak", "× first"), *body])
    note = f"\n~ extrapolated from {PYTHON_ROWS} rows" if any(r["extrapolated"] for r in numbers["rungs"]) else ""
    return f"{head}\n{columns(peaks)}\n\n{rungs}{note}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="the ladder of docs/peak.md")
    every = range(len(RUNGS))
    parser.add_argument("rung", nargs="*", type=int, help=f"0 … {every[-1]}; default: all")
    parser.add_argument("--shape", nargs=3, type=int, default=SHAPE, metavar=("BT", "C", "OC"))
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main() -> int:
    parser = build_parser()
    options = parser.parse_args()
    chosen = options.rung or list(range(len(RUNGS)))
    if wrong := [n for n in chosen if not 0 <= n < len(RUNGS)]:
        parser.error(f"unknown rung {wrong[0]}. Use 0 … {len(RUNGS) - 1}")
    BT, C, OC = options.shape
    if BT < MR or C < 1 or OC < NR:
        parser.error(f"--shape {BT} {C} {OC} is smaller than a tile. Use at least {MR} 1 {NR}")
    numbers = climb(chosen, (BT, C, OC))
    print(json.dumps(numbers, indent=1) if options.json else table(numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
