"""`llmpy bench ops`: each operation of the seam on the sizes of GPT-2 124M, against the peak that bounds it.

Products are bounded by multiply-adds: GFLOP/s, of the FMA or bf16-dot peak. All else is bounded by memory:
GB/s, of the stream bandwidth, where an operation moves

    bytes = Σ inputs + 2 · Σ outputs        an output is read before it is written, asked for or not

as the stream itself is counted (`peak.py`). Calls are repeated on the same arrays, so that arrays which fit
into a cache come from it, as they often do in a step: such operations may exceed 100 %.
FLOPs are those of the equations; what backward recomputes is not counted.

Names and fields are those of tests/support/cases.py. Peaks are measured before each operation and after the last, and
represented by their medians; where they differ much, what was measured holds for no one of them, and that is told.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from .. import backend
from ..backend.machine import Machine
from ..errors import LlmpyError
from ..options.bench import OpsOptions
from ..system.words import columns, did_you_mean

DRAWN = 1 << 20  # random numbers; larger arrays repeat them
BUDGET = 0.4  # seconds of repetitions of a case
REPEATS = 5  # at least
UNSTEADY = 1.15  # the highest peak by the lowest, or of a plan's rounds: other programs came or went


@dataclass(frozen=True)
class Case:
    """A problem size: of the dimensions, an operation reads those that it has. `n` is a flat length."""

    B: int = 1
    T: int = 1
    C: int = 1
    NH: int = 1
    OC: int = 1
    V: int = 1
    Vp: int = 1
    n: int = 1
    variant: str = ""

    def __str__(self) -> str:
        set_here = ((f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default)
        return "-".join(v if k == "variant" else f"{k}{v}" for k, v in set_here) or "1"

    @property
    def rows(self) -> int:
        """BT."""
        return self.B * self.T


C, V, VP, CONTEXT = 768, 50257, 50304, 1024  # GPT-2 124M
SHAPES = ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C), (C, VP))  # C → OC: qkv, attention's output, MLP, head


def _products(*variants: str) -> list[Case]:
    """The five shapes, each in its variant, with 256 and 1024 rows."""
    shapes = list(zip(SHAPES, variants, strict=True))
    return [Case(4, T, C=i, OC=o, variant=variant) for T in (64, 256) for (i, o), variant in shapes]


ATTENTION = [Case(4, T, C=C, NH=12) for T in (64, 256, 1024)]
ROWS = [Case(4, T, C=C) for T in (64, 256, 1024)]
EMBEDDING = [Case(4, T, C=C, V=V, Vp=VP) for T in (64, 256, 1024)]
CLASSIFIER = [Case(4, T, C=C, V=V, Vp=VP, variant=v) for T in (64, 256) for v in ("losses", "")]
FLAT = [Case(n=20_000_000)]
BENCH: dict[str, list[Case]] = {
    "linear_forward": _products("bias", "bias", "bias gelu", "bias", ""),
    "linear_backward": _products("bias", "bias", "bias", "bias gelu", ""),  # GELU is with the product that read it
    "attention_forward": ATTENTION,
    "attention_backward": ATTENTION,
    "classifier": CLASSIFIER,
    "layernorm_forward": ROWS,
    "residual_layernorm_forward": ROWS,
    "layernorm_backward": ROWS,
    "gelu_forward": [Case(4, T, C=4 * C) for T in (64, 256, 1024)],
    "embedding_forward": EMBEDDING,
    "embedding_backward": EMBEDDING,
    "adamw": FLAT,
    "global_norm": FLAT,
    "narrow": FLAT,
    "zero": FLAT,
    "pack": [Case(C=i, OC=o) for i, o in SHAPES],
    "packed_linear_forward": [Case(B, C=i, OC=o) for B in (1, 8) for i, o in SHAPES],
    "cache_fill": [Case(1, T, C=C, NH=12) for T in (64, 1024)],
    "attention_decode": [Case(B, T, C=C, NH=12) for B in (1, 8) for T in (64, 1024)],
}
# Σ over the products of an operation; causal attention has half of T² scores.
FLOPS: dict[str, Callable[[Case], int]] = {
    "linear_forward": lambda c: 2 * c.rows * c.C * c.OC,
    "linear_backward": lambda c: 4 * c.rows * c.C * c.OC,
    "attention_forward": lambda c: 2 * c.rows * c.T * c.C,
    "attention_backward": lambda c: 4 * c.rows * c.T * c.C,
    "classifier": lambda c: (2 if c.variant == "losses" else 6) * c.rows * c.C * c.Vp,
}


class Draw:
    """Arrays of a machine: `wide` and `stored` ones of its two types, filled with small random numbers."""

    def __init__(self, ops: Any) -> None:
        self.ops = ops
        self.rng = np.random.default_rng(1)

    def _filled(self, shape: tuple[int, ...], dtype: Any, std: float) -> Any:
        x = self.ops.empty(shape, dtype)
        drawn = std * self.rng.standard_normal(min(x.size, DRAWN), np.float32)
        x[...] = np.resize(drawn.astype(x.dtype), shape)
        return x

    def wide(self, *shape: int, std: float = 1.0) -> Any:
        return self._filled(shape, self.ops.wide, std)

    def stored(self, *shape: int, std: float = 1.0) -> Any:
        return self._filled(shape, self.ops.dtype, std)

    def tokens(self, c: Case) -> np.ndarray:
        return self.rng.integers(0, c.V, (c.B, c.T), dtype=np.int32)


Args = dict[str, Any]


def embedding_forward(c: Case, d: Draw) -> Args:
    wpe = d.stored(max(CONTEXT, c.T), c.C)
    return {"out": d.wide(c.rows, c.C), "tokens": d.tokens(c), "wte": d.stored(c.Vp, c.C), "wpe": wpe}


def embedding_backward(c: Case, d: Draw) -> Args:
    gradients = {"dwte": d.wide(c.Vp, c.C), "dwpe": d.wide(max(CONTEXT, c.T), c.C)}
    return {**gradients, "dout": d.wide(c.rows, c.C), "tokens": d.tokens(c), "accumulate": False}


def layernorm_forward(c: Case, d: Draw) -> Args:
    statistics_ = {"mean": d.wide(c.rows), "rstd": d.wide(c.rows)}
    inputs = {"inp": d.wide(c.rows, c.C), "weight": d.wide(c.C), "bias": d.wide(c.C)}
    return {"out": d.stored(c.rows, c.C), **statistics_, **inputs}


def residual_layernorm_forward(c: Case, d: Draw) -> Args:
    plain = layernorm_forward(c, d)
    inputs = {"inp1": plain.pop("inp"), "inp2": d.stored(c.rows, c.C)}
    after = {"weight": plain.pop("weight"), "bias": plain.pop("bias")}
    return {"resid": d.wide(c.rows, c.C), **plain, **inputs, **after}


def layernorm_backward(c: Case, d: Draw) -> Args:
    forward = layernorm_forward(c, d)
    d.ops.layernorm_forward(*forward.values())
    outputs = {"dinp": d.wide(c.rows, c.C), "dweight": d.wide(c.C), "dbias": d.wide(c.C)}
    kept = {name: forward[name] for name in ("inp", "mean", "rstd", "weight")}
    return {**outputs, "dout": d.stored(c.rows, c.C), **kept, "accumulate": False}


def gelu_forward(c: Case, d: Draw) -> Args:
    return {"out": d.stored(c.rows, c.C), "inp": d.stored(c.rows, c.C)}


def linear_forward(c: Case, d: Draw) -> Args:
    return {
        "out": d.stored(c.rows, c.OC),
        "inp": d.stored(c.rows, c.C),
        "weight": d.stored(c.OC, c.C, std=c.C**-0.5),
        "bias": d.wide(c.OC) if "bias" in c.variant else None,
        "pre_gelu": d.stored(c.rows, c.OC) if "gelu" in c.variant else None,
    }


def linear_backward(c: Case, d: Draw) -> Args:
    return {
        "dinp": d.stored(c.rows, c.C),
        "dweight": d.wide(c.OC, c.C),
        "dbias": d.wide(c.OC),
        "dout": d.stored(c.rows, c.OC),
        "inp": d.stored(c.rows, c.C),
        "weight": d.stored(c.OC, c.C, std=c.C**-0.5),
        "pre_gelu": d.stored(c.rows, c.C) if "gelu" in c.variant else None,
        "accumulate": False,
    }


def attention_forward(c: Case, d: Draw) -> Args:
    return {
        "out": d.stored(c.B, c.T, c.C),
        "stats": d.wide(c.B, c.NH, c.T),
        "qkv": d.stored(c.B, c.T, 3 * c.C),
    }


def attention_backward(c: Case, d: Draw) -> Args:
    forward = attention_forward(c, d)
    d.ops.attention_forward(*forward.values())
    gradients = {"dqkv": d.stored(c.B, c.T, 3 * c.C), "dout": d.stored(c.B, c.T, c.C)}
    return {**gradients, "qkv": forward["qkv"], "out": forward["out"], "stats": forward["stats"]}


def classifier(c: Case, d: Draw) -> Args:
    wanted = c.variant != "losses"
    return {
        "losses": d.wide(c.rows),
        "dinp": d.stored(c.rows, c.C) if wanted else None,
        "dwte": d.wide(c.Vp, c.C) if wanted else None,
        "inp": d.stored(c.rows, c.C),
        "wte": d.stored(c.Vp, c.C, std=c.C**-0.5),
        "targets": d.tokens(c).reshape(-1),
        "vocab_size": c.V,
        "scale": 1 / c.rows,
        "accumulate": False,
    }


def adamw(c: Case, d: Draw) -> Args:
    state = {"param": d.wide(c.n), "grad": d.wide(c.n), "m": d.wide(c.n, std=0.1), "v": d.wide(c.n)}
    np.square(state["v"], out=state["v"])
    settings = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "grad_scale": 0.5}
    return {**state, **settings, "step": 3, "stored": d.stored(c.n) if d.ops.dtype != d.ops.wide else None}


def global_norm(c: Case, d: Draw) -> Args:
    return {"grad": d.wide(c.n)}


def narrow(c: Case, d: Draw) -> Args:
    return {"out": d.stored(c.n), "x": d.wide(c.n)}


def zero(c: Case, d: Draw) -> Args:
    return {"x": d.wide(c.n)}


def pack(c: Case, d: Draw) -> Args:
    return {"packed": d.stored(d.ops.packed_size(c.OC, c.C)), "weight": d.stored(c.OC, c.C)}


def packed_linear_forward(c: Case, d: Draw) -> Args:
    plain, ready = linear_forward(c, d), pack(c, d)
    d.ops.pack(*ready.values())
    given = {"out": plain["out"], "inp": plain["inp"], "packed": ready["packed"]}
    return {**given, "bias": plain["bias"], "pre_gelu": plain["pre_gelu"]}


def cache_fill(c: Case, d: Draw) -> Args:
    return {"cache": d.stored(c.B, c.NH, 2, c.T, c.C // c.NH), "qkv": d.stored(c.B, c.T, 3 * c.C)}


def attention_decode(c: Case, d: Draw) -> Args:
    """The last of T positions."""
    cache = d.stored(c.B, c.NH, 2, c.T, c.C // c.NH)
    where = {"slots": np.arange(c.B, dtype=np.int32), "positions": np.full(c.B, c.T - 1, np.int32)}
    return {"out": d.stored(c.B, c.C), "cache": cache, "qkv": d.stored(c.B, 3 * c.C), **where}


# Of each operation: how to draw its arguments, in the seam's order, and which of them it writes.
BUILD: dict[str, tuple[Callable[[Case, Draw], Args], str]] = {
    "embedding_forward": (embedding_forward, "out"),
    "embedding_backward": (embedding_backward, "dwte dwpe"),
    "layernorm_forward": (layernorm_forward, "out mean rstd"),
    "residual_layernorm_forward": (residual_layernorm_forward, "resid out mean rstd"),
    "layernorm_backward": (layernorm_backward, "dinp dweight dbias"),
    "gelu_forward": (gelu_forward, "out"),
    "linear_forward": (linear_forward, "out pre_gelu"),
    "linear_backward": (linear_backward, "dinp dweight dbias"),
    "attention_forward": (attention_forward, "out stats"),
    "attention_backward": (attention_backward, "dqkv"),
    "classifier": (classifier, "losses dinp dwte"),
    "adamw": (adamw, "param m v stored"),
    "global_norm": (global_norm, ""),
    "narrow": (narrow, "out"),
    "zero": (zero, "x"),
    "pack": (pack, "packed"),
    "packed_linear_forward": (packed_linear_forward, "out pre_gelu"),
    "cache_fill": (cache_fill, "cache"),
    "attention_decode": (attention_decode, "out"),
}


def moved_bytes(op: str, c: Case, args: Args) -> int:
    """Bytes that pass between memory and caches in one call: every input once, every output twice."""
    outputs = BUILD[op][1].split()
    total = 0
    for name, x in args.items():
        if isinstance(x, np.ndarray):
            # Of the token embedding only the rows of the tokens are touched; of wpe only the first T.
            rows = {"wte": c.rows, "dwte": c.rows, "wpe": c.T}.get(name) if op.startswith("embedding") else None
            size = x.nbytes if rows is None else rows * c.C * x.itemsize
            total += (2 if name in outputs else 1) * size
    return total


def time_case(
    ops: Any,
    op: str,
    case: Case,
    budget: float,
    repeats: int,
    before: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Median and fastest ms of a case, and its rate: GFLOP/s for products, GB/s for all else.

    It is called for `budget` seconds, but at least `repeats` times; `before` each of them, untimed, something else.
    """
    args = BUILD[op][0](case, Draw(ops))
    call, values = getattr(ops, op), tuple(args.values())
    call(*values)
    times: list[float] = []
    stop = time.perf_counter() + budget
    while time.perf_counter() < stop or len(times) < repeats:
        before()
        start = time.perf_counter()
        call(*values)
        times.append(time.perf_counter() - start)
    median = statistics.median(times)
    work, unit = (FLOPS[op](case), "GFLOP/s") if op in FLOPS else (moved_bytes(op, case, args), "GB/s")
    return {
        "op": op,
        "case": str(case),
        "median_ms": 1e3 * median,
        "min_ms": 1e3 * min(times),
        "rate": work / median / 1e9,
        "unit": unit,
    }


