"""The CPU backend in float32 against the float64 reference: values, gradients, contracts, bounds, determinism.

Relative error is the largest absolute difference over the largest absolute value of the reference tensor: elements
near zero carry the rounding of the large ones they were summed from.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support.cases import CALLS, REF, Case, prepare
from support.guarded import Guarded, bits, only

from llmpy.backend import load

TOLERANCE = 1e-5
# With one channel n = 0 and dinp is exactly 0, but rstd = 1/√eps = 316 multiplies the one rounding left in
# dn − Σdn/C, 2⁻²⁴ of |dn| ≈ 1, to 2e-5.
ONE_CHANNEL = 1e-4


@pytest.fixture(scope="module")
def machines() -> list[Any]:
    """The same backend with 1, 2 and 3 threads."""
    return [load("cpu", threads=n) for n in (1, 2, 3)]


@pytest.fixture
def ops(machines: list[Any]) -> Any:
    return machines[1]


@pytest.mark.parametrize(("op", "case", "accumulate"), CALLS)
def test_agrees_with_the_reference(ops: Any, op: str, case: Case, accumulate: bool) -> None:
    call = prepare(op, case, accumulate)
    expected = call.astype(np.float64)
    wanted = expected.run(REF)
    guarded = Guarded(call)
    result = guarded.call.run(ops)
    guarded.check()
    if op == "global_norm":
        assert result == pytest.approx(wanted, rel=TOLERANCE)
    for name in call.outputs:
        got, want = guarded.call.args[name].astype(np.float64), expected.args[name]
        error = np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)
        tolerance = ONE_CHANNEL if (op, case.C) == ("layernorm_backward", 1) else TOLERANCE
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize(("op", "case", "accumulate"), CALLS)
def test_same_bits_at_any_number_of_threads(machines: list[Any], op: str, case: Case, accumulate: bool) -> None:
    """Also with their items in reverse order."""
    call = prepare(op, case, accumulate)
    runs = [call.astype(np.float32) for _ in range(4)]
    results = [run.run(machine) for run, machine in zip(runs, machines, strict=False)]
    with machines[2].reversed():
        results.append(runs[3].run(machines[2]))
    assert results[0] == results[1] == results[2] == results[3]
    for name in call.outputs:
        one, two, three, reverse = (bits(run.args[name]) for run in runs)
        assert np.array_equal(one, two), f"{name} differs between 1 and 2 threads"
        assert np.array_equal(one, three), f"{name} differs between 1 and 3 threads"
        assert np.array_equal(one, reverse), f"{name} differs between orders of items"


def test_memory_of_the_backend(ops: Any) -> None:
    x = ops.empty((3, 5), ops.dtype)
    assert x.shape == (3, 5)
    assert x.dtype == np.float32
    x[...] = np.nan
    ops.zero(x)
    assert not ops.to_host(x).any()
    assert np.shares_memory(ops.to_host(x), x)
    assert ops.empty(7, np.int32).shape == (7,)
    for size in (5, 100_000):
        for fresh in (ops.empty((3, size), np.float32), ops.zeros((3, size), np.float32)):
            assert fresh.shape == (3, size)
            assert fresh.dtype == np.float32
            assert fresh.ctypes.data % 64 == 0
        assert not fresh.any()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.uint64])
def test_a_digest_depends_on_every_bit(machines: list[Any], dtype: Any) -> None:
    for size in (1, 2, 3, 5, 16, 31):
        x = np.zeros(size, dtype)
        raw, seen = x.view(np.uint8), {machines[0].digest(x)}
        for byte in range(raw.size):
            for bit in range(8):
                raw[byte] ^= 1 << bit
                seen.add(machines[0].digest(x))
                raw[byte] ^= 1 << bit
        assert len(seen) == 8 * raw.size + 1


def test_a_digest_of_many_blocks(machines: list[Any]) -> None:
    x = np.random.default_rng(1).standard_normal(100_003).astype(np.float32)
    one, two, three = (machine.digest(x) for machine in machines)
    assert one == two == three == machines[1].digest(x.copy()) == machines[1].digest(x.reshape(1, -1))
    with machines[2].reversed():
        assert machines[2].digest(x) == one
    assert machines[0].digest(x[1:]) == machines[0].digest(x[1:].copy())  # not aligned to 8 bytes
    swapped = x.copy()
    swapped[[5, 70_000]] = x[[70_000, 5]]
    signs = x.copy()
    signs[[5, 7, 70_001]] *= -1
    assert len({one, machines[0].digest(swapped), machines[0].digest(signs), machines[0].digest(x[:-1])}) == 4


# NaN and infinity: as in IEEE arithmetic, not fast-math.


def poisoned(ops: Any, op: str, case: Case, name: str, where: Any) -> dict[str, Any]:
    """Run a case with NaN at one place of one input and outputs of 0; return its arguments."""
    call = prepare(op, case)
    for output in call.outputs:
        call.args[output].fill(0)
    call.args[name][where] = np.nan
    call.run(ops)
    return call.args


R = 4  # the poisoned row


def test_nan_in_embedding(ops: Any) -> None:
    case = Case(B=2, T=9, C=17, V=5, Vp=128)
    a = poisoned(ops, "embedding_forward", case, "wte", (3, 2))
    only(a["out"][..., 2], a["tokens"] == 3)
    assert not np.isnan(a["out"][..., 3]).any()
    a = poisoned(ops, "embedding_backward", case, "dout", (1, R, 2))
    only(a["dwte"], (a["tokens"][1, R], 2))
    only(a["dwpe"], (R, 2))


def test_nan_in_layernorm(ops: Any) -> None:
    case = Case(T=9, C=35)
    a = poisoned(ops, "layernorm_forward", case, "inp", (R, 2))
    for name in ("out", "mean", "rstd"):
        only(a[name], R)
    a = poisoned(ops, "residual_layernorm_forward", case, "inp2", (R, 2))
    only(a["resid"], (R, 2))
    for name in ("out", "mean", "rstd"):
        only(a[name], R)
    a = poisoned(ops, "layernorm_backward", case, "dout", (R, 2))
    only(a["dinp"], R)
    only(a["dweight"], 2)
    only(a["dbias"], 2)


def test_nan_in_rmsnorm(ops: Any) -> None:
    case = Case(T=9, C=35)
    a = poisoned(ops, "rmsnorm_forward", case, "inp", (R, 2))
    only(a["out"], R)
    only(a["rstd"], R)
    a = poisoned(ops, "residual_rmsnorm_forward", case, "inp2", (R, 2))
    only(a["resid"], (R, 2))
    only(a["out"], R)
    a = poisoned(ops, "rmsnorm_backward", case, "dout", (R, 2))
    only(a["dinp"], R)
    only(a["dweight"], 2)


def test_nan_in_heads(ops: Any) -> None:
    HS, NH, NKV = 12, 3, 1
    case = Case(T=9, C=NH * HS, NH=NH, NKV=NKV)
    key, value = NH, (NH + NKV) * HS
    a = poisoned(ops, "head_rmsnorm_forward", case, "inp", (R, key * HS + 2))
    only(a["out"], (R, slice(key * HS, value)))
    only(a["rstd"], (R, key))
    a = poisoned(ops, "head_rmsnorm_forward", case, "inp", (R, value + 2))
    only(a["out"], (R, value + 2))
    assert np.isfinite(a["rstd"]).all()
    a = poisoned(ops, "head_rmsnorm_backward", case, "dout", (R, key * HS + 2))
    only(a["dinp"], (R, slice(key * HS, value)))
    only(a["dk_weight"], 2)
    assert np.isfinite(a["dq_weight"]).all()
    call = prepare("rope", case)
    call.args["x"][R, 2] = np.nan
    call.run(ops)
    only(call.args["x"], (R, [2, HS // 2 + 2]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["", "frozen"])
def test_gradient_of_heads_in_place(dtype: str, variant: str) -> None:
    ops = load("cpu", threads=2, dtype=dtype)
    call = prepare("head_rmsnorm_backward", Case(T=70, C=256, NH=2, NKV=1, variant=variant), dtype=ops.dtype)
    again = call.copy()
    again.args["dinp"] = again.args["dout"]
    call.run(ops)
    again.run(ops)
    for name in call.outputs:
        assert np.array_equal(bits(call.args[name]), bits(again.args[name])), name


@pytest.mark.parametrize("op", ["rmsnorm_forward", "residual_rmsnorm_forward", "head_rmsnorm_forward", "rope"])
def test_a_row_alone_has_the_same_bits(ops: Any, op: str) -> None:
    """Decoding has the bits of training."""
    call = prepare(op, Case(T=70, C=192, NH=3, NKV=1))
    alone = call.map(lambda _, x: x[R : R + 1].copy() if len(x) == 70 else x)
    call.run(ops)
    alone.run(ops)
    for name in call.outputs:
        assert np.array_equal(bits(call.args[name][R]), bits(alone.args[name][0])), name


@pytest.mark.parametrize("variant", ["", "bias", "bias gelu", "swiglu"])
def test_nan_in_linear(ops: Any, variant: str) -> None:
    case = Case(T=9, C=35, OC=51, variant=variant)
    a = poisoned(ops, "linear_forward", case, "inp", (R, 2))
    only(a["out"], R)
    a = poisoned(ops, "linear_backward", case, "dout", (R, 2))
    only(a["dinp"], R)
    only(a["dweight"], 2)
    only(a["dbias"], 2)
    if "lu" in variant:
        a = poisoned(ops, "linear_backward", case, "pre", (R, 2))
        only(a["dinp"], (R, [2, 2 + 35] if variant == "swiglu" else 2))


def test_nan_in_attention(ops: Any) -> None:
    B, T, C, NH, HS = 2, 70, 36, 3, 12
    case = Case(B=B, T=T, C=C, NH=NH)
    t, head = 40, slice(HS, 2 * HS)  # a query, key or value of head 1 in sequence 1
    a = poisoned(ops, "attention_forward", case, "qkv", (1, t, HS + 5))
    only(a["out"], (1, t, head))
    only(a["stats"], (1, 1, t))
    a = poisoned(ops, "attention_forward", case, "qkv", (1, t, C + HS + 5))
    only(a["out"], (1, slice(t, None), head))  # no earlier query has seen this key
    only(a["stats"], (1, 1, slice(t, None)))
    a = poisoned(ops, "attention_forward", case, "qkv", (1, t, 2 * C + HS + 5))
    assert np.isnan(a["out"][1, t:, HS + 5]).all()
    assert not np.isnan(a["out"][0]).any()
    assert not np.isnan(a["stats"]).any()
    a = poisoned(ops, "attention_backward", case, "dout", (1, t, HS + 5))
    dq, dk, dv = a["dqkv"].reshape(B, T, 3, C).transpose(2, 0, 1, 3)
    assert np.isnan(dq[1, t, head]).all()
    assert np.isnan(dk[1, : t + 1, head]).all()
    assert np.isnan(dv[1, : t + 1, HS + 5]).all()
    assert not np.isnan(a["dqkv"][0]).any()


def test_nan_in_classifier(ops: Any) -> None:
    case = Case(T=9, C=35, V=97, Vp=128)
    a = poisoned(ops, "classifier", case, "inp", (R, 2))
    only(a["losses"], R)
    only(a["dinp"], R)
    # Padding is not checked: zero dlogits times NaN may be NaN there.
    assert np.isnan(a["dwte"][:97]).all()


def test_nan_in_adamw_and_norm(ops: Any) -> None:
    a = poisoned(ops, "adamw", Case(n=1000), "grad", 333)
    for name in ("param", "m", "v"):
        only(a[name], 333)
    for value in (np.nan, np.inf):
        call = prepare("global_norm", Case(n=1000))
        call.args["grad"][333] = value
        assert call.run(ops) == pytest.approx(value, nan_ok=True)


def test_gelu_at_the_ends(ops: Any) -> None:
    """GELU(∞) = ∞; GELU(x) = x for large x and 0 for large −x, also where x³ overflows."""
    x = np.array([[np.inf], [1e30], [1e4], [30], [-30], [-1e4], [-1e30]], np.float32)
    out, pre = np.full_like(x, np.nan), np.full_like(x, np.nan)
    with np.errstate(all="ignore"):
        ops.linear_forward(out, x, np.ones((1, 1), np.float32), None, pre)
    assert np.array_equal(pre, x)
    assert np.array_equal(out[:4], x[:4])
    assert not out[4:].any()
    dweight, dbias = np.zeros((1, 1), np.float32), np.zeros(1, np.float32)
    x = np.array([[1e15], [1e4], [30], [-30], [-1e4], [-1e15]], np.float32)
    slope = np.full_like(x, np.nan)
    one = np.ones((1, 1), np.float32)
    ops.linear_backward(slope, dweight, dbias, np.ones_like(x), x, one, x, False)
    assert np.array_equal(slope, [[1], [1], [1], [0], [0], [0]])


def test_swiglu_at_the_ends(ops: Any) -> None:
    """SiLU(±∞) = ∞ and 0; SiLU(x) = x for large x and 0 for large −x; slopes 1 and 0."""
    gate = np.array([[np.inf], [1e38], [88], [30], [-88], [-1e38], [-np.inf]], np.float32)
    pre = np.concatenate([gate, np.full_like(gate, 0.5)], axis=1)
    out, dpre, one = np.full_like(gate, np.nan), np.full_like(pre, np.nan), np.ones_like(gate)
    ops.activation_forward(out, pre)
    ops.activation_backward(dpre, one, pre)
    assert np.array_equal(out, 0.5 * np.maximum(gate, 0))
    assert np.array_equal(dpre, np.concatenate([0.5 * (gate > 0), np.maximum(gate, 0)], axis=1))


def classify(ops: Any, logits: list[float], target: int) -> tuple[float, np.ndarray]:
    """Return loss and dlogits (float32) of one row with these logits."""
    V = len(logits)
    wte = np.array(logits, np.float32).reshape(V, 1)
    losses, dinp, dwte = np.zeros(1, np.float32), np.zeros((1, 1), np.float32), np.zeros((V, 1), np.float32)
    targets = np.array([[target]], np.int32)
    with np.errstate(all="ignore"):
        ops.classifier(losses, dinp, dwte, np.ones((1, 1), np.float32), wte, targets, V, 1.0, False)
    return float(losses[0]), dwte[:, 0]


def test_infinite_logits(ops: Any) -> None:
    loss, dlogits = classify(ops, [0, -np.inf, 0, 0], target=2)  # probability 0: no effect
    assert loss == pytest.approx(np.log(3), rel=TOLERANCE)
    assert np.allclose(dlogits, [1 / 3, 0, -2 / 3, 1 / 3], rtol=TOLERANCE)
    loss, _ = classify(ops, [0, -np.inf, 0, 0], target=1)
    assert loss == np.inf
    loss, dlogits = classify(ops, [0, np.inf, 0, 0], target=2)  # ∞ − ∞
    assert np.isnan(loss)
    assert np.isnan(dlogits[1])


@pytest.mark.parametrize("size", [100, 1e4, 1e30])
def test_large_logits_do_not_overflow(ops: Any, size: float) -> None:
    loss, dlogits = classify(ops, [0, size, -size, size], target=1)
    assert loss == pytest.approx(np.log(2), rel=TOLERANCE)
    assert np.allclose(dlogits, [0, -0.5, 0, 0.5], rtol=TOLERANCE, atol=1e-30)


def test_attention_is_causal_to_the_bit(ops: Any) -> None:
    B, T, C, NH, t = 2, 130, 36, 3, 71
    call = prepare("attention_forward", Case(B=B, T=T, C=C, NH=NH))
    other = call.astype(np.float32)
    other.args["qkv"][:, t:] *= 3
    call.run(ops)
    other.run(ops)
    assert np.array_equal(call.args["out"][:, :t], other.args["out"][:, :t])
    assert np.array_equal(call.args["stats"][:, :, :t], other.args["stats"][:, :, :t])
    assert not np.array_equal(call.args["out"][:, t:], other.args["out"][:, t:])


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_attention_of_flat_and_of_sharp_scores(ops: Any, scale: float) -> None:
    """Softmax near uniform, and near one-hot with scores in the thousands."""
    call = prepare("attention_forward", Case(T=65, C=34, NH=2))
    call.args["qkv"] *= np.float32(scale)
    expected = call.astype(np.float64)
    expected.run(REF)
    call.run(ops)
    # float32 holds scores near 4000 to 2e-4, which exp turns into a relative error of a probability.
    tolerance = TOLERANCE if scale < 1 else 1e-3
    for name in call.outputs:
        got, want = call.args[name], expected.args[name]
        assert np.abs(got - want).max() <= tolerance * np.abs(want).max(), name


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_many_steps(ops: Any, weight_decay: float) -> None:
    """200 steps from zero moments: no drift against float64 beyond float32 rounding of the parameter."""
    rng = np.random.default_rng(5)
    param = rng.normal(size=1003).astype(np.float32)
    fast = [param, np.zeros_like(param), np.zeros_like(param)]
    exact = [x.astype(np.float64) for x in fast]
    for step in range(1, 201):
        grad = rng.normal(size=1003).astype(np.float32)
        rest = (1e-3, 0.9, 0.95, 1e-8, weight_decay, 0.25, step)
        ops.adamw(fast[0], grad, fast[1], fast[2], *rest)
        REF.adamw(exact[0], grad.astype(np.float64), exact[1], exact[2], *rest)
    for got, want in zip(fast, exact, strict=True):
        assert np.abs(got - want).max() <= TOLERANCE * np.abs(want).max()
