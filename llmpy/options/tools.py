"""Options of `llmpy plan`, `doctor`, `selftest`, `warmup`, `convert` and `completion`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ..errors import LlmpyError
from .bench import LORA_TEXT, SHAPE_TEXT
from .fields import NOT_NEGATIVE, POSITIVE, Options, Reported, option, options_of
from .train import RECIPE_TEXT, RECOMPUTE, TrainOptions
from .yaml_files import RECIPE_NAMES, read_recipe

SHELLS = ("bash", "zsh", "fish", "tcsh")


# fmt: off
@dataclass(frozen=True)
class PlanOptions(Reported):
    """`llmpy plan`."""

    model: str = option("gpt2", SHAPE_TEXT)
    batch_size: int = option(4, "sequences per batch and machine", "-B", within=POSITIVE)
    sequence_length: int | None = option(
        None, "tokens per sequence (default: 1024, or the context; llmpy train: 128)", "-T", within=POSITIVE
    )
    total_batch: int | None = option(
        None, "tokens per step (default: one batch per machine)", metavar="TOKENS", within=POSITIVE
    )
    tokens: int | None = option(None, "also estimate for this many training tokens", metavar="TOKENS", within=POSITIVE)
    vocab_size: int | None = option(
        None, "vocabulary size (default: 50257 as in GPT-2; llmpy train: 512 to 8192 for your text)", within=POSITIVE
    )
    recompute: int = option(1, "recompute activations in backward, as in llmpy train", within=RECOMPUTE)
    checkpoint_every: int = option(250, "steps between checkpoints; 0: only at the end", within=NOT_NEGATIVE)
    keep: int = option(2, "number of newest checkpoints to keep; 0: all", within=NOT_NEGATIVE)
    nodes: int = option(1, "machines like this one, data parallel with ZeRO-1", within=POSITIVE)
    bandwidth: float | None = option(None, "network bandwidth per machine and direction, in Gbit/s", within=POSITIVE)
    latency: float = option(50.0, "network latency per message, in microseconds", within=NOT_NEGATIVE)
    recipe: str | None = option(None, RECIPE_TEXT, metavar="NAME", choices=RECIPE_NAMES)
    lora: int | None = option(None, LORA_TEXT, metavar="R", within=POSITIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nodes > 1 and self.bandwidth is None:
            raise LlmpyError("option.missing", f"--nodes {self.nodes} needs --bandwidth", "Add --bandwidth GBIT")

    @classmethod
    def gather(cls, given: Mapping[str, Any]) -> Self:
        """Return the options of a command line; --recipe sets those not given."""
        names = {f.name for f in options_of(cls)}
        recipe = read_recipe(TrainOptions, given["recipe"]) if "recipe" in given else {}
        return cls(**{name: value for name, value in recipe.items() if name in names} | dict(given))


@dataclass(frozen=True)
class ConvertOptions(Options):
    """`llmpy convert IN OUT`."""

    source: Path = option(
        Path(), "run folder, llm.c .bin, Hugging Face folder, or a hub model: gpt2, OWNER/NAME", metavar="IN", word=True
    )
    target: Path = option(Path(), "output path, which must not exist", metavar="OUT", word=True)
    to: str | None = option(
        None, "format of OUT: llmc, llmc-run (a folder that llm.c can resume, with moments and data position), hf (a "
        "folder, of an adapter one for peft), native (a run folder) or gguf (default: by suffix: .bin, .gguf, "
        ".safetensors; none: hf)",
        choices=("llmc", "llmc-run", "hf", "native", "gguf"),
    )
    dtype: str | None = option(
        None, "data type of the weights (default: that of IN if possible); q8_0, int8 in blocks: only gguf",
        choices=("float32", "bfloat16", "float16", "q8_0"),
    )
    merge: bool = option(False, "merge the adapters of IN into its base model")
    push: str | None = option(None, "also upload OUT, of format hf, to the Hugging Face hub", metavar="USER/NAME")


@dataclass(frozen=True)
class DoctorOptions(Reported):
    """`llmpy doctor`."""

    network: bool = option(True, "check that the Hugging Face hub is reachable")


@dataclass(frozen=True)
class CompletionOptions(Options):
    """`llmpy completion SHELL`."""

    shell: str = option("", "shell of the script", choices=SHELLS, word=True)


@dataclass(frozen=True)
class SelftestOptions(Options):
    """`llmpy selftest`."""

    model: Path | None = option(None, "model to check, e.g. gpt2_124M.bin (default: a built-in one)", metavar="FILE")
    debug_state: Path | None = option(None, "llm.c's results for --model: gpt2_124M_debug_state.bin", metavar="FILE")
    threads: int | None = option(None, "CPU threads (default: one per core)", within=POSITIVE)


@dataclass(frozen=True)
class WarmupOptions(Options):
    """`llmpy warmup`."""


# fmt: on
