"""Before training: what will run, what it needs, how long it will take; and one refusal that names all that is wrong.

time   = FLOPs a token · tokens / (0.6 · measured peak)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..backend.machine import Machine
from ..data.hellaswag import read_examples
from ..data.pack import is_dataset
from ..data.pipeline import choose_vocab_size
from ..data.shards import count_tokens, is_shard
from ..data.text import Found, find_files
from ..errors import LlmpyError
from ..model.config import GPT2_VOCAB, ModelConfig
from ..model.gpt2 import PARAMS
from ..options.options import DEFAULT_MODEL, TrainOptions
from ..run.folder import is_run
from ..run.trackers import package
from ..system.resources import available_memory
from ..system.words import count_of, duration, gigabytes
from .memory import check_disk, check_memory, memory_of

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
        return sum(t.size for t in PARAMS(self.config))

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


def problems(
    options: TrainOptions, folder: Path, machine: Machine, start: ModelConfig | None = None, beside: int = 1
) -> list[LlmpyError]:
    """All that can be known to be wrong before the data are read: in milliseconds, and nothing is compiled.

    `start` is the shape of the model that the run starts from, if it does not start from scratch; `beside` as of
    `check_memory`.
    """
    found: list[LlmpyError] = []
    options = replace(options, model=options.model or DEFAULT_MODEL)

    def attempt(check: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return check(*arguments)
        except LlmpyError as fault:
            found.append(fault)

    config = start or attempt(ModelConfig.from_dial, options.model)
    if config is not None:
        attempt(check_length, options.sequence_length, config.context)
    attempt(lambda: options.micro_steps)
    for name in options.track or ():
        attempt(package, name)
    if options.hellaswag is not None:
        attempt(read_examples, options.hellaswag, 1 << 16)
    files: list[Found] = []
    for path in options.data or ():
        if not is_dataset(path):
            files += attempt(find_files, [path], lambda _: None, is_run) or []
    for file in files:
        attempt(_check_readable, file.path)
    if found or config is None:
        attempt(check_disk, options, config, folder) if config is not None else None
        return found
    tokens, vocab_size = _seen(files, options)
    config = start or ModelConfig.from_dial(options.model, vocab_size=vocab_size)
    least = options.batch_tokens + 1 + (0 if options.overfit else options.sequence_length + 1)
    take = "takes" if options.overfit else "and a row to validate take"
    if tokens is not None and tokens < least:
        found.append(
            LlmpyError(
                f"all data together have {tokens:,} tokens, a batch of -B {options.batch_size} "
                f"-T {options.sequence_length} {take} {least:,}",
                "use a smaller -B or -T, or more text",
            )
        )
    attempt(check_memory, options, config, machine, None, beside, options.ranks)
    attempt(check_disk, options, config, folder)
    return found


def together(faults: Sequence[LlmpyError]) -> LlmpyError:
    """The one fault, or one that tells all of them."""
    if len(faults) == 1:
        return faults[0]
    return LlmpyError(f"{len(faults)} problems: " + "; ".join(f"({n}) {f}" for n, f in enumerate(faults, 1)))


def all_of(*checks: Callable[[], Any]) -> list[Any]:
    """What each returns. Raises LlmpyError, which tells all faults, if any raises one."""
    results, faults = [], []
    for check in checks:
        try:
            results.append(check())
        except LlmpyError as fault:
            faults.append(fault)
    if faults:
        raise together(faults)
    return results


def _check_readable(path: Path) -> None:
    if not os.access(path, os.R_OK):
        raise LlmpyError(f"cannot read {path}: Permission denied", "check its permissions")


def _seen(files: Sequence[Found], options: TrainOptions) -> tuple[int | None, int]:
    """Tokens of the data if they are shards, and the vocabulary, by the sizes of the files."""
    shards = [f.path for f in files if is_shard(f.path)]
    if shards:
        return sum(map(count_tokens, shards)), options.vocab_size or GPT2_VOCAB
    if options.data is not None and any(map(is_dataset, options.data)):
        return None, options.vocab_size or GPT2_VOCAB
    return None, options.vocab_size or choose_vocab_size(sum(f.path.stat().st_size for f in files))


def check_length(T: int, context: int) -> None:
    """Raise LlmpyError for a row longer than the model's context."""
    if context < T:
        raise LlmpyError(f"-T {T} is longer than the model's context of {context}", f"use -T {context} or less")


def inspect(
    config: ModelConfig,
    options: TrainOptions,
    machine: Machine,
    train_tokens: int,
    val_tokens: int,
    done: int = 0,
    elapsed: float = 0.0,
    ranks: int = 1,
) -> Preflight:
    """Measure the machine and compute the needs of a run, or of one that goes on after `done` steps."""
    return Preflight(
        config,
        options,
        machine,
        train_tokens,
        val_tokens,
        machine.measure_peak(),
        memory_of(options, config, machine, ranks),
        available_memory(),
        done,
        elapsed,
    )
