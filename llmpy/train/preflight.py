"""Before training: a summary of the run and its needs, and one error that lists all problems.

time = FLOPs per token · tokens / (share · measured peak)
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..backend.machine import Machine
from ..data.dataset_folder import is_dataset
from ..data.hellaswag import read_examples
from ..data.pipeline import choose_vocab_size
from ..data.shards import is_shard
from ..data.text import Found, find_files
from ..errors import LlmpyError, unreadable
from ..model.config import GPT2_VOCAB, ModelConfig
from ..model.families import flops_per_token, params_table, trained_table
from ..options.train import DEFAULT_MODEL, TrainOptions
from ..run.folder import is_ours
from ..run.trackers import package
from ..system.resources import available_memory
from ..system.words import count_of, duration, gigabytes
from .memory import check_disk, check_memory, memory_of
from .start import RunStart

T = TypeVar("T")
MANY_EPOCHS = 20  # the validation loss of the built-in text rises after half of that (dev/LOG.md)
# Assumed for a step, of the multiply-add peak. Small models reach less; with AMX memory limits all.
SHARE_OF_PEAK, SHARE_OF_AMX = 0.6, 0.08


@dataclass(frozen=True)
class Preflight:
    """A run before it starts. Bytes, GFLOP/s, seconds."""

    config: ModelConfig
    options: TrainOptions
    machine: Machine
    train_tokens: int
    val_tokens: int
    peak: float
    memory: int
    available: int
    done: int = 0  # completed steps of a resumed run, and its seconds so far
    elapsed: float = 0.0

    @property
    def parameters(self) -> int:
        """Number of parameters, padded head included."""
        return sum(t.size for t in params_table(self.config))

    @property
    def adapters(self) -> str:
        """Describe the adapters, if the run trains those alone."""
        lora = self.config.lora
        if lora is None:
            return ""
        trained = sum(t.size for t in trained_table(self.config))
        return f"; trained: {trained:,} of adapters of rank {lora.rank}"

    @property
    def step_seconds(self) -> float:
        """Expected time of a step."""
        o = self.options
        flops = flops_per_token(self.config, o.sequence_length) * o.batch_size * o.sequence_length * o.micro_steps
        amx = self.machine.isa == "amx" and self.machine.dtype != self.machine.wide
        return flops / ((SHARE_OF_AMX if amx else SHARE_OF_PEAK) * self.peak * 1e9)

    @property
    def steps(self) -> int:
        """Expected number of remaining steps, bounded by --steps and by the time."""
        o = self.options
        bounds = [] if o.steps is None else [o.steps - self.done]
        if o.seconds is not None:
            bounds.append(int((o.seconds - self.elapsed) / self.step_seconds))
        return max(0 if self.done else 1, min(bounds))

    def lines(self) -> list[str]:
        """Return the summary, a fact per line of at most 80 columns."""
        o, m = self.options, self.machine
        tokens = o.batch_tokens * o.micro_steps
        epochs = (self.done + self.steps) * tokens / self.train_tokens
        after = f" after the first {self.done:,}" if self.done else ""
        compiling = "" if m.compiled(self.config.kinds) else " (with compilation)"
        gathered = f", {o.micro_steps} micro-batches per step" if o.micro_steps > 1 else ""
        gathered += f", {o.ranks} ranks" if o.ranks > 1 else ""
        bounds = [] if o.steps is None else [count_of(o.steps, "step")]
        if o.seconds is not None:
            bounds.append(f"{o.seconds / 60:g} minute{'s' * (o.seconds != 60)}")
        lines = [
            f"model    {o.model}: {self.parameters:,} parameters{self.adapters}",
            f"         {self.config}",
            f"data     {self.train_tokens:,} training tokens, {self.val_tokens:,} validation tokens",
            f"batch    {o.batch_size} x {o.sequence_length}{gathered}: {tokens:,} tokens per step",
            f"machine  {count_of(m.threads, 'thread')}, {m.isa}, {m.dtype}, measured peak {self.peak:,.0f} GFLOP/s",
            f"memory   about {gigabytes(self.memory)} of {gigabytes(self.available)} available{compiling}",
            f"time     about {duration(self.steps * self.step_seconds)}: {count_of(self.steps, 'step')} of "
            f"{1e3 * self.step_seconds:,.0f} ms{after}, {epochs:.1f} epochs",
            "stop     after " + " or ".join(bounds) + (", whichever comes first" if len(bounds) > 1 else ""),
        ]
        if o.verify_every and self.steps >= o.verify_every:
            share = 100 / o.verify_every
            lines.append(f"verify   one step in {o.verify_every:,} is computed twice: about {share:.3g} % of the time")
        if tokens > self.train_tokens:
            lines.append(f"caution  a step reads {tokens / self.train_tokens:,.1f} epochs")
            lines.append("         Use a smaller --total-batch or more text")
        if epochs > MANY_EPOCHS:
            lines.append(f"caution  {epochs:,.0f} epochs overfit this text: its validation loss will rise")
            lines.append("         Use more text, or fewer --steps or --minutes")
        return lines


class Problems:
    """Collects errors to report them together."""

    def __init__(self, *known: LlmpyError) -> None:
        self.found = list(known)

    def attempt(self, check: Callable[..., T], *arguments: Any) -> T | None:
        """Return the result of `check`; None, keeping its LlmpyError, if it raises one."""
        try:
            return check(*arguments)
        except LlmpyError as error:
            self.found.append(error)
            return None

    def report(self) -> None:
        """Raise the only error, or one that lists all, each with its code."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            listed = "; ".join(f"({n}) {error} [{error.code}]" for n, error in enumerate(self.found, 1))
            raise LlmpyError("run.refused", f"{len(self.found)} problems: {listed}")


