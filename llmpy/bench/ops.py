"""`llmpy bench ops`: each operation of the seam, at the sizes of GPT-2 124M, against the peak that bounds it.

That is the one that takes more time: of multiply-adds, in GFLOP/s, or of a stream through memory, in GB/s, with

    bytes = Σ inputs + 2 · Σ outputs        every output line is read before it is written

as for the stream itself (`peak.py`). Calls repeat on the same arrays. Those that fit into a cache stay there, as often
in a step, so such operations may exceed 100 %. FLOPs are those of the equations, without recomputation in backward.
Peaks are medians of measurements before each operation and after the last; a warning is printed if they vary much.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from .. import backend
from ..backend.machine import Machine
from ..errors import LlmpyError
from ..options.bench import OpsOptions
from ..system.words import columns, count_of

DRAWN = 1 << 20  # random numbers; larger arrays repeat them
BUDGET = 0.4  # seconds per case
REPEATS = 5  # minimum per case
UNSTEADY = 1.15  # highest peak / lowest peak (or rounds of a plan) that indicates interference by other programs


@dataclass(frozen=True)
class Case:
    """A problem size. Each operation uses only its own dimensions; `n` is a flat length, attention's C is NH·HS."""

    B: int = 1
    T: int = 1
    C: int = 1
    NH: int = 1
    NKV: int = 0  # 0: as many as NH
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
        """Return BT."""
        return self.B * self.T

    @property
    def kv_heads(self) -> int:
        """Return NKV."""
        return self.NKV or self.NH

    @property
    def head_size(self) -> int:
        """Return HS."""
        return self.C // self.NH

    @property
    def qkv_size(self) -> int:
        """Return W, the columns of queries, keys and values."""
        return (self.NH + 2 * self.kv_heads) * self.head_size


C, V, VP, CONTEXT = 768, 50257, 50304, 1024  # GPT-2 124M
MLP = 576, 1536  # C and the MLP's width of SmolLM2 135M
SHAPES = ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C), (C, VP))  # C → OC: qkv, attention's output, MLP, head


def _products(*variants: str) -> list[Case]:
    """Return the five shapes, each in its variant, with 256 and 1024 rows."""
    shapes = list(zip(SHAPES, variants, strict=True))
    return [Case(4, T, C=i, OC=o, variant=variant) for T in (64, 256) for (i, o), variant in shapes]


def _mlps(C: int, OC: int, *variants: str) -> list[Case]:
    """Return a product of a SwiGLU MLP, with 256 and 1024 rows."""
    return [Case(4, T, C=C, OC=OC, variant=variant) for T in (64, 256) for variant in variants]


def _sequences(times: tuple[int, ...] = (64, 256, 1024), **sizes: Any) -> list[Case]:
    """Return batches of four rows of each length."""
    return [Case(4, T, **sizes) for T in times]


GROUPED = Case(4, 1024, C=2048, NH=32, NKV=8)  # attention of Llama 3.2 1B

