"""Products with int8 weights: against GGUF's Q8_0 and exact sums in NumPy; bits, bounds, infinities."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support.guarded import GUARD, bits, guarded, unharmed
from support.refused import refused

from llmpy.backend import load
from llmpy.backend.cpu import smallest_calls
from llmpy.model.config import ModelConfig
from llmpy.model.families import language_model

BLOCK = 32
# (BT, OC, C): a part of a vector and of a block; several tiles of rows; more blocks than a cut of the panel
SHAPES = [(1, 1, 1), (3, 50, 33), (5, 97, 96), (70, 130, 64), (37, 48, 300), (4, 3072, 768)]
DTYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)]


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def machines(request: pytest.FixtureRequest) -> list[Any]:
    """The same backend with 1, 2 and 3 threads."""
    return [load("cpu", threads=n, dtype=str(request.param)) for n in (1, 2, 3)]


def drawn(ops: Any, BT: int, OC: int, C: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return inp (BT, C), weight (OC, C) and bias (OC,); some inputs are much larger than their neighbours."""
    rng = np.random.default_rng(BT + OC + C)
    inp = rng.normal(0, 1, (BT, C)) * np.where(rng.random((BT, C)) < 0.02, 30, 1)
    weight = rng.normal(0, 0.02, (OC, C)).astype(np.float32)
    return inp.astype(ops.dtype), weight, rng.normal(0, 0.1, OC).astype(np.float32)


def quantised(ops: Any, weight: np.ndarray) -> np.ndarray:
    packed = np.full(ops.quantised_shape(*weight.shape), 77, np.uint8)
    ops.quantise(packed, weight)
    return packed


def rounded(x: np.ndarray, scale: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return int8s (rows, blocks, BLOCK) as float64, and scales (rows, blocks) as `scale` stores them."""
    rows, C = x.shape
    x = np.pad(x.astype(np.float32), ((0, 0), (0, -C % BLOCK))).reshape(rows, -1, BLOCK)
    d = np.abs(x).max(-1) / np.float32(127)
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d > 0)
    y = x * inverse[..., None]
    return np.sign(y) * np.floor(np.abs(y) + 0.5), d.astype(scale).astype(np.float64)


def expected(inp: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the product in float64, and a bound of its rounding errors: of each block's product and sum."""
    (a, da), (b, db) = rounded(inp, np.float32), rounded(weight, np.float16)
    terms = np.einsum("rbk,obk->rob", a, b) * da[:, None] * db
    start = np.zeros(len(weight)) if bias is None else bias.astype(np.float64)
    bound = 2.0**-23 * (terms.shape[-1] + 2) * (np.abs(terms).sum(-1) + np.abs(start))
    return terms.sum(-1) + start, bound


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-7])  # of float16's scales: normal, subnormal, some 0
def test_weights_are_those_of_q8_0(machines: list[Any], scale: float) -> None:
    gguf = pytest.importorskip("gguf")
    ops, OC, C = machines[1], 7, 96
    weight = np.random.default_rng(1).normal(0, 0.02 * scale, (OC, C)).astype(np.float32)
    weight[3, BLOCK : 2 * BLOCK] = 0
    theirs = gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0).reshape(OC, -1, 2 + BLOCK)
    d = np.ascontiguousarray(theirs[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    want = (d[..., None] * theirs[..., 2:].view(np.int8)).reshape(OC, C)
    # Inputs of one number each, which int8 holds exactly, return the weights, times a scale of 1.
    inp = np.eye(C, dtype=np.float32) * 127
    out = np.empty((C, OC), np.float32)
    load("cpu", threads=1).linear_forward(out, inp, quantised(ops, weight), None)
    assert np.array_equal(out, 127 * want.T)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["", "bias", "gelu", "swiglu"])
def test_a_product(machines: list[Any], shape: tuple[int, int, int], kind: str) -> None:
    """Values; the same bits at any number of threads and for a row alone; nothing else is written."""
    BT, OC, C = shape
    rows = 2 * OC if kind == "swiglu" else OC
    inp, weight, bias = drawn(machines[0], BT, rows, C)
    b = bias if kind else None
    want, bound = expected(inp, weight, b)
    results = []
    for ops in machines:
        packed, edges = guarded(np.full(ops.quantised_shape(rows, C), 77, np.uint8))
        ops.quantise(packed, weight)
        x, around = guarded(inp)
        around[:GUARD] = around[-GUARD:] = np.nan  # no effect
        out, out_edges = guarded(np.full((BT, OC), np.nan, ops.dtype))
        pre, pre_edges = guarded(np.full((BT, rows), np.nan, ops.dtype))
        if kind not in ("gelu", "swiglu"):
            pre = None
        ops.linear_forward(out, x, packed, b, pre)
        assert unharmed(edges)
        assert unharmed(out_edges)
        assert unharmed(pre_edges)
        product = out if pre is None else pre
        step = float(ml_dtypes.finfo(ops.dtype).eps) / 2
        assert (np.abs(product.astype(np.float64) - want) <= bound + step * np.abs(want)).all()
        if pre is not None:
            activated = np.empty_like(out)
            ops.activation_forward(activated, np.ascontiguousarray(pre))
            assert np.array_equal(bits(out), bits(activated))
        for row in {0, BT // 2, BT - 1}:
            alone = np.empty((1, OC), ops.dtype)
            before = None if pre is None else np.empty((1, rows), ops.dtype)
            ops.linear_forward(alone, inp[row : row + 1], packed, b, before)
            assert np.array_equal(bits(alone[0]), bits(out[row]))
        results.append(bits(out.copy()))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_shows(machines: list[Any], bad: float) -> None:
    """In every output of its row, and in no other row."""
    ops = machines[1]
    inp, weight, _ = drawn(ops, 3, 20, 70)
    packed, out, clean = quantised(ops, weight), np.empty((3, 20), ops.dtype), np.empty((3, 20), ops.dtype)
    ops.linear_forward(clean, inp, packed, None)
    inp[1, 66] = bad
    ops.linear_forward(out, inp, packed, None)
    assert not np.isfinite(out[1].astype(np.float32)).any()
    assert np.array_equal(bits(out[[0, 2]]), bits(clean[[0, 2]]))


@pytest.mark.parametrize("tiny", [0.0, 1e-40, 1e-37, 1e-30])
def test_tiny_inputs(machines: list[Any], tiny: float) -> None:
    ops = machines[1]
    inp, weight, bias = drawn(ops, 2, 20, 64)
    out = np.empty((2, 20), ops.dtype)
    ops.linear_forward(out, (inp.astype(np.float64) * tiny).astype(ops.dtype), quantised(ops, weight), bias)
    np.testing.assert_allclose(out.astype(np.float64), np.tile(bias.astype(ops.dtype).astype(np.float64), (2, 1)))


def test_the_kernels_of_a_model_with_adapters() -> None:
    """Adapters are not quantised: their products are those of training."""
    ops = load("cpu", threads=1, dtype="int8")
    names = {name for name, _ in smallest_calls(ops, ("llama", "int8"))}
    assert names & {"linear_forward", "packed_linear_forward", "int8_linear_forward"} == {"int8_linear_forward"}
    assert "linear_forward" in {name for name, _ in smallest_calls(ops, ("llama", "lora", "int8"))}


def test_weights_beyond_the_scales() -> None:
    model = language_model(ModelConfig(1, 1, 8, 8, 8), load("cpu", threads=1, dtype="int8"), trainable=False)
    with refused("model.int8-range", "wte"):
        model.assign("wte", np.full((128, 8), 1e7, np.float32))
