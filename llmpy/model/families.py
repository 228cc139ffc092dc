"""From a config to its family's model and tables."""

from __future__ import annotations

from typing import Any

from ..backend import Ops
from .arena import Tensor
from .config import ModelConfig
from .gpt2 import GPT2
from .language_model import RECOMPUTE, LanguageModel
from .llama import Llama
from .lora import LoraConfig, Module, adapter_table

FAMILIES: dict[str, type[LanguageModel]] = {"gpt2": GPT2, "llama": Llama}


def language_model(
    config: ModelConfig, ops: Ops, *, recompute: int = RECOMPUTE, trainable: bool = True,
    lora: LoraConfig | None = None,
) -> LanguageModel:  # fmt: skip
    """Return a model of this shape; see `LanguageModel`."""
    return FAMILIES[config.family](config, ops, recompute, trainable, lora)


def trained_table(config: ModelConfig, lora: LoraConfig | None) -> list[Tensor]:
    """Return the parameters that training updates: the adapters, or all."""
    table = params_table(config)
    if lora is None:
        return table
    inputs = {t.name.removesuffix("_w"): t.shape[-1] for t in table if t.decay and t.per_layer}
    return adapter_table(lora, modules(config), inputs, config.layers)


def modules(config: ModelConfig) -> list[Module]:
    """Return the linear layers of a layer; see `LanguageModel.modules`."""
    return FAMILIES[config.family].modules(config)


def head_of(config: ModelConfig) -> str:
    """Return the name of the head's weight (Vp, C)."""
    return FAMILIES[config.family].head_of(config)


def params_table(config: ModelConfig) -> list[Tensor]:
    """Return every parameter; see `LanguageModel.params_table`."""
    return FAMILIES[config.family].params_table(config)


def activations_table(config: ModelConfig, *shape: Any, **options: Any) -> list[Tensor]:
    """Return every activation; see `LanguageModel.activations_table`."""
    return FAMILIES[config.family].activations_table(config, *shape, **options)
