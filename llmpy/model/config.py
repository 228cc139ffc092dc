"""The shape of a model, set by one dial (`d12`). Training options are in `options/`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from ..errors import LlmpyError
from ..system.words import count_of, did_you_mean
from .lora import LoraConfig

GPT2_VOCAB = 50257

# depth → channels, heads; llm.c's ladder. `_rung` interpolates other depths.
LADDER = {
    6: (384, 6), 12: (768, 12), 24: (1024, 16), 36: (1280, 20), 48: (1600, 25),
    60: (1920, 30), 72: (2880, 30), 84: (3456, 36),
}  # fmt: skip
NAMES = {"gpt2": 12, "gpt2-medium": 24, "gpt2-large": 36, "gpt2-xl": 48}
# GPT-3's sizes: channels → layers, heads. llm.c also lists c5140, which its own check rejects.
GPT3 = {
    384: (6, 6), 768: (12, 12), 1024: (24, 16), 1536: (24, 16), 2048: (24, 16),
    2560: (32, 32), 4096: (32, 32), 12288: (96, 96),
}  # fmt: skip
PAD_VOCAB_TO = 128  # llm.c's padding of the head


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a GPT-2: L layers, NH heads, C channels, T context, V vocabulary."""

    family: ClassVar[str] = "gpt2"
    layers: int
    heads: int
    channels: int
    context: int = 1024
    vocab_size: int = GPT2_VOCAB
    lora: LoraConfig | None = field(default=None, kw_only=True)  # adapters: the parameters are frozen

    def __post_init__(self) -> None:
        _check_positive(self, "layers", "heads", "channels", "context", "vocab_size")
        if self.channels % self.heads:
            what = f"model: {self.channels} channels do not divide into {self.heads} heads"
            raise LlmpyError("model.invalid-shape", what, "Use a multiple of heads for channels")

    def __str__(self) -> str:
        return (
            f"{count_of(self.layers, 'layer')}, {count_of(self.heads, 'head')}, {self.channels} channels, "
            f"context {self.context}, vocabulary {self.vocab_size:,}"
        )

    @property
    def head_size(self) -> int:
        """Channels of one attention head (HS)."""
        return self.channels // self.heads

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of kernels that the model needs, for `Machine.warm_up`."""
        return (self.family,) if self.lora is None else (self.family, "lora")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values (NKV)."""
        return self.heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of wte (Vp): the vocabulary rounded up to a multiple of 128, as llm.c pads it."""
        return math.ceil(self.vocab_size / PAD_VOCAB_TO) * PAD_VOCAB_TO

    @property
    def matrix_parameters(self) -> int:
        """Parameters multiplied for every token: the layers' matrices and the head."""
        return 12 * self.layers * self.channels**2 + self.padded_vocab_size * self.channels

    def rope_elements(self, length: int) -> int:
        """Return the elements of tables for positions below `length` that are no parameters: cos and sin of RoPE."""
        return 0

    def record(self) -> dict[str, Any]:
        """Return the fields for a JSON file; `from_record` is the inverse."""
        fields = {"family": self.family} if self.family != ModelConfig.family else {}
        return fields | {name: x for name, x in asdict(self).items() if name != "lora" or x is not None}

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> ModelConfig:
        """Return the config of a `record`. Raises LlmpyError, or TypeError for other fields."""
        about = {name: value for name, value in record.items() if name != "family"}
        if about.get("lora") is not None:
            about["lora"] = LoraConfig.from_record(about["lora"])
        if about.get("rope_scaling") is not None:
            about["rope_scaling"] = RopeScaling(**about["rope_scaling"])
        return (LlamaConfig if record.get("family") == LlamaConfig.family else ModelConfig)(**about)

    @classmethod
    def from_dial(cls, dial: str, vocab_size: int | None = None, context: int | None = None) -> ModelConfig:
        """Return the config of `d1` … `d84`, `gpt2` … `gpt2-xl`, `gpt2:d12`, `gpt3:c768`, `llama:d1` … `llama:d84`.

        `vocab_size` and `context` default to the family's (50257; 1024, or 2048 for gpt3 and llama).
        Raises LlmpyError for any other name.
        """
        text = dial.strip().lower()
        if text in NAMES:
            config = cls._of_depth(NAMES[text])
        elif match := re.fullmatch(r"(?:gpt2:)?d(\d+)", text):
            config = cls._of_depth(int(match[1]))
        elif (match := re.fullmatch(r"gpt3:c(\d+)", text)) and int(match[1]) in GPT3:
            channels = int(match[1])
            layers, heads = GPT3[channels]
            config = cls(layers, heads, channels, context=2048)
        elif match := re.fullmatch(r"llama:d(\d+)", text):
            config = LlamaConfig.like(cls._of_depth(int(match[1])))
        else:
            raise _unknown(dial)
        if vocab_size is not None:
            config = replace(config, vocab_size=vocab_size)
        return config if context is None else replace(config, context=context)

    @classmethod
    def _of_depth(cls, depth: int) -> ModelConfig:
        if depth < 1 or depth > max(LADDER):
            raise _unknown(f"d{depth}")
        channels, heads = LADDER.get(depth) or _rung(depth)
        return cls(depth, heads, channels)


