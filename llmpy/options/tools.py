"""Options of `llmpy plan`, `doctor`, `selftest`, `convert` and `completion`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from .fields import NOT_NEGATIVE, POSITIVE, Options, Reported, option, options_of, refusal
from .train import RECOMPUTE, TrainOptions
from .yaml_files import RECIPE_NAMES, read_recipe

SHELLS = ("bash", "zsh", "fish", "tcsh")


# fmt: off
@dataclass(frozen=True)
class PlanOptions(Reported):
    """`llmpy plan`."""

    model: str = option("gpt2", "size, as in train")
    batch_size: int = option(4, "rows of a batch of one machine", "-B", within=POSITIVE)
    sequence_length: int = option(1024, "tokens of a row; train takes 128 unless told", "-T", within=POSITIVE)
    total_batch: int | None = option(
        None, "tokens of an update (default: a batch of each machine)", metavar="TOKENS", within=POSITIVE
    )
    tokens: int | None = option(None, "also estimate for this many training tokens", metavar="TOKENS", within=POSITIVE)
    vocab_size: int | None = option(
        None, "tokens of the vocabulary (default: GPT-2's 50257; train makes 512 to 8192 of your text)", within=POSITIVE
    )
    recompute: int = option(1, "activations recomputed in backward, as in train", within=RECOMPUTE)
    checkpoint_every: int = option(250, "steps between checkpoints, 0: only at the end", within=NOT_NEGATIVE)
    keep: int = option(2, "newest checkpoints to keep, 0: all", within=NOT_NEGATIVE)
    nodes: int = option(1, "machines like this one: data parallel, ZeRO-1", within=POSITIVE)
    bandwidth: float | None = option(None, "of the network: Gbit/s of each machine, each way", within=POSITIVE)
    latency: float = option(50.0, "of the network: microseconds of a message", within=NOT_NEGATIVE)
    recipe: str | None = option(None, "options of a script of llm.c; others given win", choices=RECIPE_NAMES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nodes > 1 and self.bandwidth is None:
            raise refusal("nodes", self.nodes, "give the network too: --bandwidth GBIT")

    @classmethod
    def gather(cls, given: Mapping[str, Any]) -> Self:
        """Return the options of a command line, and what it leaves open from --recipe."""
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
        None, "format of OUT: llmc, llmc-run (a folder that llm.c resumes: moments and place in the data too), hf (a "
        "folder), native (a run folder) or gguf (default: by its name: .bin, .gguf, .safetensors; hf without a suffix)",
        choices=("llmc", "llmc-run", "hf", "native", "gguf"),
    )
    dtype: str | None = option(
        None, "of the numbers in OUT (default: as in IN if possible)", choices=("float32", "bfloat16", "float16")
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
    debug_state: Path | None = option(None, "llm.c's results for that model: gpt2_124M_debug_state.bin", metavar="FILE")
    threads: int | None = option(None, "threads (default: one a core)", within=POSITIVE)
# fmt: on
