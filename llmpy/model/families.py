"""From a config to its family's model and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..backend import Ops
from .arena import Tensor, memory
from .config import ModelConfig
from .gpt2 import GPT2
from .language_model import RECOMPUTE, LanguageModel, kept_table, quantised_table
from .llama import Llama
from .lora import LoraConfig, Module, adapter_table, chosen, room_table

FAMILIES: dict[str, type[LanguageModel]] = {"gpt2": GPT2, "llama": Llama}


def language_model(
    config: ModelConfig, ops: Ops, *, recompute: int = RECOMPUTE, trainable: bool = True
) -> LanguageModel:
    """Return a model of this shape; see `LanguageModel`."""
    return FAMILIES[config.family](config, ops, recompute, trainable)


def model_memory(config: ModelConfig, ops: Ops) -> int:
    """Return the bytes of the parameters of a model for generation, without adapters."""
    table, head = params_table(config), head_of(config)
    packed = quantised_table(table, head, ops) if ops.quantises else []
    kept = kept_table(table, head) if ops.quantises else [replace(t, wide=not t.decay) for t in table]
    return sum(t.size for t in packed) + memory(kept, ops.dtype.itemsize, ops.wide.itemsize)


def trained_table(config: ModelConfig) -> list[Tensor]:
    """Return the parameters that training updates: the adapters, or all."""
    if config.lora is None:
        return params_table(config)
    return adapter_table(config.lora, modules(config), config.layers)


def with_adapters(
    config: ModelConfig, rank: int, alpha: float | None = None, targets: Sequence[str] = (), base: str = "",
    base_hash: str = "",
) -> ModelConfig:  # fmt: skip
    """Return the config with adapters, by default of all linear layers. Raises LlmpyError for unknown targets."""
    names = chosen(modules(config), targets)
    return replace(config, lora=LoraConfig(rank, alpha or 2.0 * rank, names, base, base_hash))


def flops_per_token(config: ModelConfig, length: int) -> int:
    """Return floating-point operations per token of a training step at sequence length T = `length`.

    6 per parameter of a matrix (2 forward, 4 backward), 4 if it is frozen, and 6·L·NH·HS·T for causal attention.
    """
    trained = config.matrix_parameters
    frozen = 0
    if config.lora is not None:
        trained, frozen = sum(t.size for t in trained_table(config)), trained
    return 6 * trained + 4 * frozen + 6 * config.layers * config.heads * config.head_size * length


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
