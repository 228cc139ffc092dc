"""Initialise parameters in llm.c's order, which is PyTorch's order of modules."""

from __future__ import annotations

from typing import Any

from ..rng import MT19937
from .arena import Arena, Tensor
from .config import ModelConfig

CONSTANTS = {"ones": 1.0, "zeros": 0.0}


def initialise(params: Arena, config: ModelConfig, seed: int = 42) -> None:
    """Fill every tensor of `params` as its row of the table specifies (`init`, `std`).

    One generator draws wte and an untied head (V rows; the padding rows := 0), wpe, and then, layer by layer, the
    layer's matrices in the order of the table. Source: llm.c, `gpt2_build_from_random`.
    """
    rng = MT19937(seed)
    stacked: list[tuple[Tensor, Any]] = []
    for tensor, view in params.items():
        if tensor.init in CONSTANTS:
            view[...] = CONSTANTS[tensor.init]
        elif tensor.init not in ("normal", "uniform"):
            raise ValueError(f"{tensor.name}: unknown init {tensor.init!r}; use normal, uniform, ones or zeros")
        elif tensor.per_layer:
            stacked.append((tensor, view))
        else:
            rows = config.context if tensor.name == "wpe" else config.vocab_size
            rng.fill_normal(view[:rows].reshape(-1), 0.0, tensor.std)
            view[rows:] = 0.0
    for l in range(config.layers):
        for tensor, view in stacked:
            if tensor.init == "normal":
                rng.fill_normal(view[l].reshape(-1), 0.0, tensor.std)
            else:
                view[l] = (tensor.std * (2 * rng.uniform(view[l].size) - 1)).reshape(view[l].shape)
