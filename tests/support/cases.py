"""One list of cases per operation of the seam, for correctness, gradients and benchmarks.

`CASES[op]` lists problem sizes, odd on purpose: 1×1; rows and channels that are no multiple of a vector or tile;
sequences around a block of 64; and one like GPT-2. `prepare(op, case)` draws the inputs and returns a `Call`: the
arguments in the seam's order, with outputs filled by their contract, `:=` with NaN and `+=` with ones, to detect
elements that were not written or not kept.

Floats have two types, as in the seam: operands and results of products are stored in `dtype`; others are wide, float32
if `dtype` is bfloat16, else the same. `Draw.normal` and `Out` are stored unless `wide`. Inputs are exact in their type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from llmpy.backend.reference import Reference, activation
from llmpy.bench.ops import Case as Size

Args = dict[str, Any]
REF = Reference(np.float64)


class Case(Size):
    """The benchmark's problem size, extended for tests."""

    @property
    def leading(self) -> tuple[int, ...]:
        """The shape of BT: (T,) for one sequence and (B, T) for more, to cover both."""
        return (self.T,) if self.B == 1 else (self.B, self.T)

    @property
    def positions(self) -> np.ndarray | None:
        """Positions (B, T) in the documents whose lengths the variant lists; each sequence starts with another one."""
        lengths = [int(word) for word in self.variant.split() if word.isdigit()]
        if not lengths:
            return None
        rows = ([n for n in lengths[b % len(lengths) :] + lengths * self.T for n in range(n)] for b in range(self.B))
        return np.array([row[: self.T] for row in rows], np.int32)


@dataclass(frozen=True)
class Out:
    """An output: its contract, `:=` or `+=`, and shape; an in-place update has its start values."""

    contract: str
    shape: tuple[int, ...] = ()
    start: np.ndarray | None = None
    wide: bool = False

    def array(self, draw: Draw) -> np.ndarray:
        """Return the output before the call."""
        dtype = draw.wide if self.wide else draw.dtype
        if self.start is not None:
            return self.start.astype(dtype)
        return np.full(self.shape, np.nan if self.contract == ":=" else 1, dtype)


@dataclass
class Call:
    """An operation with its arguments in order, and the names of its outputs."""

    op: str
    args: Args
    outputs: tuple[str, ...]

    def run(self, ops: Any) -> Any:
        """Call the operation of a backend."""
        return getattr(ops, self.op)(*self.args.values())

    def map(self, change: Callable[[str, np.ndarray], np.ndarray]) -> Call:
        """Return the call with every array replaced by change(name, array)."""
        args = {k: change(k, v) if isinstance(v, np.ndarray) else v for k, v in self.args.items()}
        return Call(self.op, args, self.outputs)

    def astype(self, dtype: Any) -> Call:
        """Return the call with copies of every array, floats in `dtype`."""
        return self.map(lambda _, x: x.copy() if x.dtype.kind == "i" else x.astype(dtype))

    def copy(self) -> Call:
        """Return the call with copies of every array."""
        return self.map(lambda _, x: x.copy())


class Draw:
    """Seeded random values in `dtype`, or in `wide`."""

    def __init__(self, dtype: Any, seed: int) -> None:
        self.dtype = np.dtype(dtype)
        self.wide = np.promote_types(self.dtype, np.float32)
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0, wide: bool = False) -> np.ndarray:
        return self.round(self.rng.normal(mean, std, shape), wide)

    def ints(self, high: int, *shape: int, low: int = 0) -> np.ndarray:
        return self.rng.integers(low, high, shape, dtype=np.int32)

    def round(self, x: np.ndarray, wide: bool = False) -> np.ndarray:
        """Return x in the type in which forward stores it for backward."""
        return x.astype(self.wide if wide else self.dtype)


def double(x: np.ndarray) -> np.ndarray:
    """Return x in float64, to compute another input from it."""
    return x.astype(np.float64)


