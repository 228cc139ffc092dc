"""Linear layers: activations on their own, and frozen weights, have the bits of the whole operation."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support.cases import Case, prepare
from support.guarded import bits

from llmpy.backend import load

DTYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)]


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def ops(request: pytest.FixtureRequest) -> Any:
    return load("cpu", threads=2, dtype=str(request.param))


@pytest.mark.parametrize("variant", ["gelu", "swiglu"])
def test_an_activation_alone_has_the_bits_of_linear(ops: Any, variant: str) -> None:
    """Backward recomputes the same activation that forward had."""
    call = prepare("linear_forward", Case(T=63, C=129, OC=51, variant=variant), dtype=ops.dtype)
    call.run(ops)
    again = np.full_like(call.args["out"], np.nan)
    ops.activation_forward(again, call.args["pre"])
    assert np.array_equal(bits(again), bits(call.args["out"]))


@pytest.mark.parametrize("variant", ["gelu", "swiglu"])
def test_its_gradient_alone_has_the_bits_of_linear(ops: Any, variant: str) -> None:
    """Through an identity weight, whose product is exact."""
    a = prepare("activation_backward", Case(T=63, C=131, variant=variant), dtype=ops.dtype).args
    ops.activation_backward(a["dpre"], a["dout"], a["pre"])
    fused = np.full_like(a["dpre"], np.nan)
    ops.linear_backward(fused, None, None, a["dout"], None, np.eye(131, dtype=ops.dtype), a["pre"], False)
    assert np.array_equal(bits(fused), bits(a["dpre"]))
    if variant == "gelu":
        ops.activation_backward(a["dout"], a["dout"], a["pre"])
        assert np.array_equal(bits(fused), bits(a["dout"]))


@pytest.mark.parametrize("variant", ["", "gelu", "swiglu"])
def test_frozen_weights_leave_the_bits_of_dinp(ops: Any, variant: str) -> None:
    case = Case(T=801, C=50, OC=33, variant=variant)
    whole, frozen = (prepare("linear_backward", case, dtype=ops.dtype) for _ in range(2))
    frozen.args |= {"dweight": None, "dbias": None, "inp": None}
    for call in (whole, frozen):
        call.run(ops)
    assert np.array_equal(bits(whole.args["dinp"]), bits(frozen.args["dinp"]))


def test_a_frozen_head_leaves_the_bits_of_the_others(ops: Any) -> None:
    case = Case(T=600, C=17, V=97, Vp=128, variant="masked")
    whole, frozen = (prepare("classifier", case, dtype=ops.dtype) for _ in range(2))
    frozen.args["dwte"] = None
    for call in (whole, frozen):
        call.run(ops)
    for name in ("losses", "dinp"):
        assert np.array_equal(bits(whole.args[name]), bits(frozen.args[name])), name