def bench_ops(options: OpsOptions, load: Callable[..., Any] = backend.load) -> dict[str, Any]:
    """Time the cases; `load` makes the machine, and a second one with a single thread for its peaks.

    Times in ms; `peaks` by unit, "GFLOP/s" and "GB/s" (10⁹ bytes), at one thread and at all; `steady`: they stayed.
    """
    if options.op is not None and options.op not in BENCH:
        raise LlmpyError(f"--op {options.op}", did_you_mean(options.op, BENCH) or "use one of " + ", ".join(BENCH))
    ops: Machine = load("cpu", threads=options.threads, dtype=options.dtype)
    single: Machine = load("cpu", threads=1, dtype=options.dtype)
    peaks: dict[str, list[float]] = {"GFLOP/s": [], "GB/s": []}
    one = {"GFLOP/s": single.measure_peak(), "GB/s": single.measure_bandwidth()}
    results = []

    def measure_peaks() -> None:
        peaks["GFLOP/s"].append(ops.measure_peak())
        peaks["GB/s"].append(ops.measure_bandwidth())

    for op, cases in BENCH.items():
        if options.op not in (None, op) or (op == "narrow" and ops.dtype == ops.wide):
            continue
        measure_peaks()
        results += [time_case(ops, op, case, BUDGET, REPEATS) for case in cases]
    if not results:
        raise LlmpyError(f"--op {options.op}: there is nothing to do in {ops.dtype}", "use --dtype bfloat16")
    measure_peaks()
    all_ = {unit: statistics.median(rates) for unit, rates in peaks.items()}
    for result in results:
        result["share_of_peak"] = result["rate"] / all_[result["unit"]]
    return {
        "dtype": np.dtype(ops.dtype).name,
        "threads": ops.threads,
        "isa": ops.isa,
        "peaks": {unit: {"one_thread": one[unit], "all_threads": all_[unit]} for unit in peaks},
        "steady": max(peaks["GFLOP/s"]) < UNSTEADY * min(peaks["GFLOP/s"]),
        "ops": results,
    }


def table(numbers: dict[str, Any]) -> str:
    """The same for a reader."""
    peaks = numbers["peaks"]
    head = [
        (f"{numbers['isa']}, {numbers['dtype']}", "1 thread", f"{numbers['threads']} threads"),
        *(
            (what, f"{peaks[unit]['one_thread']:,.1f} {unit}", f"{peaks[unit]['all_threads']:,.1f} {unit}")
            for what, unit in (("peak of multiply-adds", "GFLOP/s"), ("bandwidth of a stream", "GB/s"))
        ),
    ]
    body = [
        (
            r["op"], r["case"], f"{r['median_ms']:,.3f}", f"{r['rate']:,.1f} {r['unit']:<7}",
            f"{100 * r['share_of_peak']:.0f} %",
        )
        for r in numbers["ops"]
    ]  # fmt: skip
    caution = "" if numbers["steady"] else "\ncaution  other programs ran meanwhile: measure again without them"
    return columns(head) + caution + "\n\n" + columns([("operation", "case", "ms", "rate", "of peak"), *body])
