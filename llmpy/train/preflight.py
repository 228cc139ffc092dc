"""Before training: what will run, what it needs, how long it will take; and one refusal that names all that is wrong.

time   = FLOPs a token · tokens / (0.6 · measured peak)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..backend.machine import Machine
from ..data.hellaswag import read_examples
from ..data.pack import is_dataset
from ..data.pipeline import choose_vocab_size
from ..data.shards import is_shard
from ..data.text import Found, find_files
from ..errors import LlmpyError
from ..model.config import GPT2_VOCAB, ModelConfig
from ..model.gpt2 import params_table
from ..options.train import DEFAULT_MODEL, TrainOptions
from ..run.folder import is_ours
from ..run.trackers import package
from ..system.resources import available_memory
from ..system.words import count_of, duration, gigabytes
from .memory import check_disk, check_memory, memory_of
from .start import RunStart

T = TypeVar("T")
MANY_EPOCHS = 20  # twice what the embedded text stands before its validation loss rises (dev/LOG.md)
SHARE_OF_PEAK = 0.6  # of the multiply-add peak that a step is assumed to reach: small models do less well


@dataclass(frozen=True)
class Preflight:
    """What is known of a run before it starts. Bytes, GFLOP/s, seconds."""

    config: ModelConfig
    options: TrainOptions
    machine: Machine
    train_tokens: int
    val_tokens: int
    peak: float
    memory: int
    available: int
    done: int = 0  # steps of a run that goes on, and the seconds they and all else took
    elapsed: float = 0.0

    @property
    def parameters(self) -> int:
        """Number of parameters, padded head included."""
        return sum(t.size for t in params_table(self.config))

    @property
    def step_seconds(self) -> float:
        """Expected time of a step."""
        o = self.options
        flops = self.config.flops_per_token(o.sequence_length) * o.batch_size * o.sequence_length * o.micro_steps
        return flops / (SHARE_OF_PEAK * self.peak * 1e9)

    @property
    def steps(self) -> int:
        """Expected number of steps still to make: by --steps, or by how many fit into the time, whichever is less."""
        o = self.options
        bounds = [] if o.steps is None else [o.steps - self.done]
        if o.seconds is not None:
            bounds.append(int((o.seconds - self.elapsed) / self.step_seconds))
        return max(0 if self.done else 1, min(bounds))

    def lines(self) -> list[str]:
        """What the user reads."""
        o, m = self.options, self.machine
        tokens = o.batch_tokens * o.micro_steps
        epochs = (self.done + self.steps) * tokens / self.train_tokens
        after = f" after the {self.done:,} that {'is' if self.done == 1 else 'are'} made" if self.done else ""
        compiling = "" if m.compiled() else ", with what compiling the kernels takes"
        gathered = f" on each of {o.ranks} ranks" if o.ranks > 1 else ""
        gathered += f", {o.micro_steps} of them a step" if o.micro_steps > 1 else ""
        lines = [
            f"model    {o.model}: {self.config}: {self.parameters:,} parameters",
            f"data     {self.train_tokens:,} tokens to train on, {self.val_tokens:,} to validate; "
            f"batches of {o.batch_size} x {o.sequence_length}{gathered}",
            f"machine  {count_of(m.threads, 'thread')}, {m.isa}, {m.dtype}, measured peak {self.peak:,.0f} GFLOP/s",
            f"memory   about {gigabytes(self.memory)} of {gigabytes(self.available)} available{compiling}",
            f"time     about {duration(self.steps * self.step_seconds)}: {count_of(self.steps, 'step')} of "
            f"{1e3 * self.step_seconds:,.0f} ms{after}, {epochs:.1f} epochs; {self._ending()}",
        ]
        if tokens > self.train_tokens:
            lines.append(
                f"caution  a step reads {tokens:,} tokens, more than there are: {tokens / self.train_tokens:,.1f} "
                "epochs; a smaller --total-batch, or more text, serves better"
            )
        if epochs > MANY_EPOCHS:
            lines.append(
                f"caution  {epochs:.0f} epochs: the model will learn this text by heart and its validation loss will "
                "rise; more text, or fewer --steps or --minutes, serve better"
            )
        return lines

    def _ending(self) -> str:
        o = self.options
        bounds = [] if o.steps is None else [count_of(o.steps, "step")]
        if o.seconds is not None:
            bounds.append(f"{o.seconds / 60:g} minute{'s' * (o.seconds != 60)}")
        return "stops at " + " or ".join(bounds) + ("" if len(bounds) < 2 else ", whichever comes first")


class Problems:
    """Collects what is wrong, so that all of it is reported together."""

    def __init__(self, *known: LlmpyError) -> None:
        self.found = list(known)

    def attempt(self, check: Callable[..., T], *arguments: Any) -> T | None:
        """Return what the check returns; None, and its error is kept, if it raises one."""
        try:
            return check(*arguments)
        except LlmpyError as error:
            self.found.append(error)
            return None

    def report(self) -> None:
        """Raise the one error, or one that lists all of them; nothing if there are none."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            listed = "; ".join(f"({n}) {error}" for n, error in enumerate(self.found, 1))
            raise LlmpyError("train.x", f"{len(self.found)} problems: {listed}")


def check(start: RunStart, folder: Path, machine: Machine, local_size: int = 1, *known: LlmpyError) -> None:
    """Check all that can be known before anything is downloaded, compiled or read: in milliseconds.

    `local_size` ranks are on this machine. Raises one LlmpyError for everything found, and for what was `known`.
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
    for path in o.data or ():
        if not is_dataset(path):
            files += problems.attempt(find_files, [path], is_ours) or []
    for file in files:
        problems.attempt(_check_readable, file.path)
    if config is not None and not problems.found:  # else their sizes are not known
        config = start.config or ModelConfig.from_dial(o.model, vocab_size=_vocab_size(files, o))
        problems.attempt(check_memory, o, config, machine, available_memory() // local_size)
    if config is not None:
        problems.attempt(check_disk, o, config, folder)
    problems.report()


def _check_readable(path: Path) -> None:
    if not os.access(path, os.R_OK):
        raise LlmpyError("train.x", f"cannot read {path}: Permission denied", "Check its permissions")


def _vocab_size(files: Sequence[Found], options: TrainOptions) -> int:
    """Return the vocabulary that the data will have, by the sizes of the files."""
    tokens = any(is_shard(f.path) for f in files) or any(map(is_dataset, options.data or ()))
    size = GPT2_VOCAB if tokens else choose_vocab_size(sum(f.path.stat().st_size for f in files))
    return options.vocab_size or size


def check_length(T: int, context: int) -> None:
    """Raise LlmpyError for a row longer than the model's context."""
    if context < T:
        raise LlmpyError(
            "train.x", f"-T {T} is longer than the model's context of {context}", f"Use -T {context} or less"
        )


def inspect(
    start: RunStart, config: ModelConfig, options: TrainOptions, machine: Machine, tokens: tuple[int, int]
) -> Preflight:
    """Measure the machine and compute the needs of a run. `tokens`: to train on and to validate."""
    peak, memory = machine.measure_peak(), memory_of(options, config, machine)
    return Preflight(config, options, machine, *tokens, peak, memory, available_memory(), start.done, start.elapsed)
