"""Tensors that share memory: their places, and that no step needs two at one place."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.refused import refused

from llmpy.backend import load
from llmpy.model.arena import Arena, Tensor, memory, placed
from llmpy.model.config import ModelConfig
from llmpy.model.gpt2 import GPT2, activations_table
from llmpy.model.initialise import initialise

SMALL = ModelConfig(layers=3, heads=2, channels=24, context=16, vocab_size=37)
B, T = 2, 11


@given(st.lists(st.tuples(st.integers(0, 9), st.frozensets(st.integers(0, 4), max_size=3)), max_size=12))
def test_no_step_has_two_tensors_in_one_place(rows: list[tuple[int, frozenset[int]]]) -> None:
    table = [Tensor(f"t{i}", (size,), steps=steps) for i, (size, steps) in enumerate(rows)]
    starts, end = placed(table)
    for step in range(5):
        owners = np.zeros(end, int)
        for t in table:
            if step in t.steps or not t.steps:
                owners[starts[t.name] : starts[t.name] + t.size] += 1
        assert owners.max(initial=0) <= 1
    assert end <= sum(t.size for t in table)
    kept = [t for t in table if not t.steps]
    assert [starts[t.name] for t in kept] == np.cumsum([0, *(t.size for t in kept)]).tolist()[: len(kept)]


def test_tensors_of_different_steps_share() -> None:
    table = [
        Tensor("kept", (5,)),
        Tensor("early", (4,), steps=frozenset({0})),
        Tensor("late", (6,), steps=frozenset({2})),
        Tensor("long", (3,), steps=frozenset({0, 1, 2})),
    ]
    assert placed(table) == ({"kept": 0, "late": 5, "early": 5, "long": 11}, 14)
    assert memory([*table, Tensor("broad", (2,), wide=True)], 2, 4) == 2 * 14 + 4 * 2
    arena = Arena(table, np.empty, np.float32)
    arena.early[:] = 1
    assert arena.late[:4].tolist() == [1] * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sharing_and_recomputing_are_exact(dtype: str) -> None:
    rng = np.random.default_rng(1)
    tokens, targets = rng.integers(0, SMALL.vocab_size, (2, B, T), dtype=np.int32)
    ops, found = load("cpu", threads=2, dtype=dtype), []
    for recompute, shared in itertools.product((0, 1, 2), (True, False)):
        model = GPT2(SMALL, ops, recompute)
        initialise(model.params, SMALL)
        model.store_weights()
        for training in (False, True):
            table = activations_table(SMALL, B, T, training, recompute, model.mixed)
            table = table if shared else [replace(t, steps=frozenset()) for t in table]
            arena = model._acts[B, T, training] = Arena(table, ops.empty, ops.dtype, ops.wide)
            for buffer in arena.buffers:
                buffer.fill(np.nan)
            if not training:
                logits = model.logits(tokens)
                del model._acts[B, T, training]
        model.reserve(B, T, training=True)
        losses = [model.loss_and_grads(tokens, targets), model.loss(tokens, targets)]
        assert model.grads is not None
        found.append((logits, losses, model.grads.buffer))
    for arrays in zip(*found, strict=True):
        assert np.isfinite(np.asarray(arrays[0])).all()
        assert all(np.array_equal(arrays[0], other) for other in arrays[1:])


def test_an_inference_model_has_the_same_logits() -> None:
    ops = load("cpu", threads=2, dtype="bfloat16")
    whole, lean = GPT2(SMALL, ops), GPT2(SMALL, ops, trainable=False)
    initialise(whole.params, SMALL)
    whole.store_weights()
    for tensor, view in lean.params.items():
        view[...] = getattr(whole.params, tensor.name)
    tokens = np.arange(2 * T, dtype=np.int32).reshape(2, T)
    assert np.array_equal(lean.logits(tokens), whole.logits(tokens))
    assert sum(b.nbytes for b in lean.params.buffers) < 0.6 * whole.params.buffer.nbytes
    with refused("model.no-gradients", "float32"):
        lean.reserve(B, T, training=True)
