"""Whole models of every family: gradients against the complex step, the CPU's float32 against float64, and invariants.

Micro-batches add up. Evaluation, thread counts and repeated runs are bitwise identical. A step allocates nothing.
"""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.models import batch, build, check_micro_batches
from support.refused import refused

from llmpy.backend import load
from llmpy.generate.kv_cache import Decoder
from llmpy.model.config import LlamaConfig, ModelConfig, RopeScaling
from llmpy.model.families import language_model, modules
from llmpy.model.language_model import LanguageModel
from llmpy.model.lora import LoraConfig, chosen


def with_lora(config: ModelConfig, *targets: str) -> ModelConfig:
    return replace(config, lora=LoraConfig(3, 2.0, chosen(modules(config), targets)))


GPT2 = ModelConfig(layers=2, heads=2, channels=6, context=7, vocab_size=11)
LLAMA = LlamaConfig(layers=2, heads=4, channels=6, context=7, vocab_size=11, kv_heads=2, head_size=2, ffn=5)
TINY = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "stretched": replace(LLAMA, tied=False, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32), rope_theta=50.0),
    "qwen2": replace(LLAMA, qkv_bias=True, kv_heads=1),
    "qwen3": replace(LLAMA, qk_norm=True, head_size=4),
    "gpt2 lora": with_lora(GPT2),
    "llama lora": with_lora(LLAMA),
    "qwen3 lora": with_lora(replace(LLAMA, qk_norm=True, qkv_bias=True), "v_proj", "up_proj", "down_proj"),
}
WIDER = {"layers": 3, "channels": 48, "context": 40, "vocab_size": 97}
SMALL = ModelConfig(heads=3, **WIDER)
KINDS = {
    name: replace(c, **WIDER, heads=3) if c.family == "gpt2" else
    replace(c, **WIDER, heads=6, head_size=2 * c.head_size + 4, ffn=70) for name, c in TINY.items()
}  # fmt: skip
every = pytest.mark.parametrize("kind", KINDS)


def cpu(threads: int = 2) -> Any:
    return load("cpu", threads=threads)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got.astype(np.float64) - want).max() / max(np.abs(want).max(), 1e-30))


@pytest.mark.parametrize(("kind", "masked"), [(kind, kind == "llama") for kind in TINY] + [("gpt2", True)])
def test_gradients_are_the_complex_step(kind: str, masked: bool) -> None:
    """Every element of small tensors, and random directions through whole tensors, to 1e-10."""
    config = TINY[kind]
    tokens, targets = batch(config, B=2, T=5)
    if masked:
        targets[0, 1:4] = -1
    model = build(config, load("reference"))
    loss = model.loss_and_grads(tokens, targets)
    assert model.grads is not None
    step = language_model(config, load("reference", dtype=np.complex128))
    counted = np.count_nonzero(targets >= 0)
    h = 1e-30

    def perturbed() -> complex:
        a = step.forward(tokens, step.reserve(*tokens.shape, training=False))
        head, V = getattr(step.params, step.head), config.vocab_size
        step.ops.classifier(a.losses, None, None, a.final, head, targets, V, 0.0, False)
        return complex(a.losses.sum() / counted)

    step.params.buffer[...] = model.params.buffer
    step.trained.buffer[...] = model.trained.buffer
    assert perturbed().real == pytest.approx(loss, rel=1e-14)
    rng = np.random.default_rng(3)
    for tensor, view in step.trained.items():
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
@every
def test_cpu_agrees_with_the_reference(kind: str, B: int, T: int) -> None:
    config = KINDS[kind]
    tokens, targets = batch(config, B, T)
    exact, fast = build(config, load("reference")), build(config, cpu())
    want, got = exact.loss_and_grads(tokens, targets), fast.loss_and_grads(tokens, targets)
    assert got == pytest.approx(want, rel=1e-6)
    assert exact.grads is not None
    assert fast.grads is not None
    for tensor, gradient in fast.grads.items():
        expected = getattr(exact.grads, tensor.name)
        if T == 1:  # with one key softmax is 1: the exact gradient of queries and keys is 0
            if tensor.name in ("attn_qkv_w", "attn_qkv_b"):
                C = (config.heads + config.kv_heads) * config.head_size
                gradient, expected = gradient[:, C:], expected[:, C:]
            elif tensor.name.startswith(("q_", "k_", "self_attn.q_", "self_attn.k_")):
                continue
        error = relative_error(gradient, expected)
        assert error <= 1e-5, f"{tensor.name}: relative error {error:.2e}"
    assert relative_error(fast.logits(tokens), exact.logits(tokens)) <= 1e-5
    assert relative_error(fast.logits(tokens, 0), exact.logits(tokens, 0)) <= 1e-5


@every
@pytest.mark.parametrize("micro_steps", [2, 3])
def test_micro_batches_add_up_to_the_batch(kind: str, micro_steps: int) -> None:
    tokens, targets = batch(KINDS[kind], B=6, T=17)
    check_micro_batches(build(KINDS[kind], cpu()), build(KINDS[kind], cpu()), tokens, targets, micro_steps)


@every
def test_gradients_do_not_depend_on_old_values(kind: str) -> None:
    """The first micro-step overwrites every gradient, activation and scratch, even NaN."""
    tokens, targets = batch(KINDS[kind], B=2, T=9)
    model = build(KINDS[kind], cpu())
    model.loss_and_grads(tokens, targets)
    assert model.grads is not None
    once = model.grads.buffer.copy()
    for arena in (model.grads, *model._acts.values(), *((model.adapters._room(1),) if model.adapters else ())):
        arena.buffer.fill(np.nan)
    model.loss_and_grads(tokens, targets)
    assert np.array_equal(model.grads.buffer, once)


