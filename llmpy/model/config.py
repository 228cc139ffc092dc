"""The shape of a model, set by one dial (`d12`). Training options are in `options/`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from ..errors import LlmpyError
from ..system.words import count_of, did_you_mean

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

    layers: int
    heads: int
    channels: int
    context: int = 1024
    vocab_size: int = GPT2_VOCAB

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "channels", "context", "vocab_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise LlmpyError("model.invalid-shape", f"model: {name} is {value!r}", "Use a positive integer")
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
    def padded_vocab_size(self) -> int:
        """Rows of wte (Vp): the vocabulary rounded up to a multiple of 128, as llm.c pads it."""
        return math.ceil(self.vocab_size / PAD_VOCAB_TO) * PAD_VOCAB_TO

    @property
    def matrix_parameters(self) -> int:
        """Parameters multiplied for every token: the layers' matrices and the head."""
        return 12 * self.layers * self.channels**2 + self.padded_vocab_size * self.channels

    def flops_per_token(self, length: int) -> int:
        """Return floating-point operations per token of a training step at sequence length T = `length`.

        6 per matrix parameter (2 forward, 4 backward) and 6·L·C·T for causal attention.
        """
        return 6 * self.matrix_parameters + 6 * self.layers * self.channels * length

    @classmethod
    def from_dial(cls, dial: str, vocab_size: int | None = None, context: int | None = None) -> ModelConfig:
        """Return the config of `d1` … `d84`, `gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl`, `gpt2:d12`, `gpt3:c768`.

        `vocab_size` and `context` default to the family's (50257; 1024, or 2048 for gpt3).
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
    hint = f"{close} Use d1 … d{max(LADDER)}, {', '.join(NAMES)}, or gpt3:c768 (c384 … c12288)".lstrip()
    return LlmpyError("model.unknown", f"unknown model {dial!r}", hint)