@dataclass(frozen=True)
class RopeScaling:
    """RoPE wavelengths stretched as in Llama 3: by `factor` above original/low, not at all below original/high."""

    factor: float
    low: float  # low_freq_factor
    high: float  # high_freq_factor
    original: int  # original_max_position_embeddings

    def __post_init__(self) -> None:
        if not (self.factor > 0 and 0 < self.low < self.high and self.original > 0):
            raise LlmpyError("model.invalid-shape", f"model: {self} is invalid", "Use factor > 0 and 0 < low < high")


@dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    """The shape of a Llama, Qwen2 (`qkv_bias`) or Qwen3 (`qk_norm`); FFN is the width of the MLP."""

    family: ClassVar[str] = "llama"
    kv_heads: int = 0  # NKV; 0: as many as heads
    head_size: int = 0  # HS; 0: channels / heads
    ffn: int = 0  # 0: 8/3 of the channels, rounded to 64
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied: bool = True  # the head is the token embedding
    qkv_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for name, value in (
            ("kv_heads", self.heads),
            ("head_size", self.channels // max(1, self.heads)),
            ("ffn", max(64, round(self.channels * 8 / 3 / 64) * 64)),
        ):
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)
        numbers = "layers", "heads", "channels", "context", "vocab_size", "kv_heads", "head_size", "ffn"
        _check_positive(self, *numbers)
        if self.heads % self.kv_heads:
            what = f"model: {self.heads} heads do not divide into {self.kv_heads} key/value heads"
            raise LlmpyError("model.invalid-shape", what, "Use a multiple of kv_heads for heads")
        if self.head_size % 2 or not (self.rope_theta > 0 and self.norm_eps > 0):
            what = f"model: head_size {self.head_size}, rope_theta {self.rope_theta}, norm_eps {self.norm_eps}"
            raise LlmpyError("model.invalid-shape", what, "Use an even head_size, and positive numbers")

    @classmethod
    def like(cls, gpt2: ModelConfig) -> LlamaConfig:
        """Return a Llama with the layers, heads and channels of a GPT-2, and about as many parameters per layer."""
        return cls(gpt2.layers, gpt2.heads, gpt2.channels, 2048, gpt2.vocab_size)

    def __str__(self) -> str:
        kind = "Qwen3" if self.qk_norm else "Qwen2" if self.qkv_bias else "Llama"
        groups = f" ({self.kv_heads} for keys and values)" * (self.kv_heads != self.heads)
        return (
            f"{kind}, {count_of(self.layers, 'layer')}, {count_of(self.heads, 'head')}{groups} of {self.head_size}, "
            f"{self.channels} channels, FFN {self.ffn}, context {self.context}, vocabulary {self.vocab_size:,}"
        )

    @property
    def qkv_size(self) -> int:
        """Columns of queries, keys and values, (NH + 2·NKV)·HS."""
        return (self.heads + 2 * self.kv_heads) * self.head_size

    def rope_elements(self, length: int) -> int:
        """Return the elements of cos and sin, (length, HS/2) each."""
        return length * self.head_size

    @property
    def matrix_parameters(self) -> int:
        """As in GPT-2."""
        layer = self.qkv_size + self.heads * self.head_size + 3 * self.ffn
        return self.channels * (self.layers * layer + self.padded_vocab_size)


def _check_positive(config: ModelConfig, *names: str) -> None:
    """Raise LlmpyError unless these fields are positive integers."""
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise LlmpyError("model.invalid-shape", f"model: {name} is {value!r}", "Use a positive integer")


def _rung(depth: int) -> tuple[int, int]:
    """Return channels and heads of a depth that is not in the ladder.

    Up to d12 each layer adds a head of 64 channels, as in d6 and d12. Above, channels are interpolated between the
    neighbouring rungs and rounded to whole heads of 64.
    """
    if depth <= 12:
        return 64 * depth, depth
    below = max(d for d in LADDER if d < depth)
    above = min(d for d in LADDER if d > depth)
    share = (depth - below) / (above - below)
    heads = round((LADDER[below][0] + share * (LADDER[above][0] - LADDER[below][0])) / 64)
    return 64 * heads, heads


def _unknown(dial: str) -> LlmpyError:
    known = [*NAMES, *(f"gpt3:c{c}" for c in GPT3)]  # depths are left out: no number is a better guess
    small = dial.strip().lower().replace("_", "-") in ("gpt2-small", "gpt2-base", "gpt-2", "gpt2-124m")
    close = "Did you mean gpt2?" if small else did_you_mean(dial, known)
    hint = f"{close} Use d1 … d{max(LADDER)}, {', '.join(NAMES)}, or gpt3:c768 (c384 … c12288), llama:d6".lstrip()
    return LlmpyError("model.unknown", f"unknown model {dial!r}", hint)
