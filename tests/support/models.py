"""Models with random parameters, and batches for them."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmpy.model.config import ModelConfig
from llmpy.model.gpt2 import GPT2


def fill(model: GPT2, seed: int = 1) -> None:
    """Parameters that exercise every term: no zero biases, no LayerNorm weights of exactly one."""
    rng = np.random.default_rng(seed)
    for tensor, view in model.params.items():
        # Matrices ten times as large as GPT-2's own, so that attention and softmax are far from uniform.
        mean, std = float(tensor.init == "ones"), 0.2 if tensor.decay else 0.1
        view[...] = rng.normal(mean, std, tensor.shape).astype(np.float32)


def batch(config: ModelConfig, B: int, T: int, seed: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets (B, T), int32."""
    text = np.random.default_rng(seed).integers(0, config.vocab_size, (B, T + 1), dtype=np.int32)
    return np.ascontiguousarray(text[:, :-1]), np.ascontiguousarray(text[:, 1:])


def build(config: ModelConfig, ops: Any) -> GPT2:
    model = GPT2(config, ops)
    fill(model)
    return model
