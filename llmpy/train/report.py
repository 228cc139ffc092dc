"""What a run says and records of its steps, and the clocks by which it does.

the terminal    a line for each of the first steps, then at most one in two seconds; a progress bar below them
metrics.jsonl   every number of every step, and to trackers       main.log   loss, rate and norm, as llm.c writes them
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ..run.journal import Journal
from ..run.trackers import Trackers
from ..system.words import duration
from .single_process import SINGLE_PROCESS, SingleProcess

EVERY_LINE_UNTIL = 10  # step from which on lines are rarer
LINE_SECONDS = 2.0
SMOOTHING = 0.95  # of the displayed tokens per second


@dataclass(frozen=True)
class StepResult:
    """One step: an update, or one that was skipped."""

    step: int  # steps made, this one included
    total: int  # steps that the run will have made at its end, as things are
    loss: float  # mean over the targets that count, nats
    norm: float  # of the gradient, before clipping
    lr: float
    z: Mapping[str, float]  # deviations of loss and norm from their means; NaN: not known yet
    skipped: str  # why the parameters were not updated, or ""
    batches: list[tuple[str, int]]  # file and number of each sample
    tokens: int  # of all ranks
    seconds: float


class Report:
    """The logs of a run, its clocks, and the speed that it shows. A context manager, which closes the trackers."""

    def __init__(
        self, journal: Journal, trackers: Trackers, peak: float, flops_per_token: int, step_seconds: float,
        world: SingleProcess = SINGLE_PROCESS,
    ) -> None:  # fmt: skip
        """`peak`: GFLOP/s of all ranks; `step_seconds`: what a step may take, until some have been made."""
        self.journal, self.step_seconds = journal, step_seconds
        self._trackers, self._world = trackers, world
        self._peak, self._flops_per_token = peak, flops_per_token
        self._peak_doubted = False
        self._before = 0.0  # seconds of training of earlier processes
        self._started = 0.0
        self._in_steps = 0.0  # seconds, of all timed steps
        self._timed = self._made = 0  # steps that were timed, and those of this process
        self._rate = 0.0  # tokens per second of this process, smoothed
        self._line_at = 0.0
        self.log_sizes: dict[str, int] = {}  # bytes after the last step: what came since comes again on resume

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the progress bar and what follows the run elsewhere."""
        self.journal.end_progress()
        self._trackers.close()

    def start(self) -> None:
        """Start the clock and the progress bar."""
        self._started = time.perf_counter()
        self.journal.begin_progress()

    def elapsed(self) -> float:
        """Return the seconds since the first step began, evaluations and samples included, pauses of the run not."""
        return self._before + (time.perf_counter() - self._started if self._started else 0.0)

    def state(self, step: int) -> dict[str, float]:
        """Return the clocks for a checkpoint."""
        return {"elapsed": self.elapsed(), "in_steps": self._in_steps, "untimed": step - self._timed}

    def restore(self, step: int, seconds: Mapping[str, float]) -> None:
        """Set the clocks to those of a checkpoint."""
        self._before, self._in_steps = seconds["elapsed"], seconds["in_steps"]
        self._timed = step - int(seconds.get("untimed", 0))
        if self._timed:
            self.step_seconds = self._in_steps / self._timed

    def step(self, result: StepResult) -> None:
        """Record a step, and show it."""
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
            self.journal.log(f"step {r.step}: skipped, for {r.skipped}; batches {names}")
        if share > 1 and not self._peak_doubted:
            self._peak_doubted = True
            self.journal.log("note: more than the measured peak: others were at work when it was measured")
        numbers = {"loss": r.loss, "lr": r.lr, "grad_norm": r.norm, **{f"{name}_z": z for name, z in r.z.items()}}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        self.record(
            r.step, **finite, **({"skipped": r.skipped, "batches": r.batches} if r.skipped else {}),
            ms=1e3 * r.seconds, tokens_per_s=r.tokens / r.seconds, share_of_peak=share, eta_s=left,
            **self._world.times(),
        )  # fmt: skip
        if math.isfinite(r.loss) and math.isfinite(r.norm):
            self.journal.record_llmc(f"s:{r.step - 1} trl:{r.loss:.4f} lr:{r.lr:.6f} norm:{r.norm:.2f}")
            self._show(r, left)
        self.mark_logs()

    def mark_logs(self) -> None:
        """Note how long the logs are: what is recorded from here on comes again if the run is resumed from here."""
        self.log_sizes = self.journal.sizes()

    def record(self, step: int, **numbers: Any) -> None:
        """Write numbers of a step into metrics.jsonl, and to the trackers."""
        numbers = {"step": step, **numbers}
        self.journal.record(**numbers)
        self._trackers.log(step, numbers)

    def _show(self, r: StepResult, left: float) -> None:
        """Print the step line, if one is due, and move the progress bar."""
        self.journal.progress(r.step / r.total, f"step {r.step}/{r.total}, {duration(left)} left")
        now = time.perf_counter()
        if EVERY_LINE_UNTIL < r.step < r.total and now - self._line_at < LINE_SECONDS:
            return
        self._line_at = now
        share = self._flops_per_token * self._rate / self._peak / 1e7
        self.journal.log(
            f"step {r.step:>5}/{r.total} | loss {r.loss:.4f}{signed(r.z['loss'])} | lr {r.lr:.2e} | "
            f"norm {r.norm:.3f}{signed(r.z['norm'])} | {1e3 * r.seconds:.0f} ms | {self._rate:,.0f} tok/s | "
            f"{share:.0f}% of peak | {duration(left)} left"
        )


def signed(z: float) -> str:
    """Return a deviation from the mean as the step line has it, once there is one."""
    return "" if math.isnan(z) else f" ({z:+.2f}z)"
