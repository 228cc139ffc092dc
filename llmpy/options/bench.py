"""Options of `llmpy bench step|ops|decode|peers`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .fields import POSITIVE, Generating, Options, Reported, option, refusal

SHAPE_TEXT = "model size, as in llmpy train, or a model's folder or hub name, of which only config.json is read"
VOCAB_TEXT = "vocabulary of a model size (default: 50257 as in GPT-2)"
LORA_TEXT = "with adapters of rank R on all linear layers, as in llmpy train"

OPS = (
    "linear_forward", "linear_backward", "attention_forward", "attention_backward", "classifier", "layernorm_forward",
    "residual_layernorm_forward", "layernorm_backward", "rmsnorm_forward", "residual_rmsnorm_forward",
    "rmsnorm_backward", "head_rmsnorm_forward", "head_rmsnorm_backward", "rope", "activation_forward",
    "activation_backward", "add_columns", "take_columns", "embedding_forward", "embedding_backward", "adamw",
    "global_norm", "digest", "narrow", "zero", "pack", "packed_linear_forward", "cache_fill", "attention_decode",
)  # fmt: skip


@dataclass(frozen=True)
class DecodeOptions(Generating, Reported):
    """`llmpy bench decode`."""

    model: str = option("gpt2", SHAPE_TEXT)
    batch_size: int = option(1, "texts decoded in parallel", "-B", within=POSITIVE)
    prompt_tokens: int = option(32, "prompt length in tokens", within=POSITIVE)
    tokens: int = option(64, "tokens to decode", within=POSITIVE)
    prefill: int = option(512, "tokens of the prefill", within=POSITIVE)
    vocab_size: int | None = option(None, VOCAB_TEXT, within=POSITIVE)


@dataclass(frozen=True)
class Step(Options):
    """The model and the batch of a timed step."""

    model: str = option("gpt2", "model size, as in llmpy train")
    batch_size: int = option(4, "sequences per batch", "-B", within=POSITIVE)
    sequence_length: int = option(64, "tokens per sequence", "-T", within=POSITIVE)
    vocab_size: int | None = option(None, VOCAB_TEXT, within=POSITIVE)


@dataclass(frozen=True)
class BenchOptions(Step, Reported):
    """`llmpy bench step`."""

    model: str = option("gpt2", SHAPE_TEXT)
    steps: int = option(10, "steps to time", within=POSITIVE)
    lora: int | None = option(None, LORA_TEXT, metavar="R", within=POSITIVE)


@dataclass(frozen=True)
class OpsOptions(Reported):
    """`llmpy bench ops`."""

    op: str | None = option(None, "operation, e.g. linear_forward (default: all)", metavar="NAME", choices=OPS)


# fmt: off
@dataclass(frozen=True)
class PeersOptions(Step):
    """`llmpy bench peers`."""

    decoding: bool = option(
        False, "decode with -B texts, after prompts of -T tokens, instead of training; a step is a token of each"
    )
    steps: int = option(5, "steps per program and round", within=POSITIVE)
    rounds: int = option(3, "runs per program, interleaved with the others", within=POSITIVE)
    threads: int | None = option(None, "CPU threads of each program (default: one per core)", within=POSITIVE)
    peer: tuple[str, ...] | None = option(
        None, "also time programs that print lines as llm.c does: 'step N: train loss X (took Y ms)'; a command "
        "can use $B, $T, $STEPS and $THREADS", metavar="NAME=COMMAND",
    )
    without: tuple[str, ...] | None = option(None, "skip programs with such a word in their name", metavar="WORD")
    torch_python: Path | None = option(None, "Python interpreter with PyTorch (default: this one)", metavar="FILE")
    llama_python: Path | None = option(
        None, "Python interpreter with llama-cpp-python, for --decoding (default: this one)", metavar="FILE"
    )
    json: Path | None = option(None, "write all measurements to this file", metavar="FILE")

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.peer or ():
            name, _, command = text.partition("=")
            if not (name.strip() and command.strip()):
                raise refusal("peer", repr(text), "Use --peer 'name=command'")
# fmt: on
