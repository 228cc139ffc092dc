"""Options of `llmpy plan`, `doctor`, `selftest`, `convert` and `completion`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from .fields import NOT_NEGATIVE, POSITIVE, Options, Range, Reported, option, options_of, refusal
from .train import RECOMPUTE, TrainOptions
from .yaml_files import RECIPE_NAMES, read_recipe

MODEL_FORMATS = ("llmc", "llmc-run", "hf", "native", "gguf")
FILE_DTYPES = ("float32", "bfloat16", "float16")
SHELLS = ("bash", "zsh", "fish", "tcsh")


@dataclass(frozen=True)
class PlanOptions(Reported):
    """`llmpy plan`."""

    model: str = option("gpt2", "size, as in train")
    batch_size: int = option(4, "rows of a batch of one machine", "-B", within=POSITIVE)
    sequence_length: int = option(1024, "tokens of a row; train takes 128 unless told", "-T", within=POSITIVE)
    total_batch: int | None = option(
        None, "tokens of an update, gathered over batches and machines (default: a batch of each)",
        metavar="TOKENS", within=POSITIVE,
    )  # fmt: skip
    tokens: int | None = option(
        None, "tokens to train on, beside what others recommend", metavar="TOKENS", within=POSITIVE
    )
    vocab_size: int | None = option(
        None, "tokens of the vocabulary (default: GPT-2's 50257; of your own text train makes one of 512 to 8192, and "
        "says so)", within=POSITIVE,
    )  # fmt: skip
    recompute: int = option(1, "activations computed again in backward, as in train", within=RECOMPUTE)
    checkpoint_every: int = option(250, "steps between checkpoints, 0: only at the end", within=NOT_NEGATIVE)
    keep: int = option(2, "newest checkpoints to keep, 0: all", within=NOT_NEGATIVE)
    nodes: int = option(
        1, "machines like this one: data parallel, moments divided among them (ZeRO-1)",
        within=Range(1, 1 << 20, POSITIVE.text),
    )  # fmt: skip
    bandwidth: float | None = option(
        None, "of the network: Gbit/s of each machine, in and out at once", within=POSITIVE
    )
    latency: float = option(50.0, "of the network: microseconds of a message", within=NOT_NEGATIVE)
    recipe: str | None = option(None, "options of a script of llm.c; others given win", choices=RECIPE_NAMES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nodes > 1 and self.bandwidth is None:
            raise refusal("nodes", self.nodes, "tell the network too: --bandwidth GBIT")

    @classmethod
    def gather(cls, given: Mapping[str, Any]) -> Self:
        """The options of a command line, and what it leaves open from --recipe."""
        names = {f.name for f in options_of(cls)}
        recipe = read_recipe(TrainOptions, given["recipe"]) if "recipe" in given else {}
        return cls(**{name: value for name, value in recipe.items() if name in names} | dict(given))


@dataclass(frozen=True)
class ConvertOptions(Options):
    """`llmpy convert IN OUT`."""

    source: Path = option(
        Path(), "a run folder, an llm.c .bin, a Hugging Face folder, or gpt2 … of the hub", metavar="IN", word=True
    )
    target: Path = option(Path(), "what to write, which must not exist", metavar="OUT", word=True)
    to: str | None = option(
        None,
        "format of OUT: llmc, llmc-run (a folder that llm.c goes on from: moments and place in the data too), hf (a "
        "folder), native (a run folder) or gguf (default: by its name: .bin, .gguf, .safetensors; hf without a suffix)",
        choices=MODEL_FORMATS,
    )
    dtype: str | None = option(
        None, "type of the numbers in OUT (default: as in IN, if the format has it)", choices=FILE_DTYPES
    )


@dataclass(frozen=True)
class DoctorOptions(Reported):
    """`llmpy doctor`."""

    network: bool = option(True, "ask the hub whether it answers")


@dataclass(frozen=True)
class CompletionOptions(Options):
    """`llmpy completion SHELL`."""

    shell: str = option("", ", ".join(SHELLS), choices=SHELLS, word=True)


@dataclass(frozen=True)
class SelftestOptions(Options):
    """`llmpy selftest`."""

    model: Path | None = option(
        None, "check with this model, e.g. llm.c's gpt2_124M.bin (default: one of its own)", metavar="FILE"
    )
    debug_state: Path | None = option(
        None, "what llm.c says of that model: its gpt2_124M_debug_state.bin", metavar="FILE"
    )
    threads: int | None = option(None, "threads (default: one a core)", within=POSITIVE)