BENCH: dict[str, list[Case]] = {
    "linear_forward": _products("bias", "bias", "bias gelu", "bias", "") + _mlps(*MLP, "swiglu"),
    # An activation belongs to the product reading it.
    "linear_backward": _products("bias", "bias", "bias", "bias gelu", "")
    + _mlps(*MLP[::-1], "swiglu", "frozen swiglu"),
    **dict.fromkeys(("attention_forward", "attention_backward"), [*_sequences(C=C, NH=12), GROUPED]),
    "classifier": [c for v in ("losses", "frozen", "") for c in _sequences((64, 256), C=C, V=V, Vp=VP, variant=v)],
    **dict.fromkeys(("layernorm_forward", "residual_layernorm_forward", "layernorm_backward"), _sequences(C=C)),
    **dict.fromkeys(("rmsnorm_forward", "residual_rmsnorm_forward", "rmsnorm_backward"), _sequences(C=MLP[0])),
    **dict.fromkeys(("head_rmsnorm_forward", "head_rmsnorm_backward"), _sequences(C=2048, NH=16, NKV=8)),  # Qwen3-0.6B
    "rope": _sequences(C=MLP[0], NH=9, NKV=3),
    **dict.fromkeys(
        ("activation_forward", "activation_backward"), _sequences(C=4 * C) + _sequences(C=MLP[1], variant="swiglu")
    ),
    **dict.fromkeys(("add_columns", "take_columns"), _sequences(C=C)),
    **dict.fromkeys(("embedding_forward", "embedding_backward"), _sequences(C=C, V=V, Vp=VP)),
    **dict.fromkeys(("adamw", "global_norm", "digest", "narrow", "zero"), [Case(n=20_000_000)]),
    "pack": [Case(C=i, OC=o) for i, o in SHAPES],
    "packed_linear_forward": [
        case for B in (1, 8) for case in (*(Case(B, C=i, OC=o) for i, o in SHAPES), Case(B, 1, *MLP, variant="swiglu"))
    ],
    "cache_fill": [Case(1, T, C=C, NH=12) for T in (64, 1024)],
    "attention_decode": [Case(B, T, C=C, NH=12) for B in (1, 8) for T in (64, 1024)] + [replace(GROUPED, B=1)],
}
# From the arguments of a call: Σ over its products; causal attention computes half of the T² scores.
FLOPS: dict[str, Callable[[dict[str, Any]], int]] = {
    "linear_forward": lambda a: 2 * a["inp"].size // a["inp"].shape[-1] * a["weight"].size,
    "linear_backward": lambda a: (2 if a["dweight"] is None else 4) * a["dout"].size * a["weight"].shape[1],
    "attention_forward": lambda a: 2 * a["out"].size * a["stats"].shape[-1],
    "attention_backward": lambda a: 4 * a["dout"].size * a["stats"].shape[-1],
    "classifier": lambda a: (6 - 2 * (a["dinp"] is None) - 2 * (a["dwte"] is None)) * a["inp"].size * a["wte"].shape[0],
}
# The arguments of each operation, in the order and notation of the seam: unmarked arrays are of the stored dtype, `:=`
# and `+=` mark outputs. S: rows of wpe, or positions of a cache. OC' and C': columns that an activation of OC or C has
# read.
ARGUMENTS = {
    "embedding_forward": "out (BT,C) wide :=; tokens; wte (Vp,C); wpe (S,C); positions",
    "embedding_backward": "dwte (Vp,C) wide +=; dwpe (S,C) wide :=; dout (BT,C) wide; tokens; accumulate; positions",
    "layernorm_forward": (
        "out (BT,C) :=; mean (BT) wide :=; rstd (BT) wide :=; inp (BT,C) wide; weight (C) wide; bias (C) wide"
    ),
    "residual_layernorm_forward": (
        "resid (BT,C) wide :=; out (BT,C) :=; mean (BT) wide :=; rstd (BT) wide :=; inp1 (BT,C) wide; inp2 (BT,C); "
        "weight (C) wide; bias (C) wide"
    ),
    "layernorm_backward": (
        "dinp (BT,C) wide +=; dweight (C) wide :=; dbias (C) wide :=; dout (BT,C); inp (BT,C) wide; mean (BT) wide; "
        "rstd (BT) wide; weight (C) wide; accumulate"
    ),
    "rmsnorm_forward": "out (BT,C) :=; rstd (BT) wide :=; inp (BT,C) wide; weight (C) wide; eps",
    "residual_rmsnorm_forward": (
        "resid (BT,C) wide :=; out (BT,C) :=; rstd (BT) wide :=; inp1 (BT,C) wide; inp2 (BT,C); weight (C) wide; eps"
    ),
    "rmsnorm_backward": (
        "dinp (BT,C) wide +=; dweight (C) wide :=; dout (BT,C); inp (BT,C) wide; rstd (BT) wide; weight (C) wide; "
        "accumulate"
    ),
    "head_rmsnorm_forward": (
        "out (BT,W) :=; rstd (BT,NH+NKV) wide :=; inp (BT,W); q_weight (HS) wide; k_weight (HS) wide; eps"
    ),
    "head_rmsnorm_backward": (
        "dinp (BT,W) :=; dq_weight (HS) wide :=; dk_weight (HS) wide :=; dout (BT,W); inp (BT,W); "
        "rstd (BT,NH+NKV) wide; q_weight (HS) wide; k_weight (HS) wide; accumulate"
    ),
    "rope": "x (BT,W) :=; cos; sin; positions; heads; inverse",
    "activation_forward": "out (BT,C) :=; pre (BT,C')",
    "activation_backward": "dpre (BT,C') :=; dout (BT,C); pre (BT,C')",
    "add_columns": "out (BT,3C) :=; x (BT,C); first; scale",
    "take_columns": "out (BT,C) :=; x (BT,3C); first; scale",
    "linear_forward": "out (BT,OC) :=; inp (BT,C); weight (OC',C); bias (OC') wide; pre (BT,OC') :=",
    "linear_backward": (
        "dinp (BT,C') :=; dweight (OC,C) wide :=; dbias (OC) wide :=; dout (BT,OC); inp (BT,C); weight (OC,C); "
        "pre (BT,C'); accumulate"
    ),
    "attention_forward": "out (B,T,C) :=; stats (B,NH,T) wide :=; qkv (B,T,W); positions",
    "attention_backward": ("dqkv (B,T,W) :=; dout (B,T,C); qkv (B,T,W); out (B,T,C); stats (B,NH,T) wide; positions"),
    "classifier": (
        "losses (BT) wide :=; dinp (BT,C) :=; dwte (Vp,C) wide :=; inp (BT,C); wte (Vp,C); targets; vocab_size; scale; "
        "accumulate"
    ),
    "adamw": (
        "param (n) wide :=; grad (n) wide; m (n) wide :=; v (n) wide :=; lr; beta1; beta2; eps; weight_decay; "
        "grad_scale; step; stored (n) :="
    ),
    "global_norm": "grad (n) wide",
    "digest": "x (n) wide",
    "narrow": "out (n) :=; x (n) wide",
    "zero": "x (n) wide :=",
    "pack": "packed (packed) :=; weight (OC',C)",
    "packed_linear_forward": "out (BT,OC) :=; inp (BT,C); packed (packed); bias (OC') wide; pre (BT,OC') :=",
    "cache_fill": "cache (B,NKV,2,T,HS) :=; qkv (B,T,W)",
    "attention_decode": "out (B,C) :=; cache (B,NKV,2,T,HS); qkv (B,W); slots; positions",
}
# Operations that compute the inputs of another one: called first, on the arguments they share.
BEFORE = {f"{name}_backward": f"{name}_forward" for name in ("layernorm", "rmsnorm", "head_rmsnorm", "attention")}
BEFORE["packed_linear_forward"] = "pack"


