"""Options of `llmpy bench step|ops|decode|peers`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .fields import POSITIVE, Options, Reported, option, refusal

OPS = (
    "linear_forward", "linear_backward", "attention_forward", "attention_backward", "classifier", "layernorm_forward",
    "residual_layernorm_forward", "layernorm_backward", "gelu_forward", "embedding_forward", "embedding_backward",
    "adamw", "global_norm", "narrow", "zero", "pack", "packed_linear_forward", "cache_fill", "attention_decode",
)  # fmt: skip


@dataclass(frozen=True)
class DecodeOptions(Reported):
    """`llmpy bench decode`."""

    model: str = option("gpt2", "size, as in train")
    batch_size: int = option(1, "texts side by side", "-B", within=POSITIVE)
    prompt_tokens: int = option(32, "tokens of each text before decoding starts", within=POSITIVE)
    tokens: int = option(64, "tokens to decode and time", within=POSITIVE)
    prefill: int = option(512, "tokens of a prefill to time against the peak of multiply-adds", within=POSITIVE)


@dataclass(frozen=True)
class Step(Options):
    """What a step is timed on."""

    model: str = option("gpt2", "size, as in train")
    batch_size: int = option(4, "rows of a batch", "-B", within=POSITIVE)
    sequence_length: int = option(64, "tokens of a row", "-T", within=POSITIVE)


@dataclass(frozen=True)
class BenchOptions(Step, Reported):
    """`llmpy bench step`."""

    steps: int = option(10, "steps to time", within=POSITIVE)


@dataclass(frozen=True)
class OpsOptions(Reported):
    """`llmpy bench ops`."""

    op: str | None = option(None, "only this one, e.g. linear_forward (default: all)", metavar="NAME", choices=OPS)


# fmt: off
@dataclass(frozen=True)
class PeersOptions(Step):
    """`llmpy bench peers`."""

    steps: int = option(5, "steps of each program to time in a round", within=POSITIVE)
    rounds: int = option(3, "times that each program runs, interleaved", within=POSITIVE)
    threads: int | None = option(None, "threads of every program (default: one a core)", within=POSITIVE)
    peer: tuple[str, ...] | None = option(
        None, "further programs, each as 'name=command', that print llm.c's line 'step N: train loss X (took Y ms)'; "
        "the command may use $B, $T, $STEPS and $THREADS", metavar="NAME=COMMAND",
    )
    without: tuple[str, ...] | None = option(None, "leave out programs with this in their name", metavar="WORD")
    torch_python: Path | None = option(None, "the Python that has PyTorch (default: this one)", metavar="FILE")
    json: Path | None = option(None, "write everything measured to this file", metavar="FILE")

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.peer or ():
            name, _, command = text.partition("=")
            if not (name.strip() and command.strip()):
                raise refusal("peer", repr(text), "use --peer 'name=command'")
# fmt: on
