"""metrics.jsonl → curves, thinned to what a screen can show.

thinned    more points than fit become equal buckets, each with its least and its largest value: no spike is lost
smoothed   the mean of as many points on both sides, up to half the width, so that it does not lag behind a fall and
           starts and ends where the points do; of more points than fit, those are means of buckets themselves
clocks     tokens and seconds up to each step: sums of `ms`·`tokens_per_s` and `ms` over its lines. --resume cuts the
           lines back, so that sums continue over restarts; evaluations, samples and pauses have no `ms` and take no
           time. A line stands for all steps since the one before it.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO, Self

import numpy as np

from ..options.options import CURVES

SMOOTHED = {"loss", "grad_norm", "tokens_per_s", "share_of_peak"}
NUMBERS = (*CURVES, "val_loss", "ms")  # that are read of a line
CHUNK = 1 << 22  # bytes of lines parsed at a time
LARGEST_STEP = 1 << 53  # as JavaScript counts
LARGEST_VALUE = 1e30  # beyond that nothing is told apart, and sums overflow


@dataclass(frozen=True)
class Line:
    """A curve as it is drawn: x float64, y float32, where an average of what is constant is that constant."""

    x: np.ndarray
    y: np.ndarray  # every point, or of many the extremes
    average: Line | None = None

    def scaled(self, x: float, y: float) -> Line:
        """In other units."""
        return Line(x * self.x, np.float32(y) * self.y, self.average and self.average.scaled(x, y))


class Curves:
    """All numbers of a run."""

    def __init__(self, steps: np.ndarray, columns: dict[str, np.ndarray], skipped: dict[int, str]) -> None:
        """`steps`: int64 (n,), never falling; `columns`: name → float64 (n,), NaN where a line lacks it."""
        self._steps, self._columns = steps, columns
        self.skipped = skipped  # step → why it was
        at, ms, rate = self._finite("ms", "tokens_per_s")
        first = np.maximum(at[:1] - 1, 0)
        gaps, seconds = np.diff(at, prepend=first), np.maximum(ms, 0) / 1000
        each = {"tokens": np.rint(seconds * np.maximum(rate, 0)), "time": seconds}
        self._clock_steps = np.concatenate([first, at])
        self._clocks = {name: np.append(np.zeros(len(first)), np.cumsum(gaps * v)) for name, v in each.items()}

    @classmethod
    def empty(cls) -> Self:
        """The curves of a run that has written no line."""
        return cls(np.empty(0, np.int64), {name: np.empty(0) for name in NUMBERS}, {})

    @classmethod
    def read(cls, file: BinaryIO) -> Self:
        """The whole file. Lines that are half written, no JSON or without a step are ignored."""
        steps, columns = array("q"), {name: array("d") for name in NUMBERS}
        skipped: list[tuple[int, str]] = []  # by line
        while lines := file.readlines(CHUNK):
            rows = [row for row in rows_of(lines) if type(row.get("step")) is int and 0 <= row["step"] < LARGEST_STEP]
            skipped += [(i, str(row["skipped"])[:200]) for i, row in enumerate(rows, len(steps)) if "skipped" in row]
            steps.extend([row["step"] for row in rows])
            for name, column in columns.items():
                column.extend([number(row.get(name)) for row in rows])
        found = np.array(steps, np.int64)
        # Lines whose step comes again later are what --resume replaced.
        kept = found <= np.minimum.accumulate(found[::-1])[::-1]
        marks = {int(found[i]): why for i, why in skipped if kept[i]}
        return cls(found[kept], {name: np.array(column)[kept] for name, column in columns.items()}, marks)

    def _finite(self, *names: str) -> np.ndarray:
        """Steps, rising, and the values of these columns there, where all are finite; float64 (1 + names, n)."""
        rows = np.stack([self._steps.astype(float), *(self._columns[name] for name in names)])
        rows = rows[:, np.isfinite(rows).all(axis=0)]
        return rows[:, np.diff(rows[0], append=math.inf) > 0]  # of lines of one step the last

    def has(self, name: str) -> bool:
        """Whether there is anything to draw."""
        return bool(np.isfinite(self._columns[name]).any())

    def newest(self, name: str) -> float:
        """The last value of a curve that has one."""
        return float(self._finite(name)[1, -1])

    def along(self, axis: str, steps: np.ndarray) -> np.ndarray:
        """Where steps lie along an axis that is there, float64; a clock stands still before its first step."""
        return steps if axis == "steps" else np.interp(steps, self._clock_steps, self._clocks[axis])

    def end(self, axis: str) -> float:
        """Where the last step lies along an axis; 0 if nothing says so."""
        return float(self.along(axis, self._steps[-1:].astype(float)).max(initial=0)) if self.has_axis(axis) else 0.0

    def has_axis(self, axis: str) -> bool:
        """Whether the lines say where steps lie along it."""
        return axis == "steps" or len(self._clock_steps) > 0

    def line(self, name: str, axis: str, over: float | None, points: int) -> Line:
        """A curve that has a point, smoothed over that many steps (None: a hundredth of them, 0: not)."""
        steps, values = self._finite(name)
        x, few = self.along(axis, steps), thinned(values, points)
        starts = np.arange(0, len(steps), -(-len(steps) // points))
        sizes = np.diff(starts, append=len(steps))
        width = 0.01 if over is None else over / max(1.0, steps[-1] - steps[0])
        average = None
        if name in SMOOTHED and (radius := round(width * len(starts) / 2)):
            bucket_x, means = (np.add.reduceat(v, starts) / sizes for v in (x, values))
            average = Line(bucket_x, smoothed(means, radius).astype(np.float32))
        return Line(x[few], values[few].astype(np.float32), average)

    def skips(self, axis: str) -> Line:
        """Where steps were skipped, on the curve of the loss, which has a point."""
        at = np.array(list(self.skipped), float)
        x, y = self.along(axis, at), np.interp(at, *self._finite("loss"))
        return Line(x, y.astype(np.float32))


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


def latest(file: BinaryIO) -> dict[str, Any]:
    """The newest of each number among the lines, of those that are finite, and of step and eta_s; for a table."""
    found: dict[str, float] = {}
    for row in rows_of(file.readlines()):
        found |= {name: float(f"{v:.6g}") for name in (*NUMBERS, "eta_s") if math.isfinite(v := number(row.get(name)))}
        if type(row.get("step")) is int:
            found["step"] = row["step"]
    return found


def rows_of(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """The objects among lines of JSON. One that cannot be read is ignored."""
    lines = [line for line in lines if line.startswith(b"{") and line.endswith((b"}\n", b"}\r\n"))]
    try:
        rows = json.loads(b"[" + b",".join(lines) + b"]")  # as one list: two thirds of the time
    except (ValueError, RecursionError):
        rows = [row for line in lines for row in one_row(line)]
    return [row for row in rows if isinstance(row, dict)]


def one_row(line: bytes) -> list[Any]:
    """What a line holds, if it can be read."""
    try:
        return [json.loads(line)]
    except (ValueError, RecursionError):
        return []


def number(value: Any) -> float:
    """A float of what JSON may hold; NaN for what is not a number, or too large to draw."""
    return float(value) if type(value) in (float, int) and abs(value) <= LARGEST_VALUE else math.nan
