"""Models with random parameters, and batches for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.laptop import TINY, tiny_model

from llmpy.data.tokenizer import Tokenizer
from llmpy.model.arena import Tensor
from llmpy.model.config import ModelConfig
from llmpy.model.families import language_model
from llmpy.model.language_model import LanguageModel
from llmpy.run import checkpoint


def fill(model: LanguageModel, seed: int = 1) -> None:
    """Set parameters that exercise every term: no bias 0, no LayerNorm weight 1."""
    rng = np.random.default_rng(seed)

    def drawn(tensor: Tensor) -> np.ndarray:
        # Matrices ten times GPT-2's keep attention and softmax far from uniform.
        mean, std = float(tensor.init == "ones"), 0.2 if tensor.decay else 0.1
        return rng.normal(mean, std, tensor.shape).astype(np.float32)

    if model.quantised:
        for tensor in model.params_table(model.config):
            model.assign(tensor.name, drawn(tensor))
        return
    for arena in dict.fromkeys((model.params, model.trained)):
        for tensor, view in arena.items():
            view[...] = drawn(tensor)
    model.store_weights()


def batch(config: ModelConfig, B: int, T: int, seed: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and targets (B, T), int32."""
    text = np.random.default_rng(seed).integers(0, config.vocab_size, (B, T + 1), dtype=np.int32)
    return np.ascontiguousarray(text[:, :-1]), np.ascontiguousarray(text[:, 1:])


def build(config: ModelConfig, ops: Any) -> LanguageModel:
    model = language_model(config, ops)
    fill(model)
    return model


def check_micro_batches(
    whole: LanguageModel, parts: LanguageModel, tokens: np.ndarray, targets: np.ndarray, micro_steps: int
) -> None:
    """Gradients of micro-batches add up to the batch's within 1e-6: rows meet only in float32 sums."""
    want = whole.loss_and_grads(tokens, targets)
    losses = [
        parts.loss_and_grads(x, y, accumulate=i > 0, micro_steps=micro_steps)
        for i, (x, y) in enumerate(zip(np.split(tokens, micro_steps), np.split(targets, micro_steps), strict=True))
    ]
    assert np.mean(losses) == pytest.approx(want, rel=1e-6)
    assert whole.grads is not None
    assert parts.grads is not None
    for tensor, gradient in parts.grads.items():
        expected = getattr(whole.grads, tensor.name)
        error = np.abs(gradient - expected).max() / np.abs(expected).max()
        assert error <= 1e-6, f"{tensor.name}: relative error {error:.2e}"


class Coins:
    """A generator of the given numbers."""

    def __init__(self, *numbers: float) -> None:
        self._numbers: Iterator[float] = iter(numbers)

    def uniform(self) -> float:
        return next(self._numbers)


def untrained_run(folder: Path) -> Path:
    """Write a run folder with an untrained byte model of trained length 8; return it."""
    tokenizer = Tokenizer.bytes()
    checkpoint.save(folder / "model.safetensors", tiny_model(replace(TINY, vocab_size=tokenizer.vocab_size)), 8)
    tokenizer.save(folder / "tokenizer.json")
    return folder
