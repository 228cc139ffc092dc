"""Before training: what will run, what it needs, how long it will take; and a refusal if it cannot fit.

memory = wide · 4 · parameters: they, their gradients, m and v
         + activations of training (without what backward computes again), backward's scratch, and activations
           and cache of sampling: each tensor wide or stored, as its table says
         + stored · (the matrices once more, in mixed precision, + the chunk of logits)
         + the program itself
         with the bytes of an element: wide 4; stored 4 too, or 2 in mixed precision
time   = FLOPs a token · tokens / (0.6 · measured peak)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import psutil

from .arena import Tensor
from .backend import Ops
from .config import ModelConfig
from .decode import CACHE, PREFILL
from .errors import LlmpyError
from .gpt2 import ACTS, PARAMS, RECOMPUTE, SCRATCH
from .options import TrainOptions

MANY_EPOCHS = 20  # twice what the embedded text stands before its validation loss rises (dev/LOG.md)
PROGRAM_BYTES = 350 << 20  # Python, NumPy, Numba and its compiler after the kernels are made
LOGITS_ROWS = 512  # rows of logits that exist at a time in the classifier
SHARE_OF_PEAK = 0.6  # of the multiply-add peak that a step is assumed to reach: small models do less well


class Machine(Ops, Protocol):
    """A backend that can also tell what it runs on: the shipped one."""

    threads: int
    isa: str

    def measure_peak(self) -> float:
        """GFLOP/s of multiply-adds in its dtype over all threads, measured now (about 0.2 s)."""

    def warm_up(self, say: Callable[[str], None], decoding: bool = False) -> None:
        """Compile the kernels of training, or of decoding, that are not cached, telling what is being done."""

    def version_info(self) -> dict[str, str]:
        """Versions of what computes, for the run's records."""


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

    @property
    def parameters(self) -> int:
        """Number of parameters, padded head included."""
        return sum(t.size for t in PARAMS(self.config))

    @property
    def step_seconds(self) -> float:
        """Expected time of a step."""
        o = self.options
        flops = self.config.flops_per_token(o.sequence_length) * o.batch_size * o.sequence_length
        return flops / (SHARE_OF_PEAK * self.peak * 1e9)

    @property
    def steps(self) -> int:
        """Expected number of steps: by --steps, or by how many fit into the time, whichever is less."""
        o = self.options
        bounds = [] if o.steps is None else [o.steps]
        if o.seconds is not None:
            bounds.append(int(o.seconds / self.step_seconds))
        return max(1, min(bounds))

    def lines(self) -> list[str]:
        """What the user reads."""
        c, o, m = self.config, self.options, self.machine
        epochs = self.steps * o.batch_size * o.sequence_length / self.train_tokens
        lines = [
            f"model    {o.model}: {c.layers} layers, {c.heads} heads, {c.channels} channels, "
            f"context {c.context}, vocabulary {c.vocab_size:,}: {self.parameters:,} parameters",
            f"data     {self.train_tokens:,} tokens to train on, {self.val_tokens:,} to validate; "
            f"batches of {o.batch_size} x {o.sequence_length}",
            f"machine  {m.threads} thread{'s' * (m.threads > 1)}, {m.isa}, {m.dtype}, "
            f"measured peak {self.peak:,.0f} GFLOP/s",
            f"memory   about {_gigabytes(self.memory)} of {_gigabytes(self.available)} available",
            f"time     about {duration(self.steps * self.step_seconds)}: {self.steps:,} steps of "
            f"{1e3 * self.step_seconds:,.0f} ms, {epochs:.1f} epochs; {self._ending()}",
        ]
        if epochs > MANY_EPOCHS:
            lines.append(
                f"caution  {epochs:.0f} epochs: the model will learn this text by heart and its validation loss will "
                "rise; more text, or fewer --steps or --minutes, serve better"
            )
        return lines

    def _ending(self) -> str:
        o = self.options
        bounds = [] if o.steps is None else [f"{o.steps:,} steps"]
        if o.seconds is not None:
            bounds.append(f"{o.seconds / 60:g} minutes")
        return "stops at " + " or ".join(bounds) + ("" if len(bounds) < 2 else ", whichever comes first")

    def check_memory(self) -> None:
        """Raise LlmpyError if the run needs more than there is."""
        if self.memory > self.available:
            o = self.options
            raise LlmpyError(
                f"{o.model} with -B {o.batch_size} -T {o.sequence_length} needs about "
                f"{_gigabytes(self.memory)} of memory, and {_gigabytes(self.available)} are available",
                "use a smaller -B, -T or --model, or close other programs",
            )


def inspect(
    config: ModelConfig, options: TrainOptions, machine: Machine, train_tokens: int, val_tokens: int
) -> Preflight:
    """Measure the machine and compute the needs."""
    return Preflight(
        config,
        options,
        machine,
        train_tokens,
        val_tokens,
        machine.measure_peak(),
        memory_needed(config, options.batch_size, options.sequence_length, machine),
        psutil.virtual_memory().available,
    )


def memory_needed(config: ModelConfig, B: int, T: int, machine: Ops) -> int:
    """Bytes that training `config` on batches of (B, T) takes, program included."""
    wide, stored = machine.wide.itemsize, machine.dtype.itemsize
    mixed = stored != wide

    def size(table: list[Tensor]) -> int:
        return sum(t.size * (wide if t.wide else stored) for t in table)

    parameters = sum(t.size for t in PARAMS(config))
    matrices = sum(t.size for t in PARAMS(config) if t.decay) if mixed else 0
    training = size(ACTS(config, B, T, True, RECOMPUTE)) + size(SCRATCH(config, B, T, mixed))
    sampling = size(PREFILL(config, T)) + size(CACHE(config, 1, T))
    logits = min(LOGITS_ROWS, B * T) * config.padded_vocab_size
    return wide * 4 * parameters + stored * (matrices + logits) + training + sampling + PROGRAM_BYTES


def duration(seconds: float) -> str:
    """45 s, 2 min 30 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
