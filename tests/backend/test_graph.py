"""Kernels replayed without Python: bitwise identical results from the current array contents."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np
import pytest
from support.guarded import bits

from llmpy.backend import cpu, load
from llmpy.backend.cpu import graph, jit
from llmpy.generate.kv_cache import Decoder
from llmpy.model.config import ModelConfig
from llmpy.model.gpt2 import GPT2
from llmpy.model.initialise import initialise


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def machines(request: pytest.FixtureRequest) -> list[Any]:
    """The same backend with 1 and 3 threads."""
    return [load("cpu", threads=n, dtype=request.param) for n in (1, 3)]


class LlamaWork:
    """RMSNorm, of rows with a residual and of heads, and RoPE."""

    def __init__(self, ops: Any, rows: int = 5, HS: int = 6) -> None:
        self.ops, self.heads, W = ops, 3, 4 * HS
        self.inp, self.resid = ops.empty((rows, W), ops.wide), ops.empty((rows, W), ops.wide)
        self.out, self.qkv = ops.empty((rows, W), ops.dtype), ops.empty((rows, W), ops.dtype)
        self.rstd, self.head_rstd = ops.empty(rows, ops.wide), ops.empty((rows, self.heads), ops.wide)
        self.weight, self.positions = np.ones(W, np.float32), np.arange(rows, dtype=np.int32)
        self.angles = np.random.default_rng(0).normal(size=(rows, HS // 2)).astype(np.float32)

    def draw(self, seed: int) -> None:
        self.inp[...] = np.random.default_rng(seed).standard_normal(self.inp.shape, np.float32)
        self.positions[...] = self.positions[::-1].copy()

    def run(self) -> None:
        ops, weight = self.ops, self.weight[: 2 * self.angles.shape[1]]
        ops.rmsnorm_forward(self.out, self.rstd, self.inp, self.weight, 1e-2)
        ops.residual_rmsnorm_forward(self.resid, self.out, self.rstd, self.inp, self.out, self.weight, 1e-1)
        ops.head_rmsnorm_forward(self.qkv, self.head_rstd, self.out, weight, weight, 1e-3)
        ops.rope(self.qkv, np.cos(self.angles), np.sin(self.angles), self.positions, self.heads, True)

    def outputs(self) -> tuple[np.ndarray, ...]:
        return self.out, self.rstd, self.resid, self.qkv, self.head_rstd

    def results(self) -> list[np.ndarray]:
        return [bits(x).copy() for x in self.outputs()]


class Work:
    """LayerNorm of some rows, and two products, with and without a bias."""

    def __init__(self, ops: Any, rows: int = 5, C: int = 37, OC: int = 101) -> None:
        self.ops = ops
        self.inp, self.out = ops.empty((rows, C), ops.wide), ops.empty((rows, C), ops.dtype)
        self.stats = ops.empty(rows, ops.wide), ops.empty(rows, ops.wide)
        self.norm = np.ones(C, np.float32), np.zeros(C, np.float32)
        self.weight, self.bias = ops.empty((OC, C), ops.dtype), np.ones(OC, np.float32)
        self.wide, self.narrow = ops.empty((rows, OC), ops.dtype), ops.empty((rows, C), ops.dtype)
        self.weight[...] = np.random.default_rng(0).standard_normal((OC, C), np.float32)

    def draw(self, seed: int) -> None:
        self.inp[...] = np.random.default_rng(seed).standard_normal(self.inp.shape, np.float32)

    def run(self) -> None:
        self.ops.layernorm_forward(self.out, *self.stats, self.inp, *self.norm)
        self.ops.linear_forward(self.wide, self.out, self.weight, self.bias)
        self.ops.linear_forward(self.narrow, self.wide, self.weight.reshape(-1, 101), None)

    def outputs(self) -> tuple[np.ndarray, ...]:
        return self.out, *self.stats, self.wide, self.narrow

    def results(self) -> list[np.ndarray]:
        return [bits(x).copy() for x in self.outputs()]


def test_replayed_calls_have_the_bits_of_the_calls(machines: list[Any]) -> None:
    for ops, kind in itertools.product(machines, (Work, LlamaWork)):
        work, again = kind(ops), kind(ops)
        again.draw(0)
        replay = ops.capture(again.run)
        work.draw(0)
        for seed in (1, 2):
            work.draw(seed)
            again.draw(seed)
            work.run()
            for x in again.outputs():
                x[...] = np.nan
            replay()
            assert all(np.array_equal(a, b) for a, b in zip(work.results(), again.results(), strict=True))


def test_capturing_runs_once_and_stops_recording(machines: list[Any]) -> None:
    work = Work(machines[0])
    work.draw(3)
    work.run()
    want = work.results()
    captured = Work(machines[0])
    captured.draw(3)
    with graph.recording() as calls:
        captured.run()
    assert all(np.array_equal(a, b) for a, b in zip(want, captured.results(), strict=True))
    assert len(calls) == 3
    captured.run()
    assert len(calls) == 3


def test_calls_of_another_thread_are_not_recorded(machines: list[Any]) -> None:
    work, elsewhere = Work(machines[0]), Work(machines[0])
    other = threading.Thread(target=elsewhere.run)
    with graph.recording() as calls:
        other.start()
        other.join()
        assert calls == []
        work.run()
    assert len(calls) == 3


def test_an_interrupted_capture_stops_recording(machines: list[Any]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        machines[0].capture(interrupted)
    assert jit.notes.calls is None


def test_captures_do_not_nest(machines: list[Any]) -> None:
    work = Work(machines[0])
    replay = machines[0].capture(work.run)
    with pytest.raises(RuntimeError, match="recorded"):
        machines[0].capture(lambda: machines[0].capture(work.run))
    with pytest.raises(RuntimeError, match="replay"):
        machines[0].capture(replay)
    replay()


def test_a_family_compiles_its_own_kernels(machines: list[Any]) -> None:
    kernels = {kind: {name for name, _ in cpu.smallest_calls(machines[0], [kind])} for kind in cpu.KINDS}
    assert {name for name in kernels["gpt2"] if "rms" in name or "rope" in name} == set()
    assert {name for name in kernels["llama"] if "layernorm" in name} == set()
    for kind, names in cpu.KINDS.items():
        assert names <= kernels[kind]
    assert cpu.REPLAYED <= cpu.DECODING <= set().union(*kernels.values()) | {"narrow"}


def test_decoding_compiles_nothing(machines: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """After `warm_up`: generation may be interrupted, a compilation by LLVM may not."""
    model = GPT2(ModelConfig(layers=2, heads=2, channels=32, context=16, vocab_size=300), machines[1])
    initialise(model.params, model.config)
    model.store_weights()
    machines[1].warm_up(lambda _: None, decoding=True)
    monkeypatch.setattr(graph, "_compile_step", None)
    for pack in (True, False):
        decoder = Decoder(model, B=2, S=16, pack=pack)
        for slot in range(2):
            decoder.prefill(slot, [1, 2, 3])
        assert np.isfinite(decoder.decode([0, 1], [4, 5])).all()
        assert np.isfinite(decoder.decode([1], [6])).all()


def test_a_graph_keeps_its_arrays(machines: list[Any]) -> None:
    ops = machines[0]

    def made() -> tuple[Any, np.ndarray, np.ndarray]:
        work = Work(ops)
        work.draw(4)
        return ops.capture(work.run), work.narrow, work.results()[-1]

    replay, out, want = made()
    filler = [np.full((5, 101), 7, ops.dtype) for _ in range(50)]
    out[...] = 0
    replay()
    assert np.array_equal(bits(out), want)
    assert all((x == 7).all() for x in filler)


def test_floats_as_arguments_or_results_are_refused(machines: list[Any]) -> None:
    ops = machines[0]
    grad = np.ones(100, np.float32)
    with pytest.raises(TypeError, match="global_norm"):
        ops.capture(lambda: ops.global_norm(grad))
    state = [np.ones(100, np.float32) for _ in range(4)]
    stored = np.ones(100, ops.dtype) if ops.dtype != ops.wide else None
    with pytest.raises(TypeError, match="adamw"):
        ops.capture(lambda: ops.adamw(*state, 1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0, 1, stored))


@jit.inline
def _fail_on_three(worker, item, x):
    if x[item] == 3:
        raise ValueError("three")


@jit.kernel
def fail_on_three(threads, x):
    jit.fork(_fail_on_three, threads, x.shape[0], (x,))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_failing_kernel_raises(threads: int) -> None:
    jit.hire(threads)
    x = np.zeros(10)
    with graph.recording() as calls:
        fail_on_three(threads, x)
    replay = graph.Graph(calls)
    replay()
    x[7] = 3
    with pytest.raises(RuntimeError, match="a parallel kernel failed"):
        replay()
