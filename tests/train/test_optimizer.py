"""AdamW against its equations, clipping, weight decay, and no allocation."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from support.laptop import Laptop, tiny_model
from support.refused import refused

from llmpy.model.gpt2 import GPT2
from llmpy.train.optimizer import EPSILON, AdamW


def random_gradients(model: GPT2, size: float, seed: int = 0) -> np.ndarray:
    """Fill the gradients; return them in float64."""
    assert model.grads is not None
    values = np.random.default_rng(seed).normal(0, size, model.grads.size).astype(np.float32)
    model.grads.buffer[...] = values
    return values.astype(np.float64)


@pytest.mark.parametrize("size", [1e-5, 1.0])  # below the clip, and far above it
def test_three_updates_against_the_equations(size: float) -> None:
    model = tiny_model()
    optimizer = AdamW(model, beta1=0.8, beta2=0.9, weight_decay=0.3, clip=1.0)
    p = model.params.buffer.astype(np.float64)
    decay = np.concatenate([np.full(t.size, 0.3 if t.decay else 0.0) for t in model.params.table])
    m = v = np.zeros_like(p)
    for t, lr in ((1, 1e-2), (2, 2e-2), (3, 1e-3)):
        g = random_gradients(model, size, seed=t)
        norm = math.sqrt((g * g).sum())
        assert optimizer.step(lr) == pytest.approx(norm, rel=1e-5)
        g *= min(1.0, 1.0 / norm)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        p -= lr * (m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + EPSILON) + decay * p)
        np.testing.assert_allclose(model.params.buffer, p, rtol=1e-4, atol=1e-6)


def test_decay_ends_with_the_matrices() -> None:
    model = tiny_model()
    model.params.buffer[...] = 1.0
    assert model.grads is not None
    model.grads.buffer[...] = 0.0
    AdamW(model, weight_decay=0.5).step(0.1)
    for tensor, view in model.params.items():
        expected = np.float32(0.95) if len(tensor.shape) > 1 and not tensor.name.endswith("_b") else 1.0
        if tensor.name.startswith("ln_"):
            expected = 1.0
        np.testing.assert_allclose(view, expected, rtol=1e-6, err_msg=tensor.name)


def test_no_clipping_with_0() -> None:
    clipped, free = tiny_model(), tiny_model()
    for model, clip in ((clipped, 1e-12), (free, 0.0)):
        random_gradients(model, 1.0)
        AdamW(model, clip=clip).step(1e-2)
    # Adam is scale-invariant unless epsilon dominates, as at 1e-12.
    start = tiny_model().params.buffer
    assert np.abs(clipped.params.buffer - start).max() < 1e-3 < np.abs(free.params.buffer - start).max()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(poison: float) -> None:
    model = tiny_model()
    optimizer = AdamW(model)
    random_gradients(model, 1.0)
    assert model.grads is not None
    model.grads.buffer[5] = poison
    before = model.params.buffer.copy()
    with refused("optimizer.not-finite", poison):
        optimizer.step(1e-3)
    assert np.array_equal(model.params.buffer, before)
    assert not optimizer.m.any()
    assert not optimizer.v.any()
    assert optimizer.updates == 0


def test_it_needs_gradients() -> None:
    from llmpy.model.config import ModelConfig

    with pytest.raises(ValueError, match="reserve"):
        AdamW(GPT2(ModelConfig(1, 1, 4, 8, 300), Laptop()))


def test_a_step_allocates_nothing() -> None:
    model = tiny_model()
    optimizer = AdamW(model)
    random_gradients(model, 1.0)
    optimizer.step(1e-3)
    tracemalloc.start()
    try:
        for _ in range(5):
            optimizer.step(1e-3)
        current, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert current < 4096