def arguments(op: str, c: Case, ops: Any) -> dict[str, Any]:
    """Draw the arguments of an operation, by name, in the order of the seam: small random numbers."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, c.V, (c.B, c.T), dtype=np.int32)
    heads, HS = c.NH + c.kv_heads, c.head_size
    angles = np.arange(c.T, dtype=np.float32)[:, None] * np.geomspace(1, 1e-4, HS // 2, dtype=np.float32)
    decoded, positions = np.full(c.B, c.T - 1, np.int32), np.tile(np.arange(c.T, dtype=np.int32), c.B)
    others: dict[str, Any] = {
        "tokens": tokens, "targets": tokens.reshape(-1), "vocab_size": c.V, "scale": 1 / c.rows, "accumulate": False,
        "lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "grad_scale": 0.5, "step": 3,
        "slots": np.arange(c.B, dtype=np.int32), "positions": decoded if op == "attention_decode" else positions,
        "cos": np.cos(angles), "sin": np.sin(angles), "heads": heads, "inverse": False, "first": c.C,
    }  # fmt: skip
    sizes = {f.name: getattr(c, f.name) for f in fields(c)} | {"2": 2, "3C": 3 * c.C, "BT": c.rows, "NKV": c.kv_heads}
    columns_read = 2 if "swiglu" in c.variant else 1
    sizes |= {"C'": columns_read * c.C, "OC'": columns_read * c.OC, "HS": HS, "W": c.qkv_size, "NH+NKV": heads}
    sizes |= {"S": max(CONTEXT, c.T), "packed": ops.packed_size(sizes["OC'"], c.C)}
    unused = set()
    if "linear" in op:
        unused = {name for name, word in (("bias", "bias"), ("pre", "lu")) if word not in c.variant}  # gelu, swiglu
        unused |= {"dweight", "dbias", "inp"} if "frozen" in c.variant else set()
    elif op.startswith("embedding") or op in ("attention_forward", "attention_backward"):
        unused = {"positions"} | ({"wpe", "dwpe"} if c.variant == "tokens" else set())
    elif op == "classifier":
        unused = {"losses": {"dinp", "dwte"}, "frozen": {"dwte"}}.get(c.variant, set())
    elif op == "adamw" and ops.dtype == ops.wide:
        unused = {"stored"}
    args: dict[str, Any] = {}
    for text in ARGUMENTS[op].split("; "):
        name, *marks = text.split()
        if name in unused or not marks:
            args[name] = None if name in unused else others[name]
            continue
        shape = tuple(sizes[dimension] for dimension in marks[0][1:-1].split(","))
        x = args[name] = ops.empty(shape, ops.wide if "wide" in marks else ops.dtype)
        std = c.C**-0.5 if len(shape) == 2 and name in ("weight", "wte") else 1.0  # of matrices
        drawn = std * rng.standard_normal(min(x.size, DRAWN), np.float32)
        x[...] = np.resize(np.square(drawn) if name == "v" else drawn, shape).astype(x.dtype)
    if op in BEFORE:
        before = arguments(BEFORE[op], c, ops)
        getattr(ops, BEFORE[op])(*(before | {k: v for k, v in args.items() if k in before}).values())
    return args


def moved_bytes(op: str, args: dict[str, Any]) -> int:
    """Return the bytes that one call moves between memory and caches: every input once, every output twice."""
    written = {text.split()[0] for text in ARGUMENTS[op].split("; ") if text.endswith("=")}
    part = {}  # elements moved, where they are fewer
    if op.startswith("embedding"):  # the rows of the tokens, and the first T of wpe
        count, T, C = args["tokens"].size, args["tokens"].shape[-1], args["wte" if "wte" in args else "dwte"].shape[-1]
        part = {"wte": count * C, "dwte": count * C, "wpe": T * C}
    elif op.endswith("columns"):  # as many of either
        part = dict.fromkeys(("out", "x"), min(args["out"].size, args["x"].size))
    return sum(
        (2 if name in written else 1) * part.get(name, x.size) * x.itemsize
        for name, x in args.items()
        if isinstance(x, np.ndarray)
    )


def time_case(
    ops: Any, op: str, case: Case, budget: float, repeats: int, before: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Return median and minimum ms of a case, and its work: 10⁹ FLOPs and bytes.

    Calls repeat for `budget` seconds, but at least `repeats` times; `before` runs before each call, untimed.
    """
    args = arguments(op, case, ops)
    call, values = getattr(ops, op), tuple(args.values())
    call(*values)
    times: list[float] = []
    stop = time.perf_counter() + budget
    while time.perf_counter() < stop or len(times) < repeats:
        before()
        start = time.perf_counter()
        call(*values)
        times.append(time.perf_counter() - start)
    return {
        "op": op, "case": str(case), "median_ms": 1e3 * statistics.median(times), "min_ms": 1e3 * min(times),
        "gflop": FLOPS[op](args) / 1e9 if op in FLOPS else 0.0, "gb": moved_bytes(op, args) / 1e9,
    }  # fmt: skip


