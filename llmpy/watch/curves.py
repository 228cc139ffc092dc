"""metrics.jsonl → curves: read on from where it was read before, thinned to what a screen can show.

A file that grows is read by byte offset, whole lines alone. One that was cut back (`--resume` does that), or is another
file of the same name, is read anew: the bytes before the offset tell. Steps never fall along a curve: what comes again
takes the place of what was there.

thinned    more points than fit become buckets of 2^k steps that begin at multiples of it, each with its mean, least and
           largest value: a picture that does not flicker as a run grows, and in which no spike is lost. The buckets
           that are full are kept, so that a line more costs the last bucket and not the million lines before it.
smoothed   the a of the line a + b·dᵢ, dᵢ = (sᵢ − s)/τ, for which Σ exp(−|dᵢ|)·(yᵢ − a − b·dᵢ)² + ε·b² over all points
           sᵢ, yᵢ is least: it does not lag behind a fall, gaps count, and where it begins and ends, where a mean would
           know one side alone and begin too low, it is as high as the points; never higher or lower than all of them
clocks     tokens and seconds up to each step, the sums of what its lines tell of the steps themselves: `ms`, and
           `ms`·`tokens_per_s`. --resume cuts the lines back, so that sums go on over restarts; evaluations, samples
           and pauses have no `ms` and take no time. A line stands for all steps since the one before it.
"""

from __future__ import annotations

import json
import math
import os
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

CURVES = (
    "loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "share_of_peak", "val_bits_per_byte", "hellaswag",
)  # fmt: skip
CLOCKS = ("tokens", "seconds")  # what a curve may lie along, beside steps
POINTS = 1000  # of a curve, about the pixels of a chart
CHUNK = 1 << 18  # bytes parsed at a time; no line of ours is as long
SURVEY_FROM = 1 << 23  # bytes of a file that is looked over before it is read
END = 1 << 17  # bytes that tell the newest numbers: of 450 steps, so that an evaluation is among them
OUTLIER = 4.0  # standard deviations of the norm above its mean from which a step is marked
KEPT = 200  # marks, and outliers, that are shown
LEVEL = 1e-9  # ε: what a slope costs, so that a point far from all others has a line too
LARGEST_STEP = 1 << 53  # as JavaScript counts
LARGEST_VALUE = 1e30  # beyond that nothing is told apart, and sums overflow


