"""Options of `llmpy plan`, `doctor`, `selftest`, `convert` and `completion`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from .fields import Reported, below, known, not_negative, option, options_of, positive, refusal
from .recipes import RECIPES

MODEL_FORMATS = ("llmc", "llmc-run", "hf", "native", "gguf")
FILE_DTYPES = ("float32", "bfloat16", "float16")
SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class PlanOptions(Reported):
    """`llmpy plan`."""

    model: str = option("gpt2", "size, as in train", "-e")
    batch_size: int = option(4, "rows of a batch of one machine", "-B", "-b")
    sequence_length: int = option(1024, "tokens of a row; train takes 128 unless told", "-T", "-t")
    total_batch: int | None = option(
        None, "tokens of an update, gathered over batches and machines (default: a batch of each)", "-d",
        metavar="TOKENS",
    )  # fmt: skip
    tokens: int | None = option(None, "tokens to train on, beside what others recommend", metavar="TOKENS")
    vocab_size: int | None = option(
        None, "tokens of the vocabulary (default: GPT-2's 50257; of your own text train makes one of 512 to 8192, and "
        "says so)",
    )  # fmt: skip
    recompute: int = option(1, "activations computed again in backward, as in train", "-r")
    recompute_layers: int | None = option(None, "of so many layers, the last ones; by default of all")
    checkpoint_every: int = option(250, "steps between checkpoints, 0: only at the end", "-n")
    keep: int = option(2, "newest checkpoints to keep, 0: all", "-nk")
    keep_every: int = option(0, "never remove checkpoints of steps that this divides, 0: none", "-nm")
    nodes: int = option(1, "machines like this one: data parallel, moments divided among them (ZeRO-1)")
    bandwidth: float | None = option(None, "of the network: Gbit/s of each machine, in and out at once")
    latency: float = option(50.0, "of the network: microseconds of a message")
    price_per_hour: float | None = option(None, "of one machine, in any currency")
    peak: float | None = option(None, "of a machine other than this one: GFLOP/s of multiply-adds")
    memory_bandwidth: float | None = option(None, "of that machine: GB/s of a stream")
    memory: float | None = option(None, "of that machine: GB (default: what is free here)")
    recipe: str | None = option(None, "options of a script of llm.c; others given win", choices=tuple(RECIPES))

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "batch_size", "sequence_length", "total_batch", "tokens", "vocab_size", "nodes", "bandwidth")
        positive(self, "price_per_hour", "peak", "memory_bandwidth", "memory")
        not_negative(self, "latency", "checkpoint_every", "keep", "keep_every", "recompute", "recompute_layers")
        below(self, "nodes", 1 << 20)
        below(self, "tokens", 1 << 62)
        if self.recompute > 2:
            raise refusal("recompute", self.recompute, "use 0, 1 or 2")
        if self.nodes > 1 and self.bandwidth is None:
            raise refusal("nodes", self.nodes, "tell the network too: --bandwidth GBIT")

    @classmethod
    def gather(cls, given: Mapping[str, Any]) -> Self:
        """The options of a command line, and what it leaves open from --recipe."""
        names = {f.name for f in options_of(cls)}
        recipe = RECIPES.get(given.get("recipe", ""), {})
        return cls(**{name: value for name, value in recipe.items() if name in names} | dict(given))


@dataclass(frozen=True)
class ConvertOptions:
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

    def __post_init__(self) -> None:
        for name, choices in (("to", MODEL_FORMATS), ("dtype", FILE_DTYPES)):
            if getattr(self, name) is not None:
                known(self, name, choices)


@dataclass(frozen=True)
class DoctorOptions(Reported):
    """`llmpy doctor`."""

    network: bool = option(True, "ask the hub whether it answers")


@dataclass(frozen=True)
class CompletionOptions:
    """`llmpy completion SHELL`."""

    shell: str = option("", ", ".join(SHELLS), choices=SHELLS, word=True)

    def __post_init__(self) -> None:
        known(self, "shell", SHELLS)


@dataclass(frozen=True)
class SelftestOptions:
    """`llmpy selftest`."""

    model: Path | None = option(
        None, "check with this model, e.g. llm.c's gpt2_124M.bin (default: one of its own)", metavar="FILE"
    )
    debug_state: Path | None = option(
        None, "what llm.c says of that model: its gpt2_124M_debug_state.bin", metavar="FILE"
    )
    threads: int | None = option(None, "threads (default: one a core)")

    def __post_init__(self) -> None:
        positive(self, "threads")