def rates_of(machine: Machine) -> tuple[float, float]:
    """Measure the FMA peak, GFLOP/s, and the stream bandwidth, GB/s."""
    return machine.measure_peak(), machine.measure_bandwidth()


def bench_ops(options: OpsOptions, load: Callable[..., Any] = backend.load) -> dict[str, Any]:
    """Time the cases; `load` creates the machine, and a second one with one thread to measure its peaks.

    Times in ms; `peaks` in "GFLOP/s" and "GB/s" (10⁹ bytes), of one thread and of all; `steady`: the peaks hardly vary.
    """
    ops: Machine = load("cpu", threads=options.threads, dtype=options.dtype)
    single: Machine = load("cpu", threads=1, dtype=options.dtype)
    one, rates, results = rates_of(single), [], []
    for op, cases in BENCH.items():
        if options.op not in (None, op) or (op == "narrow" and ops.dtype == ops.wide):
            continue
        rates.append(rates_of(ops))
        results += [time_case(ops, op, case, BUDGET, REPEATS) for case in cases]
    if not results:
        raise LlmpyError("bench.no-case", f"--op {options.op} has no case in {ops.dtype}", "Use --dtype bfloat16")
    peaks = dict(zip(("GFLOP/s", "GB/s"), zip(*rates, rates_of(ops), strict=True), strict=True))
    all_ = {unit: statistics.median(found) for unit, found in peaks.items()}
    for result in results:
        floors = {unit: result[work] / all_[unit] for unit, work in (("GFLOP/s", "gflop"), ("GB/s", "gb"))}
        unit = max(floors, key=lambda name: floors[name])
        share = 1e3 * floors[unit] / result["median_ms"]
        result |= {"unit": unit, "rate": share * all_[unit], "share_of_peak": share}
    return {
        "dtype": np.dtype(ops.dtype).name, "threads": ops.threads, "isa": ops.isa,
        "peaks": {u: {"one_thread": rate, "all_threads": all_[u]} for u, rate in zip(peaks, one, strict=True)},
        "steady": max(peaks["GFLOP/s"]) < UNSTEADY * min(peaks["GFLOP/s"]),
        "ops": results,
    }  # fmt: skip


def table(n: dict[str, Any]) -> str:
    """Return the result of `bench_ops` as a table."""
    peaks = [
        (what, *(f"{rate:,.1f} {unit}" for rate in n["peaks"][unit].values()))  # of one thread, of all
        for what, unit in (("peak of multiply-adds", "GFLOP/s"), ("bandwidth of a stream", "GB/s"))
    ]
    head = [(f"{n['isa']}, {n['dtype']}", "1 thread", count_of(n["threads"], "thread")), *peaks]
    body = [("operation", "case", "ms", "rate", "of peak")]
    for r in n["ops"]:
        rate, share = f"{r['rate']:,.1f} {r['unit']:<7}", f"{100 * r['share_of_peak']:.0f} %"
        body.append((r["op"], r["case"], f"{r['median_ms']:,.3f}", rate, share))
    warning = "" if n["steady"] else "\nwarning: the peak varied, probably due to other programs. Measure again alone"
    return columns(head) + warning + "\n\n" + columns(body)
