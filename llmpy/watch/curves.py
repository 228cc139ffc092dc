"""metrics.jsonl → curves, thinned to what a screen can show.

thinned    more points than fit become equal buckets, each with its least and its largest value: no spike is lost
smoothed   the mean of as many points on both sides, up to half the width, so that it does not lag behind a fall and
           starts and ends where the points do; of more points than fit, those are means of buckets themselves
clocks     tokens and seconds up to each step: sums of `ms`·`tokens_per_s` and `ms` over its lines. --resume cuts the
           lines back, so that sums continue over restarts; evaluations, samples and pauses have no `ms` and take no
           time. A line stands for all steps since the one before it.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from ..options.watch import AXES, CURVES

PERCENT = {"share_of_peak", "hellaswag"}
SMOOTHED = {"loss", "grad_norm", "tokens_per_s", "share_of_peak"}
NUMBERS = (*CURVES, "val_loss", "ms")  # that are read of a line
LARGEST_STEP = 1 << 53  # as JavaScript counts
LARGEST_VALUE = 1e30  # beyond that nothing is told apart, and sums overflow


@dataclass(frozen=True)
class Line:
    """A curve as it is drawn: x float64, y float32, where an average of what is constant is that constant."""

    run: str
    name: str  # as metrics.jsonl has it: validation is drawn in the chart of the loss
    x: np.ndarray
    y: np.ndarray  # every point, or of many the extremes
    average: tuple[np.ndarray, np.ndarray] | None = None


class Curves:
    """All numbers of a run."""

    def __init__(self, file: BinaryIO) -> None:
        """Read the whole file. Lines that are half written, no JSON or without a step are ignored."""
        rows = (row for row in rows_of(file) if type(row.get("step")) is int and 0 <= row["step"] < LARGEST_STEP)
        table = np.array([[row["step"], *(number(row.get(name)) for name in NUMBERS)] for row in rows], float)
        table = table.reshape(-1, 1 + len(NUMBERS)).T
        # Lines whose step comes again later are what --resume replaced.
        kept = table[0] <= np.minimum.accumulate(table[0, ::-1])[::-1]
        self._columns = dict(zip(("step", *NUMBERS), table[:, kept], strict=True))
        at, ms, rate = self.points("ms", "tokens_per_s")
        start = np.maximum(at[:1] - 1, 0)
        gaps, seconds = np.diff(at, prepend=start), np.maximum(ms, 0) / 1000
        each = {"tokens": np.rint(seconds * np.maximum(rate, 0)), "time": seconds}
        self._at = np.concatenate([start, at])
        self._clocks = {name: np.append(0 * start, np.cumsum(gaps * v)) for name, v in each.items()}

    def points(self, *names: str) -> np.ndarray:
        """Steps, rising, and the values of these curves there, where all are finite; float64 (1 + names, n)."""
        rows = np.stack([self._columns[name] for name in ("step", *names)])
        rows = rows[:, np.isfinite(rows).all(axis=0)]
        return rows[:, np.diff(rows[0], append=math.inf) > 0]  # of lines of one step the last

    def along(self, axis: str, steps: np.ndarray) -> np.ndarray:
        """Where steps lie along an axis, float64; a clock stands still before its first step and after its last."""
        return steps if axis == "steps" else np.interp(steps, self._at, self._clocks[axis])

    def line(self, run: str, name: str, axis: str, over: float | None, points: int) -> Line | None:
        """A curve averaged over so many steps (None: a hundredth of them, 0: not); None if there is nothing to draw."""
        unit, scale = AXES[axis][1], 100 if name in PERCENT else 1
        steps, values = self.points(name)
        if not len(steps) or axis != "steps" and not len(self._at):
            return None
        x, y = self.along(axis, steps) / unit, scale * values
        few = thinned(y, points)
        starts = np.arange(0, len(x), -(-len(x) // points))
        width = 0.01 if over is None else over / max(1.0, steps[-1] - steps[0])
        average = None
        if name in SMOOTHED and (radius := round(width * len(starts) / 2)):
            bucket_x, means = (np.add.reduceat(v, starts) / np.diff(starts, append=len(x)) for v in (x, y))
            average = bucket_x, smoothed(means, radius).astype(np.float32)
        return Line(run, name, x[few], y[few].astype(np.float32), average)


def charts(
    runs: Mapping[str, Curves], wanted: Iterable[str], axis: str, over: float | None, points: int
) -> dict[str, list[Line]]:
    """The lines of each chart that has one."""
    found = {}
    for chart in wanted:
        names = ("loss", "val_loss") if chart == "loss" else (chart,)
        lines = [curves.line(run, name, axis, over, points) for run, curves in runs.items() for name in names]
        if any(lines):
            found[chart] = [line for line in lines if line]
    return found


def thinned(values: np.ndarray, points: int) -> np.ndarray:
    """The indices, rising, of at most `points` + 2 values: the first, the last, and the extremes between."""
    if len(values) <= points:
        return np.arange(len(values))
    size = math.ceil(len(values) / (points // 2))
    buckets = np.pad(values, (0, -len(values) % size), "edge").reshape(-1, size)
    starts = size * np.arange(len(buckets))
    ends = [0, len(values) - 1]
    return np.unique(np.concatenate([starts + buckets.argmin(1), starts + buckets.argmax(1), ends]).clip(0, ends[1]))


def smoothed(values: np.ndarray, radius: int) -> np.ndarray:
    """The mean of each value and of as many on both sides as there are, up to `radius`; float64 (n,)."""
    n, radius = len(values), min(radius, (len(values) - 1) // 2)
    first = [values[: 2 * i + 1].mean() for i in range(radius)]
    last = [values[n - 2 * i - 1 :].mean() for i in range(radius)]
    within = np.convolve(values, np.ones(2 * radius + 1) / (2 * radius + 1), "valid")
    return np.concatenate([first, within, last[::-1]])


def latest(file: BinaryIO) -> dict[str, float]:
    """The newest of each number among the lines, for a table: those that are finite."""
    found: dict[str, float] = {}
    for row in rows_of(file):
        found |= {name: v for name in (*NUMBERS, "step", "eta_s") if math.isfinite(v := number(row.get(name)))}
    return found


def rows_of(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the objects among lines of JSON. One that cannot be read is ignored."""
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(row := json.loads(line), dict):
                yield row


def number(value: Any) -> float:
    """A float of what JSON may hold; NaN for what is not a number, or too large to draw."""
    return float(value) if type(value) in (float, int) and abs(value) <= LARGEST_VALUE else math.nan
