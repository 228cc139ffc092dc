"""The whole model: gradients against the complex step, the CPU's float32 against float64, and invariants.

Micro-batches add up. Evaluation, thread counts and repeated runs are bitwise identical. A step allocates nothing.
"""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from support.models import batch, build
from support.refused import refused

from llmpy.backend import load
from llmpy.model.config import ModelConfig
from llmpy.model.gpt2 import GPT2

TINY = ModelConfig(layers=2, heads=2, channels=6, context=7, vocab_size=11)
SMALL = ModelConfig(layers=3, heads=3, channels=48, context=40, vocab_size=97)


def cpu(threads: int = 2) -> Any:
    return load("cpu", threads=threads)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got.astype(np.float64) - want).max() / max(np.abs(want).max(), 1e-30))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_the_complex_step(masked: bool) -> None:
    """Every element of small tensors, and random directions through whole tensors, to 1e-10."""
    tokens, targets = batch(TINY, B=2, T=5)
    if masked:
        targets[0, 1:4] = -1
    model = build(TINY, load("reference"))
    loss = model.loss_and_grads(tokens, targets)
    assert model.grads is not None
    step = GPT2(TINY, load("reference", dtype=np.complex128))
    counted = np.count_nonzero(targets >= 0)
    h = 1e-30

    def perturbed() -> complex:
        a = step.forward(tokens, step.reserve(*tokens.shape, training=False))
        step.ops.classifier(a.losses, None, None, a.ln_f, step.params.wte, targets, TINY.vocab_size, 0.0, False)
        return complex(a.losses.sum() / counted)

    step.params.buffer[...] = model.params.buffer
    assert perturbed().real == pytest.approx(loss, rel=1e-14)
    rng = np.random.default_rng(3)
    for tensor, view in step.params.items():
        gradient = getattr(model.grads, tensor.name)
        start = view.copy()
        scale = np.abs(gradient).max()
        assert scale > 1e-4, tensor.name
        if tensor.size <= 48:
            for i in np.ndindex(tensor.shape):
                view[i] += 1j * h
                assert abs(perturbed().imag / h - gradient[i]) <= 1e-10 * scale, (tensor.name, i)
                view[...] = start
        for _ in range(4):
            direction = rng.normal(size=tensor.shape)
            view[...] = start + 1j * h * direction
            error = abs(perturbed().imag / h - (direction * gradient).sum())
            assert error <= 1e-10 * np.linalg.norm(gradient), tensor.name
        view[...] = start


@pytest.mark.parametrize(("B", "T"), [(2, 33), (1, 40), (3, 1)])
def test_cpu_agrees_with_the_reference(B: int, T: int) -> None:
    tokens, targets = batch(SMALL, B, T)
    exact, fast = build(SMALL, load("reference")), build(SMALL, cpu())
    want, got = exact.loss_and_grads(tokens, targets), fast.loss_and_grads(tokens, targets)
    assert got == pytest.approx(want, rel=1e-6)
    assert exact.grads is not None
    assert fast.grads is not None
    for tensor, gradient in fast.grads.items():
        expected = getattr(exact.grads, tensor.name)
        if T == 1 and tensor.name == "attn_qkv_w":
            # With one key softmax is 1: the exact gradient of queries and keys is 0.
            C = SMALL.channels
            gradient, expected = gradient[:, 2 * C :], expected[:, 2 * C :]
        error = relative_error(gradient, expected)
        assert error <= 1e-5, f"{tensor.name}: relative error {error:.2e}"
    assert relative_error(fast.logits(tokens), exact.logits(tokens)) <= 1e-5
    assert relative_error(fast.logits(tokens, 0), exact.logits(tokens, 0)) <= 1e-5


@pytest.mark.parametrize("micro_steps", [2, 3])
def test_micro_batches_add_up_to_the_batch(micro_steps: int) -> None:
    tokens, targets = batch(SMALL, B=6, T=17)
    whole, parts = build(SMALL, cpu()), build(SMALL, cpu())
    want = whole.loss_and_grads(tokens, targets)
    losses = [
        parts.loss_and_grads(x, y, accumulate=i > 0, micro_steps=micro_steps)
        for i, (x, y) in enumerate(zip(np.split(tokens, micro_steps), np.split(targets, micro_steps), strict=True))
    ]
    assert np.mean(losses) == pytest.approx(want, rel=1e-6)
    assert whole.grads is not None
    assert parts.grads is not None
    for tensor, gradient in parts.grads.items():
        error = relative_error(gradient, getattr(whole.grads, tensor.name))
        assert error <= 1e-6, f"{tensor.name}: relative error {error:.2e}"


