"""Every operation of training at real sizes: values, all elements written, none beyond (`make test-long`).

GPT-2 124M at 4 × 1024, with its vocabulary and Qwen's; heads of Qwen3-0.6B, the MLP of SmolLM2 135M. At most 10 GB.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.cases import ACCUMULATES, REF, Call, Case, prepare
from support.guarded import Guarded, bits
from support.rounding import BF16, ROUNDED, ROUNDED_INSIDE, U

from llmpy.backend import load
from llmpy.backend.reference import activation

TOLERANCE = 1e-5
CHUNK = 256  # rows of logits of the reference at a time, in float64

TOKENS, WIDE = Case(4, 1024, C=768, V=50257, Vp=50304), Case(4, 1024, C=768, V=151_643, Vp=151_936)
ROWS, HEADS = [Case(4, 1024, C=768)], [Case(4, 1024, C=2048, NH=16, NKV=8)]
MLP = [Case(4, 1024, C=3072), Case(4, 1024, C=1536, variant="swiglu")]
PRODUCTS = [
    Case(4, 1024, C=768, OC=2304, variant="bias"),
    Case(4, 1024, C=768, OC=768, variant="bias"),
    Case(4, 1024, C=768, OC=3072, variant="bias gelu"),
    Case(4, 1024, C=3072, OC=768, variant="bias gelu"),
    Case(4, 1024, C=576, OC=1536, variant="swiglu"),
]
ATTENTION = [Case(4, 1024, C=768, NH=12), Case(1, 1024, C=2048, NH=16, NKV=8, variant="500 300 1 224")]
CASES: dict[str, list[Case]] = {
    **dict.fromkeys(("embedding_forward", "embedding_backward", "classifier"), [TOKENS, WIDE]),
    **dict.fromkeys(("layernorm_forward", "residual_layernorm_forward", "layernorm_backward"), ROWS),
    **dict.fromkeys(("rmsnorm_forward", "residual_rmsnorm_forward", "rmsnorm_backward"), ROWS),
    **dict.fromkeys(("head_rmsnorm_forward", "head_rmsnorm_backward", "rope"), HEADS),
    **dict.fromkeys(("activation_forward", "activation_backward"), MLP),
    **dict.fromkeys(("linear_forward", "linear_backward"), PRODUCTS),
    **dict.fromkeys(("add_columns", "take_columns"), ROWS),
    **dict.fromkeys(("attention_forward", "attention_backward"), ATTENTION),
    **dict.fromkeys(("adamw", "global_norm"), [Case(n=50304 * 768)]),
}
CALLS = [
    pytest.param(op, case, accumulate, id=f"{op}-{case}{'-accumulate' if accumulate else ''}")
    for op, cases in CASES.items()
    for case in cases
    for accumulate in ((False, True) if op in ACCUMULATES and case is not WIDE else (False,))
]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def ops(request: pytest.FixtureRequest) -> Any:
    return load("cpu", dtype=request.param)


def expect(call: Call) -> tuple[Any, Call]:
    """Return the reference's result, and its arguments in float64; of the classifier a chunk of rows at a time."""
    expected = call.astype(np.float64)
    a = expected.args
    if call.op != "classifier":
        return expected.run(REF), expected
    losses, dinp, inp, targets = (a[name].reshape(4096, -1) for name in ("losses", "dinp", "inp", "targets"))
    for first in range(0, 4096, CHUNK):
        part = slice(first, first + CHUNK)
        head = a["wte"], targets[part], a["vocab_size"], a["scale"], a["accumulate"] or first > 0
        REF.classifier(losses[part], dinp[part], a["dwte"], inp[part], *head)
    return None, expected


@pytest.mark.long
@pytest.mark.parametrize(("op", "case", "accumulate"), CALLS)
def test_production_shapes(ops: Any, op: str, case: Case, accumulate: bool) -> None:
    """Outputs start as NaN, between canaries; inputs end in NaN. With the items in reverse order the same bits."""
    guarded = Guarded(prepare(op, case, accumulate, ops.dtype))
    with ops.reversed():
        result = guarded.call.run(ops)
    guarded.check()
    reverse = {name: guarded.call.args[name] for name in guarded.before.outputs}
    call = guarded.before
    guarded = Guarded(call)
    assert guarded.call.run(ops) == result
    guarded.check()
    for name, x in reverse.items():
        assert np.array_equal(bits(x), bits(guarded.call.args[name])), f"{name} differs between orders"
    reverse.clear()
    wanted, expected = expect(call)
    if op == "global_norm":
        assert result == pytest.approx(wanted, rel=TOLERANCE)
    a = guarded.call.args
    if op == "linear_forward" and a["pre"] is not None:  # of the stored value
        expected.args["out"] = activation(a["pre"].astype(np.float64), case.OC)
    for name in call.outputs:
        error, want = a[name].astype(np.float64) - expected.args[name], expected.args[name]
        if a[name].dtype == BF16 or ops.dtype == BF16 and op in ROUNDED_INSIDE:
            share, most = np.linalg.norm(error) / np.linalg.norm(want), ROUNDED_INSIDE.get(op, ROUNDED)
            # The former sees few wrong elements of many not.
            noise = (4 * U if op in ROUNDED_INSIDE else TOLERANCE) * np.abs(want).max()
            assert (np.abs(error) <= U * np.abs(want) + noise).all(), f"{name}: {np.abs(error).max():.2e}"
        else:
            share, most = np.abs(error).max() / max(np.abs(want).max(), 1e-30), TOLERANCE
        assert share <= most, f"{name}: relative error {share:.2e}"
