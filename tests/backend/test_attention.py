"""Attention with shared keys and values, and with several documents in a row: bitwise, in both dtypes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support.cases import Args, Case, prepare
from support.guarded import bits

from llmpy.backend import load
from llmpy.backend.cpu.attention import TILE_K


@pytest.fixture(scope="module", params=[np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def ops(request: pytest.FixtureRequest) -> Any:
    return load("cpu", threads=2, dtype=np.dtype(request.param).name)


def attend(ops: Any, NH: int, qkv: np.ndarray, dout: np.ndarray, positions: np.ndarray | None = None) -> Args:
    """Return the outputs of both passes on qkv (B, T, W) and dout (B, T, NH·HS)."""
    B, T, _ = dout.shape
    out, stats, dqkv = np.full_like(dout, np.nan), np.full((B, NH, T), np.nan, np.float32), np.full_like(qkv, np.nan)
    ops.attention_forward(out, stats, qkv, positions)
    ops.attention_backward(dqkv, dout, qkv, out, stats, positions)
    return {"out": out, "stats": stats, "dqkv": dqkv}


def drawn(ops: Any, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Return qkv and dout of a case with B > 1."""
    args = prepare("attention_backward", case, dtype=ops.dtype).args
    return args["qkv"], args["dout"]


def test_a_group_reads_one_key_and_value(ops: Any) -> None:
    """Head h reads key/value head h // (NH/NKV): as if those were repeated, with dk and dv summed."""
    case = Case(B=2, T=131, C=6 * 20, NH=6, NKV=2)
    qkv, dout = drawn(ops, case)
    heads = qkv.reshape(2, 131, 10, 20)
    repeated = np.concatenate([heads[:, :, :6], heads[:, :, 6:].repeat(3, axis=2)], axis=2).reshape(2, 131, -1)
    got, want = attend(ops, 6, qkv, dout), attend(ops, 6, repeated, dout)
    for name in ("out", "stats"):
        assert np.array_equal(bits(got[name]), bits(want[name])), name
    assert np.array_equal(bits(got["dqkv"][..., :120]), bits(want["dqkv"][..., :120])), "dq"
    each = want["dqkv"][..., 120:].astype(np.float64).reshape(2, 131, 4, 3, 20)
    error = np.abs(got["dqkv"][..., 120:].astype(np.float64) - each.sum(axis=3).reshape(2, 131, 80))
    assert error.max() <= np.abs(each).max() * (1e-6 if ops.dtype == np.float32 else 2.0**-6)


def test_one_document_has_the_bits_of_none(ops: Any) -> None:
    case = Case(B=2, T=201, C=36, NH=3)
    qkv, dout = drawn(ops, case)
    plain = attend(ops, 3, qkv, dout)
    numbered = attend(ops, 3, qkv, dout, np.arange(201, dtype=np.int32) + np.zeros((2, 1), np.int32))
    for name, want in plain.items():
        assert np.array_equal(bits(numbered[name]), bits(want)), name


def test_documents_do_not_depend_on_each_other(ops: Any) -> None:
    """To the bit: changing one leaves the others' outputs and gradients unchanged, and its own differ."""
    case = Case(B=2, T=290, C=48, NH=4, NKV=2, variant="1 95 61 1 132")
    qkv, dout = drawn(ops, case)
    positions = case.positions
    assert positions is not None
    before = attend(ops, 4, qkv, dout, positions)
    number = np.cumsum(positions == 0, axis=1)  # of the document of each token
    for changed in (2, 3):
        mine = number == changed
        other_qkv, other_dout = qkv.copy(), dout.copy()
        other_qkv[mine] *= 2
        other_dout[mine] *= 3
        after = attend(ops, 4, other_qkv, other_dout, positions)
        for name in ("out", "dqkv"):
            assert np.array_equal(bits(after[name][~mine]), bits(before[name][~mine])), name
            assert (after[name] != before[name])[mine].any()
        kept = ~mine[:, None] & np.ones((2, 4, 1), bool)
        assert np.array_equal(bits(after["stats"][kept]), bits(before["stats"][kept]))


def test_a_document_at_a_border_of_tiles_has_the_bits_of_itself_alone(ops: Any) -> None:
    """Elsewhere its sums are cut at other places, so it is equal within rounding."""
    first, length = TILE_K, 131
    for start, same in ((first, True), (first + 1, False)):
        case = Case(B=1, T=start + length + 70, C=36, NH=3, variant=f"{start} {length} 70")
        qkv, dout = (x[None] for x in drawn(ops, case))
        part = slice(start, start + length)
        got = attend(ops, 3, qkv, dout, case.positions)
        alone = attend(ops, 3, qkv[:, part].copy(), dout[:, part].copy())
        pairs = [(got[name][:, part], alone[name]) for name in ("out", "dqkv")]
        for x, y in [*pairs, (got["stats"][..., part], alone["stats"])]:
            error = np.abs(x.astype(np.float64) - y.astype(np.float64)).max()
            assert error == 0 if same else error <= np.abs(y).max() * (1e-6 if ops.dtype == np.float32 else 2.0**-7)