def embedding_forward(c: Case, d: Draw) -> Args:
    return {
        "out": Out(":=", (*c.leading, c.C), wide=True),
        "tokens": d.ints(c.V, c.B, c.T),
        "wte": d.normal(c.Vp, c.C),
        "wpe": None if c.variant == "tokens" else d.normal(c.T + 2, c.C),  # a context longer than the batch
        "positions": c.positions,
    }


def embedding_backward(c: Case, d: Draw, accumulate: bool) -> Args:
    return {
        "dwte": Out("+=", (c.Vp, c.C), wide=True),
        "dwpe": None if c.variant == "tokens" else Out("+=" if accumulate else ":=", (c.T + 2, c.C), wide=True),
        "dout": d.normal(*c.leading, c.C, wide=True),
        "tokens": d.ints(c.V, c.B, c.T),
        "accumulate": accumulate,
        "positions": c.positions,
    }


def layernorm_forward(c: Case, d: Draw) -> Args:
    return {
        "out": Out(":=", (*c.leading, c.C)),
        "mean": Out(":=", c.leading, wide=True),
        "rstd": Out(":=", c.leading, wide=True),
        # Far from zero, as in residual streams: Σx² − (Σx)² in one pass would cancel.
        "inp": d.normal(*c.leading, c.C, mean=5, wide=True),
        "weight": d.normal(c.C, mean=1, wide=True),
        "bias": d.normal(c.C, wide=True),
    }


def residual_layernorm_forward(c: Case, d: Draw) -> Args:
    plain = layernorm_forward(c, d)
    inputs = {"inp1": plain.pop("inp"), "inp2": d.normal(*c.leading, c.C)}
    after = {"weight": plain.pop("weight"), "bias": plain.pop("bias")}
    return {"resid": Out(":=", (*c.leading, c.C), wide=True), **plain, **inputs, **after}


def layernorm_backward(c: Case, d: Draw, accumulate: bool) -> Args:
    gradient = "+=" if accumulate else ":="
    inp, weight = d.normal(*c.leading, c.C, mean=5, wide=True), d.normal(c.C, mean=1, wide=True)
    out, mean, rstd = np.empty(inp.shape), np.empty(c.leading), np.empty(c.leading)
    REF.layernorm_forward(out, mean, rstd, double(inp), double(weight), np.zeros(c.C))
    trained = c.variant != "frozen"
    return {
        "dinp": Out("+=", inp.shape, wide=True),
        "dweight": Out(gradient, (c.C,), wide=True) if trained else None,
        "dbias": Out(gradient, (c.C,), wide=True) if trained else None,
        "dout": d.normal(*inp.shape),
        "inp": inp,
        "mean": d.round(mean, wide=True),
        "rstd": d.round(rstd, wide=True),
        "weight": weight,
        "accumulate": accumulate,
    }


EPSILON = 1e-5


def rmsnorm_forward(c: Case, d: Draw) -> Args:
    return {
        "out": Out(":=", (*c.leading, c.C)),
        "rstd": Out(":=", c.leading, wide=True),
        "inp": d.normal(*c.leading, c.C, mean=1, wide=True),
        "weight": d.normal(c.C, mean=1, wide=True),
        "eps": EPSILON,
    }


def residual_rmsnorm_forward(c: Case, d: Draw) -> Args:
    plain = rmsnorm_forward(c, d)
    inputs = {"inp1": plain.pop("inp"), "inp2": d.normal(*c.leading, c.C)}
    after = {name: plain.pop(name) for name in ("weight", "eps")}
    return {"resid": Out(":=", (*c.leading, c.C), wide=True), **plain, **inputs, **after}


