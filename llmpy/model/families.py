"""From a config to its family's model and tables."""

from __future__ import annotations

from typing import Any

from ..backend import Ops
from .arena import Tensor
from .config import ModelConfig
from .gpt2 import GPT2
from .language_model import RECOMPUTE, LanguageModel
from .llama import Llama
from .lora import Module, adapter_table, room_table

FAMILIES: dict[str, type[LanguageModel]] = {"gpt2": GPT2, "llama": Llama}


def language_model(
    config: ModelConfig, ops: Ops, *, recompute: int = RECOMPUTE, trainable: bool = True
) -> LanguageModel:
    """Return a model of this shape; see `LanguageModel`."""
    return FAMILIES[config.family](config, ops, recompute, trainable)


def trained_table(config: ModelConfig) -> list[Tensor]:
    """Return the parameters that training updates: the adapters, or all."""
    if config.lora is None:
        return params_table(config)
    return adapter_table(config.lora, modules(config), config.layers)


def adapter_room(config: ModelConfig, rows: int) -> int:
    """Return the elements of the adapters' scratch for this many rows."""
    if config.lora is None:
        return 0
    adapted = [m for m in modules(config) if m.name in config.lora.modules]
    return sum(t.size for t in room_table(config.lora, adapted, rows))


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