def check(start: RunStart, folder: Path, machine: Machine, local_size: int = 1, *known: LlmpyError) -> None:
    """Check everything that needs no download, compilation or data, in milliseconds.

    `local_size`: ranks on this machine. Raises one LlmpyError for all problems, including `known` ones.
    """
    o, problems = start.options, Problems(*known, *start.errors)
    config = start.config or (None if o.init else problems.attempt(ModelConfig.from_dial, o.model or DEFAULT_MODEL))
    if config is not None:
        problems.attempt(check_length, o.sequence_length, config.context)
    problems.attempt(lambda: o.micro_steps)
    for name in o.track or ():
        problems.attempt(package, name)
    if o.hellaswag is not None:
        problems.attempt(read_examples, o.hellaswag, 1 << 16)
    files: list[Found] = []
    for path in (*(o.data or ()), *(o.val or ())):
        if not is_dataset(path):
            files += problems.attempt(find_files, [path], is_ours) or []
    files = [file for file in files if file.path.is_file()]  # the others are refused when the data are read
    for file in files:
        problems.attempt(_check_readable, file.path)
    if config is not None and not problems.found:  # otherwise the sizes are unknown
        config = start.config or ModelConfig.from_dial(o.model, vocab_size=_vocab_size(files, o))
        problems.attempt(check_memory, o, config, machine, available_memory() // local_size)
    if config is not None:
        problems.attempt(check_disk, o, config, folder)
    problems.report()


def _check_readable(path: Path) -> None:
    if not os.access(path, os.R_OK):
        raise unreadable(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def _vocab_size(files: Sequence[Found], options: TrainOptions) -> int:
    """Return the vocabulary size that the data will have, from the file sizes."""
    tokens = any(is_shard(f.path) for f in files) or any(map(is_dataset, options.data or ()))
    size = GPT2_VOCAB if tokens else choose_vocab_size(sum(f.path.stat().st_size for f in files))
    return options.vocab_size or size


def check_length(T: int, context: int) -> None:
    """Raise LlmpyError if T is longer than the model's context."""
    if context < T:
        what = f"-T {T} is longer than the model's context of {context}"
        raise LlmpyError("model.context-exceeded", what, f"Use -T {context} or less")


def inspect(
    start: RunStart, config: ModelConfig, options: TrainOptions, machine: Machine, tokens: tuple[int, int]
) -> Preflight:
    """Measure the peak and estimate the needs of a run. `tokens`: of training and validation."""
    peak, memory = machine.measure_peak(), memory_of(options, config, machine)
    return Preflight(config, options, machine, *tokens, peak, memory, available_memory(), start.done, start.elapsed)
