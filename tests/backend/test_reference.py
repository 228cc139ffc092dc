"""The reference's backward passes against complex steps through its own forward passes.

For L(θ) = Σ dout·forward(θ), the gradient along a direction d is Im L(θ + i·h·d)/h, exact to machine precision at
h = 1e-30, since nothing is subtracted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.cases import CASES, EPSILON, Call, Case, prepare

from llmpy.backend import load

H = 1e-30
TOLERANCE = 1e-10
REAL, COMPLEX = load("reference"), load("reference", dtype=np.complex128)

Values = dict[str, np.ndarray]


def blank(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, np.complex128)


def embedding(call: Call, x: Values) -> Any:
    dout = call.args["dout"]
    out = blank(*dout.shape)
    COMPLEX.embedding_forward(out, call.args["tokens"], x["wte"], x.get("wpe"), call.args["positions"])
    return (out * dout).sum()


def layernorm(call: Call, x: Values) -> Any:
    dout = call.args["dout"]
    out, mean, rstd = blank(*dout.shape), blank(*dout.shape[:-1]), blank(*dout.shape[:-1])
    COMPLEX.layernorm_forward(out, mean, rstd, x["inp"], x["weight"], x["bias"])
    return (out * dout).sum()


def residual_layernorm(call: Call, x: Values) -> Any:
    dout = call.args["dout"]
    resid, out = blank(*dout.shape), blank(*dout.shape)
    mean, rstd = blank(*dout.shape[:-1]), blank(*dout.shape[:-1])
    COMPLEX.residual_layernorm_forward(resid, out, mean, rstd, x["inp"], x["inp2"], x["weight"], x["bias"])
    return (out * dout).sum()


def rmsnorm(call: Call, x: Values) -> Any:
    out, rstd = blank(*call.args["dout"].shape), blank(*call.args["rstd"].shape)
    COMPLEX.rmsnorm_forward(out, rstd, x["inp"], x["weight"], EPSILON)
    return (out * call.args["dout"]).sum()


def residual_rmsnorm(call: Call, x: Values) -> Any:
    resid, out, rstd = (blank(*call.args[name].shape) for name in ("dout", "dout", "rstd"))
    COMPLEX.residual_rmsnorm_forward(resid, out, rstd, x["inp"], x["inp2"], x["weight"], EPSILON)
    return (out * call.args["dout"]).sum()


def head_rmsnorm(call: Call, x: Values) -> Any:
    out, rstd = blank(*call.args["dout"].shape), blank(*call.args["rstd"].shape)
    COMPLEX.head_rmsnorm_forward(out, rstd, x["inp"], x["q_weight"], x["k_weight"], EPSILON)
    return (out * call.args["dout"]).sum()


def linear(call: Call, x: Values) -> Any:
    dout, inp = call.args["dout"], x["inp"]
    if call.args["pre"] is not None:  # x["inp"] is pre
        inp = blank(*inp.shape[:-1], x["weight"].shape[1])
        COMPLEX.activation_forward(inp, x["inp"])
    out = blank(*dout.shape)
    COMPLEX.linear_forward(out, inp, x["weight"], x.get("bias"))
    return (out * dout).sum()


def activation(call: Call, x: Values) -> Any:
    out = blank(*call.args["dout"].shape)
    COMPLEX.activation_forward(out, x["pre"])
    return (out * call.args["dout"]).sum()


def attention(call: Call, x: Values) -> Any:
    dout, stats = call.args["dout"], blank(*call.args["stats"].shape)
    out = blank(*dout.shape)
    COMPLEX.attention_forward(out, stats, x["qkv"], call.args["positions"])
    return (out * dout).sum()


def classifier(call: Call, x: Values) -> Any:
    a = call.args
    losses = blank(*a["losses"].shape)
    COMPLEX.classifier(losses, None, None, x["inp"], x["wte"], a["targets"], a["vocab_size"], a["scale"], False)
    return (losses * a["scale"]).sum()


# Backward operation, its forward (as L), and the inputs to differentiate by.
PAIRS: list[tuple[str, Callable[[Call, Values], Any], tuple[str, ...]]] = [
    ("embedding_backward", embedding, ("wte", "wpe")),
    ("layernorm_backward", layernorm, ("inp", "weight", "bias")),
    ("layernorm_backward", residual_layernorm, ("inp", "weight", "bias")),
    ("rmsnorm_backward", rmsnorm, ("inp", "weight")),
    ("rmsnorm_backward", residual_rmsnorm, ("inp", "weight")),
    ("head_rmsnorm_backward", head_rmsnorm, ("inp", "q_weight", "k_weight")),
    ("linear_backward", linear, ("inp", "weight", "bias")),
    ("activation_backward", activation, ("pre",)),
    ("attention_backward", attention, ("qkv",)),
    ("classifier", classifier, ("inp", "wte")),
]
PAIRED_CASES = [
    pytest.param(*pair, case, id=f"{pair[0]}-{pair[1].__name__}-{case}")
    for pair in PAIRS
    for case in CASES[pair[0]]
    if case.variant not in ("losses", "frozen") and case.V < 1000
]


@pytest.mark.parametrize(("op", "forward", "wrt", "case"), PAIRED_CASES)
def test_backward_is_the_complex_step(
    op: str, forward: Callable[[Call, Values], Any], wrt: tuple[str, ...], case: Case
) -> None:
    call = prepare(op, case, accumulate=False, dtype=np.float64)
    for name in call.outputs:
        call.args[name].fill(0)
    call.run(REAL)
    wrt = tuple(name for name in wrt if call.args["d" + name] is not None)
    rng = np.random.default_rng(2)
    wrt = tuple(name for name in wrt if call.args["d" + name] is not None)
    # The point of differentiation; arbitrary for inputs the gradient does not depend on (a bias).
    x = {name: rng.normal(size=call.args["d" + name].shape) for name in wrt}
    x |= {name: call.args[name] for name in (*wrt, "weight", "wte") if call.args.get(name) is not None}
    if forward in (residual_layernorm, residual_rmsnorm):
        x["inp2"] = rng.normal(size=x["inp"].shape)
        x["inp"] = x["inp"] - x["inp2"]
    if call.args.get("pre") is not None:
        x["inp"] = call.args["pre"]
    for name in wrt:
        gradient = call.args["d" + name]
        largest = np.abs(gradient).max()

        def along(direction: np.ndarray, name: str = name) -> float:
            return float(forward(call, x | {name: x[name] + 1j * H * direction}).imag / H)

        if gradient.size <= 60:
            for i in np.ndindex(gradient.shape):
                direction = np.zeros(gradient.shape)
                direction[i] = 1
                assert abs(along(direction) - gradient[i]) <= TOLERANCE * max(largest, 1), (name, i)
        for _ in range(3):
            direction = rng.normal(size=gradient.shape)
            error = abs(along(direction) - (direction * gradient).sum())
            assert error <= TOLERANCE * max(np.linalg.norm(gradient), 1), name


@pytest.mark.parametrize("case", CASES["rope"], ids=str)
def test_rope_turns_complex_numbers_and_back(case: Case) -> None:
    """x₁ + i·x₂ is multiplied by e^(i·angle). The inverse is the transpose, hence the gradient."""
    call = prepare("rope", case, dtype=np.float64)
    x, cos, sin, positions, heads, inverse = call.args.values()
    HS = case.C // case.NH
    start = x.reshape(case.rows, -1, 2, HS // 2)
    first, second = start[:, :, 0], start[:, :, 1]
    at = positions.reshape(-1), None
    want = (first + 1j * second) * (cos[at] + (-1j if inverse else 1j) * sin[at])
    want[:, heads:] = (first + 1j * second)[:, heads:]
    call.run(REAL)
    got = x.reshape(start.shape)
    assert np.allclose(got[:, :, 0] + 1j * got[:, :, 1], want, rtol=0, atol=1e-14)
    REAL.rope(x, cos, sin, positions, heads, not inverse)
    assert np.allclose(x, prepare("rope", case, dtype=np.float64).args["x"], rtol=0, atol=1e-14)


def test_softmax_survives_large_scores() -> None:
    logits = np.array([[1e4, 1e4 - 1, -1e4]])
    losses = np.empty(1)
    REAL.classifier(losses, None, None, logits, np.eye(3), np.array([1], np.int32), 3, 1.0, False)
    assert losses[0] == pytest.approx(1 + math.log1p(math.exp(-1)), rel=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_the_sum_over_past_gradients(decay: float) -> None:
    """m̂ and v̂ in closed form, as weighted means of all gradients so far, per element."""
    lr, beta1, beta2, eps, scale, n = 1e-2, 0.9, 0.95, 1e-8, 0.5, 5
    rng = np.random.default_rng(3)
    start, grads = rng.normal(size=n), rng.normal(size=(6, n))
    param, m, v = start.copy(), np.zeros(n), np.zeros(n)
    for step in range(1, 7):
        REAL.adamw(param, grads[step - 1], m, v, lr, beta1, beta2, eps, decay, scale, step)
    for i in range(n):
        p = start[i]
        for step in range(1, 7):
            past = [scale * grads[s][i] for s in range(step)]
            w1 = [beta1 ** (step - 1 - s) for s in range(step)]
            w2 = [beta2 ** (step - 1 - s) for s in range(step)]
            m_hat = sum(w * g for w, g in zip(w1, past, strict=True)) / sum(w1)
            v_hat = sum(w * g * g for w, g in zip(w2, past, strict=True)) / sum(w2)
            p = p * (1 - lr * decay) - lr * m_hat / (math.sqrt(v_hat) + eps)
        assert param[i] == pytest.approx(p, rel=1e-12)


def test_global_norm() -> None:
    assert REAL.global_norm(np.array([3.0, -4.0, 12.0])) == pytest.approx(13, rel=1e-15)


def test_every_operation_of_the_seam_has_cases() -> None:
    from llmpy.backend import Ops

    operations = {n for n in vars(Ops) if not n.startswith("_")} - {
        "name",
        "dtype",
        "empty",
        "zeros",
        "to_host",
        "zero",
        "capture",
        "digest",  # in test_ops, of any bits
        "reversed",
    }
    # test_decode compares these bitwise with linear_forward and attention_forward.
    decoding = {"packed_size", "pack", "packed_linear_forward", "cache_fill", "attention_decode"}
    assert operations == set(CASES) | decoding
