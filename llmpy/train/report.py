"""The record of a run's steps, and its clocks.

terminal        a table row for each of the first steps, then at most one in two seconds; a progress bar below
metrics.jsonl   all numbers of every step, also sent to trackers     main.log   loss, lr and norm in llm.c's format
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

from ..run.journal import Journal
from ..run.trackers import Trackers
from ..system.words import duration
from .single_process import SINGLE_PROCESS, SingleProcess

EVERY_LINE_UNTIL = 10  # step from which on rows are rarer
LINE_SECONDS = 2.0
HEADER_EVERY = 20  # rows
HEADER = "       step    loss       z       lr    norm       z    ms   tok/s peak     left"
SMOOTHING = 0.95  # of the displayed tokens per second


@dataclass(frozen=True)
class StepResult:
    """One step, applied or skipped."""

    step: int  # from 1
    total: int  # predicted steps of the whole run
    loss: float | None  # mean over unmasked targets, nats; None: there are none
    norm: float  # of the gradient, before clipping
    lr: float
    z: Mapping[str, float]  # z-scores of loss and norm; NaN: window not full
    skipped: str  # why the update was skipped, or ""
    batches: list[tuple[str, int]]  # file and number of each sample
    tokens: int  # of all ranks
    seconds: float


class Report:
    """The logs, clocks and speed of a run. A context manager, which closes the trackers."""

    def __init__(
        self, journal: Journal, trackers: Trackers, peak: float, flops_per_token: int, step_seconds: float,
        world: SingleProcess = SINGLE_PROCESS,
    ) -> None:  # fmt: skip
        """`peak`: GFLOP/s of all ranks; `step_seconds`: estimate until steps are timed."""
        self.journal, self.step_seconds = journal, step_seconds
        self._trackers, self._world = trackers, world
        self._peak, self._flops_per_token = peak, flops_per_token
        self._peak_doubted = False
        self._before = 0.0  # training seconds of earlier processes
        self._started = 0.0
        self._in_steps = 0.0  # seconds of all timed steps
        self._timed = self._made = 0  # timed steps, and steps of this process
        self._rate = 0.0  # tokens per second of this process, smoothed
        self._line_at, self._rows = 0.0, 0
        self.log_sizes: dict[str, int] = {}  # bytes after the last step, from which a resumed run continues

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the progress bar and the trackers."""
        self.journal.end_progress()
        self._trackers.close()

    def start(self) -> None:
        """Start the clock and the progress bar."""
        self._started = time.perf_counter()
        self.journal.begin_progress()

    def elapsed(self) -> float:
        """Return the seconds since the first step, with evaluations and samples, without interruptions."""
        return self._before + (time.perf_counter() - self._started if self._started else 0.0)

    def state(self, step: int) -> dict[str, float]:
        """Return the clocks for a checkpoint."""
        return {"elapsed": self.elapsed(), "in_steps": self._in_steps, "untimed": step - self._timed}

    def restore(self, step: int, seconds: Mapping[str, float]) -> None:
        """Restore the clocks from a checkpoint."""
        self._before, self._in_steps = seconds["elapsed"], seconds["in_steps"]
        self._timed = step - int(seconds.get("untimed", 0))
        if self._timed:
            self.step_seconds = self._in_steps / self._timed

    def step(self, result: StepResult) -> None:
        """Record and print a step."""
        r = result
        self._made += 1
        self._timed += 1
        self._in_steps += r.seconds
        self.step_seconds = self._in_steps / self._timed
        self._rate += (r.tokens / r.seconds - self._rate) * (1 - SMOOTHING if self._made > 2 else 1.0)
        share = self._flops_per_token / 1e9 * r.tokens / r.seconds / self._peak
        left = (r.total - r.step) * self.step_seconds
        if r.skipped:
            names = ", ".join(f"{file} {sample}" for file, sample in r.batches)
            self.journal.log(f"step {r.step}: skipped: {r.skipped}; batches {names}")
        if share > 1 and not self._peak_doubted:
            self._peak_doubted = True
            self.journal.log("note: above the measured peak; other programs ran while it was measured")
        loss = math.nan if r.loss is None else r.loss
        numbers = {"loss": loss, "lr": r.lr, "grad_norm": r.norm, **{f"{name}_z": z for name, z in r.z.items()}}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        self.record(
            r.step, **finite, **({"skipped": r.skipped, "batches": r.batches} if r.skipped else {}),
            ms=1e3 * r.seconds, tokens_per_s=r.tokens / r.seconds, share_of_peak=share, eta_s=left,
            **self._world.times(),
        )  # fmt: skip
        if math.isfinite(loss) and math.isfinite(r.norm):
            self.journal.record_llmc(f"s:{r.step - 1} trl:{r.loss:.4f} lr:{r.lr:.6f} norm:{r.norm:.2f}")
        if math.isfinite(r.norm) and (r.loss is None or math.isfinite(loss)):
            self._show(r, left)
        self.mark_logs()

    def mark_logs(self) -> None:
        """Note the sizes of the logs, to which a run resumed from here truncates them."""
        self.log_sizes = self.journal.sizes()

    def record(self, step: int, **numbers: Any) -> None:
        """Write numbers of a step to metrics.jsonl and the trackers."""
        numbers = {"step": step, **numbers}
        self.journal.record(**numbers)
        self._trackers.log(step, numbers)

    def _show(self, r: StepResult, left: float) -> None:
        """Move the progress bar, and print a row of at most 80 columns if one is due."""
        self.journal.progress(r.step / r.total, f"step {r.step}/{r.total}, {duration(left)} left")
        now = time.perf_counter()
        if EVERY_LINE_UNTIL < r.step < r.total and now - self._line_at < LINE_SECONDS:
            return
        self._line_at = now
        if self._rows % HEADER_EVERY == 0:
            self.journal.log(HEADER)
        self._rows += 1
        share = self._flops_per_token * self._rate / self._peak / 1e9
        loss_z, norm_z = ("" if math.isnan(z) else f"{z:+.2f}" for z in (r.z["loss"], r.z["norm"]))
        loss = f"{'no target':>15}" if r.loss is None else f"{r.loss:7.4f} {loss_z:>7}"
        self.journal.log(
            f"{f'{r.step}/{r.total}':>11} {loss} {r.lr:.2e} {r.norm:7.3f} {norm_z:>7} "
            f"{1e3 * r.seconds:5.0f} {self._rate:7,.0f} {share:4.0%} {clock(left):>8}"
        )


def clock(seconds: float) -> str:
    """Return 2:03:04, or days: 1.5 d."""
    return f"{seconds / 86400:.1f} d" if seconds >= 86400 else str(timedelta(seconds=int(seconds)))