class Curve:
    """One number by step."""

    def __init__(self, dtype: type[np.floating] = np.float32) -> None:
        self._steps, self._values = np.empty(256, np.int64), np.empty(256, dtype)
        self._count = 0
        self._forget()

    def __len__(self) -> int:
        return self._count

    @property
    def steps(self) -> np.ndarray:
        """int64 (n,), never falling."""
        return self._steps[: self._count]

    @property
    def values(self) -> np.ndarray:
        """float32, of a clock float64, (n,), finite."""
        return self._values[: self._count]

    def extend(self, steps: np.ndarray, values: np.ndarray) -> None:
        """Points at steps that do not lie before those that are there."""
        count = self._count + len(steps)
        if count > len(self._steps):
            self._steps, self._values = np.resize(self._steps, 2 * count), np.resize(self._values, 2 * count)
        self._steps[self._count : count] = steps
        self._values[self._count : count] = values
        self._count = count

    def cut(self, step: int) -> None:
        """Take away what lies beyond a step."""
        self._count = int(np.searchsorted(self.steps, step, "right"))
        self._forget()

    def _forget(self) -> None:
        self._shift, self._row, self._full = -1, 0, np.empty((4, 0))

    def thinned(self, first: float = -math.inf, last: float = math.inf, points: int = POINTS) -> np.ndarray:
        """From step `first` to `last`: (2, n) of step and value, or, of more than `points`, (4, n) of the buckets'
        middle step, mean, least and largest value; float64, n <= points.
        """
        low, high = np.searchsorted(self.steps, (first, last + 1))
        if high - low <= points:
            return np.stack([self.steps[low:high], self.values[low:high]])
        shift = (int(self.steps[high - 1] - self.steps[low]) // (points - 1)).bit_length()
        if high - low < self._count:
            return buckets(self.steps[low:high], self.values[low:high], shift)[0]
        if shift != self._shift:
            self._forget()
            self._shift = shift
        new, starts = buckets(self.steps[self._row :], self.values[self._row :], shift)
        found = np.concatenate([self._full, new], axis=1)
        self._full, self._row = found[:, :-1], self._row + int(starts[-1])  # the last one may still grow
        return found


def buckets(steps: np.ndarray, values: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """(4, n) as `Curve.thinned` has it, of 2^shift steps each, and where each begins; of at least one point."""
    starts = np.flatnonzero(np.diff(steps >> shift, prepend=-1))
    ends = np.append(starts[1:], len(steps))
    middle = (steps[starts] + steps[ends - 1]) / 2
    mean = np.add.reduceat(values, starts, dtype=np.float64) / (ends - starts)
    return np.stack([middle, mean, np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)]), starts


def smoothed(points: np.ndarray, over: float) -> np.ndarray:
    """The values of (2 or 4, n) points, smoothed over that many steps (τ above); float64 (n,)."""
    usual = np.median(points[1])  # without it all numbers below are 0 where all values are the same: exactly that stays
    apart, values = np.diff(points[0], prepend=points[0, :1]) / over, points[1] - usual
    before = _faded(apart, values)
    after = _faded(np.append(apart[1:], 0.0)[::-1], values[::-1])[:, ::-1]
    w, y = before[0] + after[0] - 1, before[3] + after[3] - values  # Σ wᵢ, Σ wᵢ·yᵢ
    wd, wdd, wdy = after[1] - before[1], before[2] + after[2] + LEVEL, after[4] - before[4]
    line = (wdd * y - wd * wdy) / (wdd * w - wd * wd)
    return usual + np.clip(line, values.min(), values.max())  # an outlier tilts it


def _faded(apart: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Σ w, Σ w·d, Σ w·d², Σ w·y, Σ w·d·y up to each point, float64 (5, n): d = how far back (in τ), w = exp(−d)."""
    w = wd = wdd = wy = wdy = 0.0
    sums = np.empty((5, len(values)))
    for i, (x, fade, y) in enumerate(zip(apart.tolist(), np.exp(-apart).tolist(), values.tolist(), strict=True)):
        wdd, wd, w = fade * (wdd + x * (2 * wd + x * w)), fade * (wd + x * w), fade * w + 1
        wdy, wy = fade * (wdy + x * wy), fade * wy + y
        sums[:, i] = w, wd, wdd, wy, wdy
    return sums


def width_of(steps: float) -> int:
    """Steps to smooth over in a picture of so many: about a hundredth, as 1, 2, 5, 10 … so that it seldom changes."""
    least = max(1.0, steps / 100)
    unit = 10 ** math.floor(math.log10(least))
    return next(unit * m for m in (1, 2, 5, 10) if unit * m >= least)


class Curves:
    """All numbers of a run."""

    def __init__(self) -> None:
        self.curves = {name: Curve() for name in CURVES}
        self.clocks = {name: Curve(np.float64) for name in CLOCKS}  # from 0 before the first step
        self.outliers: list[tuple[int, float, float]] = []  # step, norm, deviations
        self.marks: list[tuple[int, str]] = []  # steps that were skipped, or had a number that is not finite, and why
        self.step = 0
        self.seconds_left = math.nan  # of training, as the run says

    def take(self, rows: Iterable[dict[str, Any]]) -> None:
        """Lines of metrics.jsonl, in order; one without a step is no line of ours."""
        rows = [r for r in rows if type(r.get("step")) is int and 0 <= r["step"] < LARGEST_STEP]
        if not rows:
            return
        steps = np.array([r["step"] for r in rows])
        least = np.minimum.accumulate(steps[::-1])[::-1]  # from here on
        if least[0] < self.step:
            self._cut(int(least[0]))
        rows = [r for r, comes_again in zip(rows, steps > least, strict=True) if not comes_again]
        self.step = rows[-1]["step"]
        for name, curve in self.curves.items():
            self._extend(name, curve, [r for r in rows if name in r])
        self._count([r for r in rows if "ms" in r and "tokens_per_s" in r])
        self.outliers += [
            (r["step"], number(r["grad_norm"]), z)
            for r in rows
            if "norm_z" in r and math.inf > (z := number(r["norm_z"])) > OUTLIER and finite(number(r.get("grad_norm")))
        ]
        self.marks += [(r["step"], "skipped: " + str(r["skipped"])[:200]) for r in rows if "skipped" in r]
        self.marks.sort(key=lambda mark: mark[0])
        self.outliers, self.marks = self.outliers[-10 * KEPT :], self.marks[-KEPT:]
        self.seconds_left = next((number(r["eta_s"]) for r in rows[::-1] if "eta_s" in r), self.seconds_left)

    def _extend(self, name: str, curve: Curve, rows: list[dict[str, Any]]) -> None:
        steps = np.array([r["step"] for r in rows], np.int64)
        values = np.fromiter((number(r[name]) for r in rows), float, len(rows))
        good = np.abs(values) <= LARGEST_VALUE  # NaN is not
        for i in np.flatnonzero(~good)[-KEPT:]:
            if "skipped" not in rows[i]:  # which says so itself
                self.marks.append((int(steps[i]), f"{name} {str(rows[i][name])[:40]}"))
        curve.extend(steps[good], values[good])

    def _count(self, rows: list[dict[str, Any]]) -> None:
        """Let the clocks go on. A step that comes again counts once, as it came last."""
        steps = np.array([r["step"] for r in rows], np.int64)
        seconds, rate = np.array([(number(r["ms"]), number(r["tokens_per_s"])) for r in rows], float).reshape(-1, 2).T
        good = (seconds >= 0) & (seconds <= LARGEST_VALUE) & (rate >= 0) & (rate <= LARGEST_VALUE)
        good[good] = np.diff(steps[good], append=LARGEST_STEP) > 0
        steps, seconds, rate = steps[good], seconds[good] / 1000, rate[good]
        if not len(steps):
            return
        for clock, each in zip(self.clocks.values(), (np.rint(seconds * rate), seconds), strict=True):
            clock.cut(int(steps[0]) - 1)
            if not len(clock):
                clock.extend(np.maximum(steps[:1] - 1, 0), np.zeros(1))
            clock.extend(steps, clock.values[-1:] + np.cumsum(np.diff(steps, prepend=clock.steps[-1:]) * each))

    def along(self, clock: str, steps: np.ndarray) -> np.ndarray:
        """Where steps lie on a clock that has begun, float64; before its first and after its last step it stands."""
        return np.interp(steps, self.clocks[clock].steps, self.clocks[clock].values)

    def steps_at(self, clock: str, *readings: float) -> tuple[float, ...]:
        """Where a clock that has begun shows these, in steps; infinities stay what they are."""
        steps, values = self.clocks[clock].steps, self.clocks[clock].values
        return tuple(float(np.interp(r, values, steps)) if math.isfinite(r) else r for r in readings)

    def _cut(self, step: int) -> None:
        """The run goes on from an earlier step: what lies beyond it will come again."""
        for curve in self.curves.values():
            curve.cut(step)
        for clock in self.clocks.values():
            clock.cut(step - 1)
        self.outliers = [o for o in self.outliers if o[0] < step]
        self.marks = [m for m in self.marks if m[0] < step]


def number(value: Any) -> float:
    """A float of what JSON may hold; NaN for what is no number."""
    if type(value) is float:
        return value
    return float(value) if type(value) is int and abs(value) < LARGEST_VALUE else math.nan


def finite(value: float) -> bool:
    """Whether it can be drawn."""
    return abs(value) <= LARGEST_VALUE


class Metrics:
    """The curves of a metrics.jsonl that another process is writing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.version = 0  # another one whenever anything has changed
        self._forget()

    def _forget(self) -> None:
        self._curves = Curves()
        self._rough: Curves | None = None
        self._end: tuple[object, Curves] | None = None  # which state of the file, and what its end tells
        self._place = self._size = 0
        self._before = b""  # the bytes just before the place
        self._file = (0, 0)
        self.version += 1

    @property
    def share(self) -> float:
        """How much of the file has been read, 0 … 1; a line that is half written does not count."""
        return 1.0 if self._rough is None else self._place / self._size

    @property
    def curves(self) -> Curves:
        """What was read; of a large file, until all is, what a look at lines here and there shows."""
        return self._curves if self._rough is None else self._rough

    @property
    def newest(self) -> Curves:
        """The last numbers: of what was read, or of the end that was glanced at."""
        return self.curves if self._end is None else self._end[1]

    def glance(self, seconds: float = math.inf) -> None:
        """See to `newest` alone: of a large file, unless all of it was read before, only the end is looked at."""
        try:
            with open_regular(self.path) as file:
                found = os.fstat(file.fileno())
                if found.st_size > END and (not self._place or self._rough is not None):
                    mark = found.st_size, found.st_mtime_ns
                    if self._end is None or self._end[0] != mark:
                        file.seek(found.st_size - END)
                        text = file.read(END)
                        self._end = mark, Curves()
                        self._end[1].take(rows_of(text[text.find(b"\n") + 1 : text.rfind(b"\n") + 1]))
                    return
        except OSError:
            pass  # as `read` has it
        self.read(seconds)

    def read(self, seconds: float = math.inf) -> None:
        """Read what is new, for about that long. A file that is not there is as good as empty."""
        until = time.monotonic() + seconds
        self._end = None
        try:
            with open_regular(self.path) as file:
                self._follow(file)
                while True:
                    text = file.read(CHUNK)
                    whole = text[: text.rfind(b"\n") + 1] or (text if len(text) == CHUNK else b"")
                    if not whole:
                        self.version += self._rough is not None
                        self._rough = None
                        return
                    self._curves.take(rows_of(whole))
                    self._place += len(whole)
                    self._before = (self._before + whole)[-64:]
                    self.version += 1
                    if time.monotonic() >= until:
                        return
                    file.seek(self._place)
        except OSError:
            if self._place:
                self._forget()

    def _follow(self, file: BinaryIO) -> None:
        """To the place in the file, if what lies before it is what was read, else to its start."""
        found = os.fstat(file.fileno())
        file.seek(max(0, self._place - len(self._before)))
        if (found.st_dev, found.st_ino) != self._file or file.read(len(self._before)) != self._before:
            self._forget()
            self._file = found.st_dev, found.st_ino
        self._size = found.st_size
        if self._place == 0 and self._size >= SURVEY_FROM:
            self._rough = Curves()
            self._rough.take(rows_of(b"\n".join(survey(file, self._size))))
        file.seek(self._place)


def survey(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The first whole line after each of POINTS/2 evenly spaced places."""
    for n in range(POINTS // 2):
        file.seek(n * size // (POINTS // 2))
        lines = file.read(1 << 12).split(b"\n", 2)
        if len(lines) == 3:
            yield lines[1]


def rows_of(text: bytes) -> list[dict[str, Any]]:
    """The objects among lines of JSON. One that cannot be read is passed over."""
    lines = text.decode("utf-8", "replace").strip()
    try:
        rows = json.loads(f"[{lines.replace(chr(10), ',')}]")  # as one list: two thirds of the time
    except (ValueError, RecursionError):
        rows = [row for line in lines.split("\n") for row in one_row(line)]
    return [row for row in rows if isinstance(row, dict)]


def one_row(line: str) -> list[Any]:
    """What a line holds, if it can be read."""
    try:
        return [json.loads(line)] if line.startswith("{") else []
    except (ValueError, RecursionError):
        return []


def open_regular(path: Path) -> BinaryIO:
    """A file to read. Raises OSError for whatever is none: a pipe would hang, a device never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{path} is no file")
    return path.open("rb")