def test_gradients_do_not_depend_on_old_values() -> None:
    """The first micro-step overwrites every gradient, activation and scratch, even NaN."""
    tokens, targets = batch(SMALL, B=2, T=9)
    model = build(SMALL, cpu())
    model.loss_and_grads(tokens, targets)
    assert model.grads is not None
    once = model.grads.buffer.copy()
    for arena in (model.grads, *model._acts.values()):
        arena.buffer.fill(np.nan)
    model.loss_and_grads(tokens, targets)
    assert np.array_equal(model.grads.buffer, once)


def test_evaluation_keeps_one_layer_and_is_exact() -> None:
    tokens, targets = batch(SMALL, B=2, T=33)
    model = build(SMALL, cpu())
    lean = model.loss(tokens, targets)
    (arena,) = model._acts.values()
    assert arena.qkv.shape[0] == 1
    trained = model.loss_and_grads(tokens, targets)
    assert model.reserve(2, 33, training=False).qkv.shape[0] == SMALL.layers
    assert lean == trained == model.loss(tokens, targets)


def test_masked_targets_leave_the_mean() -> None:
    tokens, targets = batch(SMALL, B=1, T=8)
    model = build(SMALL, cpu())
    masked = targets.copy()
    masked[:, 5:] = -1
    assert model.loss(tokens, masked) == pytest.approx(model.loss(tokens[:, :5], targets[:, :5]), rel=1e-6)
    nothing = np.full_like(targets, -1)
    assert model.loss_and_grads(tokens, nothing) == 0
    assert model.grads is not None
    assert not model.grads.buffer.any()


def train(threads: int, steps: int = 20) -> tuple[np.ndarray, list[float]]:
    """Return parameters and losses after AdamW steps on two alternating batches."""
    ops = cpu(threads)
    model = build(SMALL, ops)
    batches = [batch(SMALL, 2, 33, seed) for seed in (4, 5)]
    m, v = (ops.empty(model.params.size, ops.dtype) for _ in range(2))
    ops.zero(m)
    ops.zero(v)
    losses = []
    for step in range(1, steps + 1):
        losses.append(model.loss_and_grads(*batches[step % 2]))
        update(model, ops, m, v, step)
    return model.params.buffer.copy(), losses


def update(model: GPT2, ops: Any, m: np.ndarray, v: np.ndarray, step: int) -> None:
    """AdamW on matrices with decay and on vectors without, clipped by the global norm."""
    assert model.grads is not None
    clip = min(1.0, 1.0 / ops.global_norm(model.grads.buffer))
    for part, decay in (
        (slice(None, model.matrix_elements), 0.1),
        (slice(model.matrix_elements, None), 0.0),
    ):
        arrays = (x[part] for x in (model.params.buffer, model.grads.buffer, m, v))
        ops.adamw(*arrays, 1e-3, 0.9, 0.95, 1e-8, decay, clip, step)


def test_results_do_not_depend_on_threads_or_runs() -> None:
    params, losses = train(threads=1)
    assert losses[-1] < losses[0] - 0.1
    for threads in (2, 3, 2):
        again, same = train(threads)
        assert same == losses, f"losses at {threads} threads"
        assert np.array_equal(again.view(np.uint32), params.view(np.uint32)), f"parameters at {threads} threads"


def test_a_step_allocates_no_arrays() -> None:
    """Measured by tracemalloc: a warm step's peak stays below any (BT, C) array."""
    ops = cpu()
    model = build(SMALL, ops)
    tokens, targets = batch(SMALL, 2, 33)
    m, v = (ops.empty(model.params.size, ops.dtype) for _ in range(2))
    ops.zero(m)
    ops.zero(v)

    def step(number: int) -> None:
        model.loss_and_grads(tokens, targets)
        model.loss_and_grads(tokens, targets, accumulate=True)
        update(model, ops, m, v, number)

    for number in (1, 2):
        step(number)
    tracemalloc.start()
    try:
        step(3)  # fills Python's own caches
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        step(4)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < 8192, f"a step allocated {peak - before} bytes"


def test_batches_that_do_not_fit() -> None:
    model = GPT2(SMALL, load("reference"))
    with refused("model.context-exceeded", 41, 40, "-T"):
        model.reserve(1, 41, training=False)
    with refused("model.batch-size", "-B"):
        model.reserve(0, 8, training=True)
