"""metrics.jsonl → curves, downsampled to the resolution of a screen.

thinned    too many points are split into equal buckets, each keeping its minimum and maximum: no spike is lost
smoothed   a centered mean, narrower at the ends, so that it does not lag; of too many points, the mean of bucket means
clocks     tokens and seconds up to each step: sums of `ms`·`tokens_per_s` and `ms` over its lines. --resume truncates
           the file, so sums continue over restarts; evaluations, samples and pauses have no `ms` and count no time.
           A line stands for all steps since the previous one.
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
NUMBERS = (*CURVES, "val_loss", "ms")  # read from a line
LARGEST_STEP = 1 << 53  # JavaScript's largest exact integer
LARGEST_VALUE = 1e30  # sums of larger values could overflow


@dataclass(frozen=True)
class Line:
    """A curve as drawn: x float64; y float32, so that the average of a constant is exactly that constant."""

    run: str
    name: str  # as in metrics.jsonl; validation is drawn in the chart of the loss
    x: np.ndarray
    y: np.ndarray  # all points, or the extremes of buckets
    average: tuple[np.ndarray, np.ndarray] | None = None


class Curves:
    """All numbers of a run."""

    def __init__(self, file: BinaryIO) -> None:
        """Read the whole file. Lines that are incomplete, not JSON or without a step are ignored."""
        rows = (row for row in rows_of(file) if type(row.get("step")) is int and 0 <= row["step"] < LARGEST_STEP)
        table = np.array([[row["step"], *(number(row.get(name)) for name in NUMBERS)] for row in rows], float)
        table = table.reshape(-1, 1 + len(NUMBERS)).T
        # --resume replaces lines: keep the last of each step.
        kept = table[0] <= np.minimum.accumulate(table[0, ::-1])[::-1]
        self._columns = dict(zip(("step", *NUMBERS), table[:, kept], strict=True))
        at, ms, rate = self.points("ms", "tokens_per_s")
        start = np.maximum(at[:1] - 1, 0)
        gaps, seconds = np.diff(at, prepend=start), np.maximum(ms, 0) / 1000
        each = {"tokens": np.rint(seconds * np.maximum(rate, 0)), "time": seconds}
        self._at = np.concatenate([start, at])
        self._clocks = {name: np.append(0 * start, np.cumsum(gaps * v)) for name, v in each.items()}

    def points(self, *names: str) -> np.ndarray:
        """Return ascending steps and the values of these curves, where all are finite: float64 (1 + names, n)."""
        rows = np.stack([self._columns[name] for name in ("step", *names)])
        rows = rows[:, np.isfinite(rows).all(axis=0)]
        return rows[:, np.diff(rows[0], append=math.inf) > 0]  # the last line of each step

    def along(self, axis: str, steps: np.ndarray) -> np.ndarray:
        """Return the positions of steps on an axis, float64; outside their steps, clocks are constant."""
        return steps if axis == "steps" else np.interp(steps, self._at, self._clocks[axis])

    def line(self, run: str, name: str, axis: str, over: float | None, points: int) -> Line | None:
        """Return a curve averaged over `over` steps (None: 1 % of them, 0: no average); None if it has no points."""
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
    runs: Mapping[str, Curves], selected: Iterable[str], axis: str, over: float | None, points: int
) -> dict[str, list[Line]]:
    """Return chart → lines, without the charts that have none."""
    found = {}
    for chart in selected:
        names = ("loss", "val_loss") if chart == "loss" else (chart,)
        lines = [curves.line(run, name, axis, over, points) for run, curves in runs.items() for name in names]
        if any(lines):
            found[chart] = [line for line in lines if line]
    return found


def thinned(values: np.ndarray, points: int) -> np.ndarray:
    """Return ascending indices of at most `points` + 2 values: the first, the last, and the extremes between."""
    if len(values) <= points:
        return np.arange(len(values))
    size = math.ceil(len(values) / (points // 2))
    buckets = np.pad(values, (0, -len(values) % size), "edge").reshape(-1, size)
    starts = size * np.arange(len(buckets))
    ends = [0, len(values) - 1]
    return np.unique(np.concatenate([starts + buckets.argmin(1), starts + buckets.argmax(1), ends]).clip(0, ends[1]))


def smoothed(values: np.ndarray, radius: int) -> np.ndarray:
    """Return centered means of up to `radius` values on both sides, fewer at the ends; float64 (n,)."""
    n, radius = len(values), min(radius, (len(values) - 1) // 2)
    first = [values[: 2 * i + 1].mean() for i in range(radius)]
    last = [values[n - 2 * i - 1 :].mean() for i in range(radius)]
    within = np.convolve(values, np.ones(2 * radius + 1) / (2 * radius + 1), "valid")
    return np.concatenate([first, within, last[::-1]])


def latest(file: BinaryIO) -> dict[str, float]:
    """Return the newest finite value of each number, for a table."""
    found: dict[str, float] = {}
    for row in rows_of(file):
        found |= {name: v for name in (*NUMBERS, "step", "eta_s") if math.isfinite(v := number(row.get(name)))}
    return found


def rows_of(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects among the lines; other lines are ignored."""
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(row := json.loads(line), dict):
                yield row


def number(value: Any) -> float:
    """Return a JSON value as a float; NaN if it is not a number or too large to draw."""
    return float(value) if type(value) in (float, int) and abs(value) <= LARGEST_VALUE else math.nan