def rmsnorm_backward(c: Case, d: Draw, accumulate: bool) -> Args:
    inp, weight = d.normal(*c.leading, c.C, mean=1, wide=True), d.normal(c.C, mean=1, wide=True)
    rstd = np.empty(c.leading)
    REF.rmsnorm_forward(np.empty(inp.shape), rstd, double(inp), double(weight), EPSILON)
    return {
        "dinp": Out("+=", inp.shape, wide=True),
        "dweight": None if c.variant == "frozen" else Out("+=" if accumulate else ":=", (c.C,), wide=True),
        "dout": d.normal(*inp.shape),
        "inp": inp,
        "rstd": d.round(rstd, wide=True),
        "weight": weight,
        "accumulate": accumulate,
    }


def head_rmsnorm_forward(c: Case, d: Draw) -> Args:
    return {
        "out": Out(":=", (*c.leading, c.qkv_size)),
        "rstd": Out(":=", (*c.leading, c.NH + c.kv_heads), wide=True),
        "inp": d.normal(*c.leading, c.qkv_size),
        "q_weight": d.normal(c.C // c.NH, mean=1, wide=True),
        "k_weight": d.normal(c.C // c.NH, mean=1, wide=True),
        "eps": EPSILON,
    }


def head_rmsnorm_backward(c: Case, d: Draw, accumulate: bool) -> Args:
    forward = head_rmsnorm_forward(c, d)
    inp, weights = forward["inp"], (forward["q_weight"], forward["k_weight"])
    rstd = np.empty(forward["rstd"].shape)
    REF.head_rmsnorm_forward(np.empty(inp.shape), rstd, double(inp), *map(double, weights), EPSILON)
    gradient = None if c.variant == "frozen" else Out("+=" if accumulate else ":=", weights[0].shape, wide=True)
    return {
        "dinp": Out(":=", inp.shape),
        "dq_weight": gradient,
        "dk_weight": gradient,
        "dout": d.normal(*inp.shape),
        "inp": inp,
        "rstd": d.round(rstd, wide=True),
        "q_weight": weights[0],
        "k_weight": weights[1],
        "accumulate": accumulate,
    }


def rope(c: Case, d: Draw) -> Args:
    angles = d.normal(c.T + 2, c.C // c.NH // 2, std=3, wide=True)  # a context longer than the batch
    return {
        "x": Out("in place", start=d.normal(*c.leading, c.qkv_size)),
        "cos": np.cos(angles),
        "sin": np.sin(angles),
        "positions": d.ints(c.T + 2, *c.leading),
        "heads": c.NH + c.kv_heads,
        "inverse": c.variant == "inverse",
    }


def pre_columns(c: Case, C: int) -> int:
    """Return the columns that an activation of C columns reads."""
    return 2 * C if "swiglu" in c.variant else C


def activation_forward(c: Case, d: Draw) -> Args:
    return {"out": Out(":=", (*c.leading, c.C)), "pre": d.normal(*c.leading, pre_columns(c, c.C), std=2)}


def activation_backward(c: Case, d: Draw) -> Args:
    pre = d.normal(*c.leading, pre_columns(c, c.C), std=2)
    return {"dpre": Out(":=", pre.shape), "dout": d.normal(*c.leading, c.C), "pre": pre}


def linear_forward(c: Case, d: Draw) -> Args:
    OC = pre_columns(c, c.OC)
    return {
        "out": Out(":=", (*c.leading, c.OC)),
        "inp": d.normal(*c.leading, c.C),
        "weight": d.normal(OC, c.C, std=c.C**-0.5),
        "bias": d.normal(OC, wide=True) if "bias" in c.variant else None,
        "pre": Out(":=", (*c.leading, OC)) if "lu" in c.variant else None,  # gelu, swiglu
    }


def linear_backward(c: Case, d: Draw, accumulate: bool) -> Args:
    gradient = "+=" if accumulate else ":="
    inp = pre = d.normal(*c.leading, pre_columns(c, c.C))
    if "lu" in c.variant:
        inp = d.round(activation(double(pre), c.C))
    frozen = "frozen" in c.variant
    return {
        "dinp": Out(":=", pre.shape),
        "dweight": None if frozen else Out(gradient, (c.OC, c.C), wide=True),
        "dbias": None if frozen else Out(gradient, (c.OC,), wide=True),
        "dout": d.normal(*c.leading, c.OC),
        "inp": None if frozen else inp,
        "weight": d.normal(c.OC, c.C, std=c.C**-0.5),
        "pre": pre if "lu" in c.variant else None,
        "accumulate": accumulate,
    }


def add_columns(c: Case, d: Draw) -> Args:
    return {"out": Out("+=", (*c.leading, c.C + 5)), "x": d.normal(*c.leading, c.C), "first": c.C % 5, "scale": 0.7}


def take_columns(c: Case, d: Draw) -> Args:
    return {"out": Out(":=", (*c.leading, c.C)), "x": d.normal(*c.leading, c.C + 5), "first": c.C % 5, "scale": 0.7}


def attention_forward(c: Case, d: Draw) -> Args:
    return {
        "out": Out(":=", (*c.leading, c.C)),
        "stats": Out(":=", (c.B, c.NH, c.T), wide=True),
        "qkv": d.normal(*c.leading, c.qkv_size, std=1.5),
        "positions": c.positions,
    }


def attention_backward(c: Case, d: Draw) -> Args:
    qkv = d.normal(*c.leading, c.qkv_size, std=1.5)
    out, stats = np.empty((*c.leading, c.C)), np.empty((c.B, c.NH, c.T))
    REF.attention_forward(out, stats, double(qkv), c.positions)
    return {
        "dqkv": Out(":=", qkv.shape),
        "dout": d.normal(*out.shape),
        "qkv": qkv,
        "out": d.round(out),
        "stats": d.round(stats, wide=True),
        "positions": c.positions,
    }


def classifier(c: Case, d: Draw, accumulate: bool) -> Args:
    gradient = "+=" if accumulate else ":="
    targets = d.ints(c.V, c.B, c.T)
    if c.variant == "masked":
        targets.flat[::3] = -1
    if c.variant == "all masked":
        targets[:] = -1
    wanted = c.variant != "losses"
    return {
        "losses": Out(":=", c.leading, wide=True),
        "dinp": Out(":=", (*c.leading, c.C)) if wanted else None,
        "dwte": Out(gradient, (c.Vp, c.C), wide=True) if wanted and c.variant != "frozen" else None,
        "inp": d.normal(*c.leading, c.C),
        "wte": d.normal(c.Vp, c.C, std=2 * c.C**-0.5),
        "targets": targets,
        "vocab_size": c.V,
        "scale": 0.75,
        "accumulate": accumulate,
    }


def adamw(c: Case, d: Draw) -> Args:
    return {
        "param": Out("in place", start=d.normal(c.n, wide=True), wide=True),
        "grad": d.normal(c.n, wide=True),
        "m": Out("in place", start=d.normal(c.n, std=0.1, wide=True), wide=True),
        "v": Out("in place", start=np.abs(d.normal(c.n, std=0.01, wide=True)), wide=True),
        "lr": 1e-2,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1 if c.variant == "decay" else 0.0,
        "grad_scale": 0.5,
        "step": 3,
        "stored": Out(":=", (c.n,)) if d.dtype != d.wide else None,
    }


def global_norm(c: Case, d: Draw) -> Args:
    return {"grad": d.normal(c.n, wide=True)}


def narrow(c: Case, d: Draw) -> Args:
    return {"out": Out(":=", (c.n,)), "x": d.normal(c.n, wide=True)}


BUILD: dict[str, Callable[..., Args]] = {
    f.__name__: f
    for f in (
        embedding_forward, embedding_backward, layernorm_forward, residual_layernorm_forward,
        layernorm_backward, rmsnorm_forward, residual_rmsnorm_forward, rmsnorm_backward, head_rmsnorm_forward,
        head_rmsnorm_backward, rope, activation_forward, activation_backward, linear_forward, linear_backward,
        add_columns, take_columns, attention_forward, attention_backward, classifier, adamw, global_norm, narrow,
    )
}  # fmt: skip
ACCUMULATES = (
    "embedding_backward", "layernorm_backward", "rmsnorm_backward", "head_rmsnorm_backward", "linear_backward",
    "classifier",
)  # fmt: skip


def prepare(op: str, case: Case, accumulate: bool = False, dtype: Any = np.float32, seed: int = 1) -> Call:
    """Draw the arguments of a call, stored floats in `dtype`; `accumulate` applies to operations that have it."""
    draw = Draw(dtype, seed)
    args = BUILD[op](case, draw, accumulate) if op in ACCUMULATES else BUILD[op](case, draw)
    outputs = tuple(k for k, v in args.items() if isinstance(v, Out))
    return Call(op, {k: v.array(draw) if isinstance(v, Out) else v for k, v in args.items()}, outputs)


EMBEDDING = [
    Case(),
    Case(T=7, C=3, V=2, Vp=2),
    Case(B=3, T=65, C=17, V=97, Vp=128),
    Case(B=2, T=63, C=100, V=300, Vp=384),
    Case(T=255, C=129, V=5, Vp=128),
    Case(B=2, T=32, C=192, V=300, Vp=384),
    Case(B=2, T=33, C=65, V=97, Vp=128, variant="tokens"),
    Case(B=3, T=40, C=70, V=97, Vp=128, variant="7 1 20"),
]
ROWS = [
    Case(),
    Case(T=7, C=1),
    Case(C=129),
    Case(T=7, C=3),
    Case(T=255, C=17),
    Case(B=3, T=5, C=100),
    Case(T=255, C=129),
    Case(T=64, C=192),
    Case(T=1025, C=33),
]
FROZEN = [Case(T=7, C=3, variant="frozen"), Case(B=3, T=33, C=129, variant="frozen")]
HEADS = [
    Case(C=2),
    Case(T=7, C=12, NH=3, NKV=1),
    Case(B=3, T=33, C=100, NH=5, NKV=5),
    Case(T=65, C=396, NH=6, NKV=2),
    Case(T=65, C=576, NH=9, NKV=3),
    Case(B=2, T=70, C=256, NH=2, NKV=1),
]
ACTIVATION = [
    *ROWS,
    Case(T=3, C=1025, variant="swiglu"),
    *(Case(B=c.B, T=c.T, C=c.C, variant="swiglu") for c in ROWS),
]
LINEAR = [
    Case(),
    Case(C=3, OC=17),
    Case(T=7, C=1, OC=3, variant="bias"),
    Case(T=7, C=17, OC=1, variant="bias gelu"),
    Case(T=255, C=3, OC=100, variant="gelu"),
    Case(B=3, T=5, C=100, OC=129, variant="bias"),
    Case(T=63, C=129, OC=51, variant="bias gelu"),
    Case(T=65, C=300, OC=17, variant="bias"),
    Case(B=2, T=32, C=192, OC=576, variant="bias"),
    Case(T=64, C=192, OC=768, variant="bias gelu"),
    Case(T=64, C=768, OC=192, variant="bias gelu"),
    Case(T=600, C=33, OC=49, variant="bias gelu"),
    Case(T=9, C=100, OC=6200, variant="gelu"),  # dinp in two segments and more
    Case(T=801, C=1601, OC=17, variant="bias"),  # BT and C beyond a panel's depth, with odd remainders
    Case(variant="swiglu"),
    Case(T=7, C=17, OC=3, variant="bias swiglu"),
    Case(B=3, T=5, C=100, OC=129, variant="swiglu"),
    Case(T=530, C=33, OC=49, variant="bias swiglu"),  # blocks of rows
    Case(T=9, C=1601, OC=50, variant="bias swiglu"),
    Case(T=9, C=20, OC=6200, variant="swiglu"),
    Case(T=24, C=576, OC=1536, variant="swiglu"),  # SmolLM2 135M
]
LINEAR_BACKWARD = [
    *LINEAR,
    Case(T=24, C=1536, OC=576, variant="swiglu"),
    Case(T=7, C=17, OC=3, variant="frozen"),
    Case(T=801, C=50, OC=33, variant="frozen gelu"),
    Case(T=9, C=50, OC=6200, variant="frozen swiglu"),
]
ATTENTION = [
    Case(),
    Case(B=2, T=7, C=3, NH=3),
    Case(B=2, T=63, C=34, NH=2),
    Case(T=65, C=100, NH=4),
    Case(T=130, C=129, NH=3),
    Case(B=3, T=64, C=16, NH=1),
    Case(B=2, T=130, C=192, NH=3),
    Case(T=257, C=64, NH=1),
    Case(T=9, C=8, NH=4, NKV=1),
    Case(B=2, T=131, C=576, NH=9, NKV=3),
    Case(T=97, C=2048, NH=16, NKV=8),
    Case(B=2, T=200, C=63, NH=7, NKV=1),
    # One document starts at 96, a border of tiles; some have length 1.
    Case(B=2, T=210, C=102, NH=6, NKV=2, variant="1 95 1 101 12"),
    Case(T=300, C=64, NH=1, variant="53 200 1"),
    Case(B=2, T=5, C=3, NH=3, variant="1 2"),
]
CLASSIFIER = [
    Case(),
    Case(T=7, C=1, V=97, Vp=128, variant="masked"),
    Case(T=1, C=17, V=128, Vp=128),
    Case(T=255, C=3, V=97, Vp=128),
    Case(B=3, T=5, C=100, V=300, Vp=384, variant="masked"),
    Case(T=7, C=17, V=97, Vp=128, variant="all masked"),
    Case(T=65, C=129, V=300, Vp=384, variant="losses"),
    Case(B=2, T=32, C=192, V=300, Vp=384, variant="masked"),
    Case(T=600, C=17, V=128, Vp=128, variant="masked"),
    Case(T=9, C=16, V=50257, Vp=50304),
    Case(T=600, C=17, V=97, Vp=128, variant="frozen"),
]
FLAT = [Case(n=n) for n in (1, 17, 1000, 70001)]
CASES: dict[str, list[Case]] = {
    "embedding_forward": EMBEDDING,
    "embedding_backward": EMBEDDING,
    "layernorm_forward": ROWS,
    "residual_layernorm_forward": ROWS,
    "layernorm_backward": [*ROWS, *FROZEN],
    "rmsnorm_forward": ROWS,
    "residual_rmsnorm_forward": ROWS,
    "rmsnorm_backward": [*ROWS, *FROZEN],
    "head_rmsnorm_forward": HEADS,
    "head_rmsnorm_backward": [*HEADS, Case(B=3, T=33, C=100, NH=5, NKV=1, variant="frozen")],
    "rope": [*HEADS, Case(B=3, T=33, C=100, NH=5, NKV=1, variant="inverse")],
    "activation_forward": ACTIVATION,
    "activation_backward": ACTIVATION,
    "linear_forward": LINEAR,
    "linear_backward": LINEAR_BACKWARD,
    "add_columns": ROWS,
    "take_columns": ROWS,
    "attention_forward": ATTENTION,
    "attention_backward": ATTENTION,
    "classifier": CLASSIFIER,
    "adamw": [*FLAT, *(Case(n=c.n, variant="decay") for c in FLAT)],
    "global_norm": [*FLAT, Case(n=1_000_003)],
    "narrow": FLAT,
}

CALLS = [  # every case, twice for operations that write or accumulate gradients
    pytest.param(op, case, accumulate, id=f"{op}-{case}{'-accumulate' if accumulate else ''}")
    for op, cases in CASES.items()
    for case in cases
    for accumulate in ((False, True) if op in ACCUMULATES else (False,))
]