@every
def test_evaluation_keeps_one_layer_and_is_exact(kind: str) -> None:
    tokens, targets = batch(KINDS[kind], B=2, T=33)
    model = build(KINDS[kind], cpu())
    lean = model.loss(tokens, targets)
    (arena,) = model._acts.values()
    assert arena.qkv.shape[0] == 1
    trained = model.loss_and_grads(tokens, targets)
    assert model.reserve(2, 33, training=False).qkv.shape[0] == KINDS[kind].layers
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


def train(threads: int, config: ModelConfig, steps: int = 20) -> tuple[np.ndarray, list[float]]:
    """Return parameters and losses after AdamW steps on two alternating batches."""
    ops = cpu(threads)
    model = build(config, ops)
    batches = [batch(config, 2, 33, seed) for seed in (4, 5)]
    m, v = (ops.empty(model.trained.size, ops.dtype) for _ in range(2))
    ops.zero(m)
    ops.zero(v)
    losses = []
    for step in range(1, steps + 1):
        losses.append(model.loss_and_grads(*batches[step % 2]))
        update(model, ops, m, v, step)
    return model.trained.buffer.copy(), losses


def update(model: LanguageModel, ops: Any, m: np.ndarray, v: np.ndarray, step: int) -> None:
    """AdamW on matrices with decay and on vectors without, clipped by the global norm."""
    assert model.grads is not None
    clip = min(1.0, 1.0 / ops.global_norm(model.grads.buffer))
    for part, decay in (
        (slice(None, model.matrix_elements), 0.1),
        (slice(model.matrix_elements, None), 0.0),
    ):
        arrays = (x[part] for x in (model.trained.buffer, model.grads.buffer, m, v))
        ops.adamw(*arrays, 1e-3, 0.9, 0.95, 1e-8, decay, clip, step)


@every
def test_results_do_not_depend_on_threads_or_runs(kind: str) -> None:
    config = KINDS[kind]
    params, losses = train(1, config)
    assert losses[-1] < losses[0] - (0.1 if config.lora is None else 0.05)  # a few parameters learn less
    for threads in (2, 3, 2):
        again, same = train(threads, config)
        assert same == losses, f"losses at {threads} threads"
        assert np.array_equal(again.view(np.uint32), params.view(np.uint32)), f"parameters at {threads} threads"


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "llama lora"])
def test_a_step_allocates_no_arrays(kind: str) -> None:
    """Measured by tracemalloc: a warm step's peak stays below any (BT, C) array."""
    ops = cpu()
    model = build(KINDS[kind], ops)
    tokens, targets = batch(KINDS[kind], 2, 33)
    m, v = (ops.empty(model.trained.size, ops.dtype) for _ in range(2))
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
    model = language_model(SMALL, load("reference"))
    with refused("model.context-exceeded", 41, 40, "-T"):
        model.reserve(1, 41, training=False)
    with refused("model.batch-size", "-B"):
        model.reserve(0, 8, training=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every
def test_decoding_has_the_bits_of_training(kind: str, dtype: str) -> None:
    """Of prefill, of one token, and of two texts at different positions."""
    config = KINDS[kind]
    model = build(config, load("cpu", threads=2, dtype=dtype))
    text, _ = batch(config, 2, 21)
    whole = model.logits(text, None)
    decoder = Decoder(model, 2, config.context)
    assert np.array_equal(decoder.prefill(0, text[0, :13].tolist()), whole[0, 12])
    assert np.array_equal(decoder.prefill(1, text[1, :5].tolist()), whole[1, 4])
    for i in range(7):
        logits = decoder.decode([0, 1], [int(text[0, 13 + i]), int(text[1, 5 + i])])
        assert np.array_equal(logits[0], whole[0, 13 + i])
        assert np.array_equal(logits[1], whole[1, 5 + i])


@pytest.mark.parametrize("recompute", [0, 2])
@every
def test_recomputing_changes_no_bit(kind: str, recompute: int) -> None:
    tokens, targets = batch(KINDS[kind], 2, 17)
    model = build(KINDS[kind], cpu())
    loss = model.loss_and_grads(tokens, targets)
    assert model.grads is not None
    want = model.grads.buffer.copy()
    model.release()
    model.recompute = recompute
    assert model.loss_and_grads(tokens, targets) == loss
    assert np.array_equal(model.grads.buffer, want)


@every
def test_texts_in_one_row_are_apart(kind: str) -> None:
    """Loss and gradients of packed texts are those of each text in its own row."""
    config, lengths = KINDS[kind], (9, 1, 13)
    tokens, targets = batch(config, 1, sum(lengths))
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None]
    apart, padded = np.zeros((3, 13), np.int32), np.full((3, 13), -1, np.int32)
    for row, (n, end) in enumerate(zip(lengths, np.cumsum(lengths), strict=True)):
        apart[row, :n], padded[row, :n] = tokens[0, end - n : end], targets[0, end - n : end]
    exact = build(config, load("reference"))
    want = exact.loss_and_grads(apart, padded)
    assert exact.grads is not None
    for model, close in ((build(config, load("reference")), 1e-12), (build(config, cpu()), 1e-5)):
        assert model.loss_and_grads(tokens, targets, positions=positions) == pytest.approx(want, rel=close)
        assert model.grads is not None
        for tensor, gradient in model.grads.items():
            error = relative_error(gradient, getattr(exact.grads, tensor.name))
            assert error <= close, f"{tensor.name}: relative error {error:.2e}"
