"""The operations of decoding: bitwise identical to those of training, at every odd size."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support.cases import ATTENTION, LINEAR, Case, Draw, prepare
from support.guarded import GUARD, bits, guarded, unharmed

from llmpy.backend import load

SEQUENCES = [case for case in ATTENTION if not case.variant]  # of one document each
DTYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)]


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def machines(request: pytest.FixtureRequest) -> list[Any]:
    """The same backend with 1, 2 and 3 threads."""
    return [load("cpu", threads=n, dtype=str(request.param)) for n in (1, 2, 3)]


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_packed_linear_has_the_bits_of_linear(machines: list[Any], case: Case) -> None:
    """At any number of threads. NaN around inputs has no effect; canaries around outputs survive."""
    call = prepare("linear_forward", case, dtype=machines[0].dtype)
    call.run(machines[1])
    want, a = call.args, prepare("linear_forward", case, dtype=machines[0].dtype).args
    inp, around = guarded(a["inp"])
    around[:GUARD] = around[-GUARD:] = np.nan
    for ops in machines:
        packed, edges = guarded(np.full(ops.packed_size(*a["weight"].shape), np.nan, ops.dtype))
        ops.pack(packed, a["weight"])
        assert unharmed(edges)
        assert not np.isnan(packed).any()
        out, out_edges = guarded(np.full(a["out"].shape, np.nan, ops.dtype))
        pre, pre_edges = guarded(
            np.full(a["weight"].shape[:1] if a["pre"] is None else a["pre"].shape, np.nan, ops.dtype)
        )
        ops.packed_linear_forward(out, inp, packed, a["bias"], None if a["pre"] is None else pre)
        assert unharmed(out_edges)
        assert unharmed(pre_edges)
        assert np.array_equal(bits(out), bits(want["out"]))
        if a["pre"] is not None:
            assert np.array_equal(bits(pre), bits(want["pre"]))


def rows_of(case: Case, dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return qkv (B, T, W), and outputs of attention filled with NaN: out (B, T, C), stats."""
    B, T = case.B, case.T
    qkv = Draw(dtype, 1).normal(B, T, case.qkv_size, std=1.5)
    return qkv, np.full((B, T, case.C), np.nan, qkv.dtype), np.full((B, case.NH, T), np.nan, np.float32)


@pytest.mark.parametrize("case", [*SEQUENCES, Case(T=400, C=128, NH=2)], ids=str)
def test_attention_of_one_query_has_the_bits_of_all(machines: list[Any], case: Case) -> None:
    """Token by token into a cache of NaN, with slots reordered; nothing else in the cache is written."""
    qkv, want, stats = rows_of(case, machines[0].dtype)
    machines[1].attention_forward(want, stats, qkv)
    B, T = case.B, case.T
    filled = np.full((B + 1, case.kv_heads, 2, T + 3, case.head_size), np.nan, qkv.dtype)
    machines[0].cache_fill(filled[:B], qkv)
    slots = np.arange(B, dtype=np.int32)[::-1].copy()
    for ops in machines:
        cache, edges = guarded(np.full(filled.shape, np.nan, qkv.dtype))
        for t in range(T):
            out, out_edges = guarded(np.full((B, case.C), np.nan, qkv.dtype))
            ops.attention_decode(out, cache, qkv[:, t].copy(), slots, np.full(B, t, np.int32))
            assert np.array_equal(bits(out), bits(want[:, t])), f"position {t}"
            assert unharmed(out_edges)
        assert unharmed(edges)
        assert np.array_equal(bits(cache[slots]), bits(filled[:B]))
        assert np.isnan(cache[B]).all()


def test_each_text_at_its_own_position(machines: list[Any]) -> None:
    case = Case(B=3, T=130, C=36, NH=3)
    qkv, want, stats = rows_of(case, machines[0].dtype)
    ops = machines[1]
    ops.attention_forward(want, stats, qkv)
    cache = np.full((3, 3, 2, 130, 12), np.nan, qkv.dtype)
    ops.cache_fill(cache, qkv)
    slots, positions = np.array([2, 0], np.int32), np.array([129, 7], np.int32)
    out = np.full((2, 36), np.nan, qkv.dtype)
    ops.attention_decode(out, cache, qkv[slots, positions], slots, positions)
    assert np.array_equal(bits(out), bits(want[slots, positions]))


def test_nan_stays_in_its_head(machines: list[Any]) -> None:
    ops, case = machines[1], Case(B=2, T=9, C=24, NH=2)
    qkv, _, _ = rows_of(case, ops.dtype)
    cache = np.zeros((2, 2, 2, 9, 12), qkv.dtype)
    ops.cache_fill(cache, qkv)
    cache[1, 0, 0, 3, 5] = np.nan
    out = np.zeros((2, 24), qkv.dtype)
    ops.attention_decode(out, cache, qkv[:, 8].copy(), np.arange(2, dtype=np.int32), np.full(2, 8, np.int32))
    assert np.isnan(out[1, :12]).all()
    assert not np.isnan(out[0]).any()
    assert not np.isnan(out[1, 12:]).any()


@pytest.mark.parametrize("case", SEQUENCES, ids=str)
def test_the_reference_agrees_with_itself(case: Case) -> None:
    ops = load("reference")
    qkv, want, stats = rows_of(case, np.float64)
    ops.attention_forward(want, stats.astype(np.float64), qkv)
    cache = np.full((case.B, case.kv_heads, 2, case.T, case.head_size), np.nan)
    slots = np.arange(case.B, dtype=np.int32)
    for t in range(case.T):
        out = np.full((case.B, case.C), np.nan)
        ops.attention_decode(out, cache, qkv[:, t], slots, np.full(case.B, t, np.int32))
        np.testing.assert_allclose(out, want[:, t], rtol=1e-12, atol=1e-12)
    filled = np.full_like(cache, np.nan)
    ops.cache_fill(filled, qkv)
    assert np.array_equal(filled, cache)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_of_a_query_keeps_negative_zeros(dtype: str) -> None:
    """Values that cancel to a subnormal of either sign, or to −0 where subnormals are 0."""
    ops, T, HS = load("cpu", threads=1, dtype=dtype), 33, 16
    qkv = np.zeros((1, T, 3 * HS), ops.dtype)
    qkv[0, 0, 2 * HS :], qkv[0, T - 1, 2 * HS :] = 1.3e-38, -1.9e-38
    out, stats = np.empty((1, T, HS), ops.dtype), np.empty((1, 1, T), np.float32)
    ops.attention_forward(out, stats, qkv)
    cache, one = np.zeros((1, 1, 2, T, HS), ops.dtype), np.empty((1, HS), ops.dtype)
    ops.cache_fill(cache, qkv[:, : T - 1].copy())
    slot, position = np.zeros(1, np.int32), np.full(1, T - 1, np.int32)
    ops.attention_decode(one, cache, qkv[:, T - 1].copy(), slot, position)
    assert np.array_equal(bits(one[0]), bits(out[0, T - 1]))
