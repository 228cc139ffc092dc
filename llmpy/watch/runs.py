"""The runs that are looked at: where they are, whether they go on, what they wrote; and all of it as one picture.

A name that a page sends is only ever looked up among the runs that were found, so that no path comes from outside.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ..errors import LlmpyError
from ..run.folder import CONFIG_FILE, LOCK, METRICS, SAMPLES
from ..system.command import command
from ..system.words import did_you_mean
from .curves import CLOCKS, KEPT, POINTS, Metrics, finite, open_regular, smoothed, width_of

BELOW = Path("runs")  # where runs are sought when none is named
MOST_RUNS = 200  # of a folder of runs, the newest
CONFIG_BYTES, SAMPLE_BYTES = 1 << 20, 1 << 16  # that are read, of the latter the last ones
SHOWN_SAMPLES, SAMPLE_LETTERS = 8, 6000
ALIVE_SECONDS = 10.0  # a run whose process is not known here trains if its metrics grew since
SMOOTHED = ("loss", "grad_norm", "tokens_per_s", "share_of_peak")
HEADING = re.compile(r"^--- step (\d{1,15})$", re.MULTILINE)


class Run:
    """A run folder, read as it grows. Its `lock` is held by who reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token = secrets.token_hex(4)  # no page takes this run for one of before
        self.lock = threading.Lock()
        self.metrics = Metrics(folder / METRICS)
        self.seen = 0.0  # when its metrics were looked at last, as `time.monotonic`; 0: never
        self._config: tuple[Any, dict[str, Any]] = (None, {})
        self._samples: tuple[Any, list[dict[str, Any]]] = (None, [])

    def trains(self) -> bool:
        """Whether a process goes on with it: one that holds its lock, or, on another machine, seems to."""
        try:
            with open_regular(self.folder / LOCK) as file:
                alive = psutil.pid_exists(int(file.read(20)))
        except (OSError, ValueError, OverflowError):  # OverflowError: a number that no process can have
            return False
        return alive or abs(time.time() - changed(self.folder)) < ALIVE_SECONDS

    def config(self) -> dict[str, Any]:
        """What config.json says of it; nothing if that cannot be read."""
        path = self.folder / CONFIG_FILE
        if (mark := mark_of(path)) != self._config[0]:
            try:
                with open_regular(path) as file:
                    found = json.loads(file.read(CONFIG_BYTES).decode("utf-8", "replace"))
            except (OSError, ValueError, RecursionError):
                found = None
            self._config = mark, found if isinstance(found, dict) else {}
        return self._config[1]

    def described(self) -> str:
        """What is trained, in a line: as far as config.json says it."""
        told = {**part(self.config(), "options"), **part(self.config(), "machine")}
        words = {
            "model": "",
            "batch_size": "B ",
            "sequence_length": "T ",
            "lr": "lr ",
            "dtype": "",
            "threads": "threads ",
        }
        return " · ".join(
            f"{word}{told[name]}"[:60] for name, word in words.items() if isinstance(told.get(name), str | int | float)
        )

    def samples(self) -> list[dict[str, Any]]:
        """What the model wrote, newest first: the step and the text."""
        path = self.folder / SAMPLES
        if (mark := mark_of(path)) != self._samples[0]:
            try:
                with open_regular(path) as file:
                    file.seek(max(0, os.fstat(file.fileno()).st_size - SAMPLE_BYTES))
                    pieces = HEADING.split(file.read(SAMPLE_BYTES).decode("utf-8", "replace"))
            except OSError:
                pieces = []
            found = [
                {"step": int(step), "text": text.strip("\n")[:SAMPLE_LETTERS]}
                for step, text in zip(pieces[1::2], pieces[2::2], strict=True)
            ]
            self._samples = mark, found[: -SHOWN_SAMPLES - 1 : -1]
        return self._samples[1]

    def picture(self, first: float, last: float, over: float | None, points: int, axis: str = "step") -> dict[str, Any]:
        """Curves between two steps, or two readings of a clock, `axis`; and the marks there; as JSON.

        They are smoothed over so many steps (None: as fits, 0: not). `clock` tells where steps lie on the other axes.
        """
        curves = self.metrics.curves
        if axis in CLOCKS and len(curves.clocks[axis]):
            first, last = curves.steps_at(axis, first, last)
        ends = [c.steps[[0, -1]] for c in curves.curves.values() if len(c)]
        begin = max(first, min((int(e[0]) for e in ends), default=0))
        end = min(last, max((int(e[1]) for e in ends), default=0))
        width = width_of(max(0.0, end - begin)) if over is None else over
        drawn = {}
        for name, curve in curves.curves.items():
            # Smoothing looks beyond both ends, so that a part of a curve is smoothed as the whole is.
            lead = 4 * width if name in SMOOTHED else 0
            found = curve.thinned(first - lead, last + lead, points)
            inside = (found[0] >= first) & (found[0] <= last)
            if inside.any():
                rows = dict(zip(("step", "mean", "least", "largest"), found, strict=False))
                if name in SMOOTHED and width:
                    rows["smooth"] = smoothed(found, width)
                drawn[name] = {k: rounded(v[inside]) for k, v in rows.items()}
        outliers = [o for o in curves.outliers if first <= o[0] <= last]
        largest = sorted(sorted(outliers, key=lambda o: -o[2])[:KEPT])
        return {
            "curves": drawn,
            "smoothed": width,
            "outliers": [[step, *rounded(np.array(rest))] for step, *rest in largest],
            "marks": [m for m in curves.marks if first <= m[0] <= last],
            "clock": self.clock(first, last, points),
        }

    def clock(self, first: float, last: float, points: int) -> dict[str, list[float]]:
        """Steps from before `first` to after `last`, about `points` of them, and what each clock shows there."""
        clocks = self.metrics.curves.clocks
        steps = clocks[CLOCKS[0]].steps
        low, high = np.searchsorted(steps, (first, last), "right").tolist()
        low, high = max(0, low - 1), min(len(steps), high + 1)
        rows = [*range(low, high - 1, 1 + (high - low) // points), *range(max(low, high - 1), high)]
        told = {name: np.round(clock.values[rows], 3).tolist() for name, clock in clocks.items()}
        return {"step": steps[rows].tolist(), **told}

    def numbers(self) -> dict[str, Any]:
        """The newest numbers, for a table."""
        curves = self.metrics.newest
        found = {name: float(curve.values[-1]) for name, curve in curves.curves.items() if len(curve)}
        left = {"eta_s": curves.seconds_left} if finite(curves.seconds_left) else {}
        return {"step": curves.step, **found, **left}


def changed(folder: Path) -> float:
    """When its metrics grew last, in seconds as `time.time`; 0 if there are none."""
    try:
        return (folder / METRICS).stat().st_mtime
    except OSError:
        return 0.0


def part(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A table within config.json."""
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def mark_of(path: Path) -> tuple[int, int, int] | None:
    """Differs whenever the file does; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def rounded(values: np.ndarray) -> list[float]:
    """Six digits, more than a chart shows; whole numbers as such, for steps may be large."""
    return [int(v) if v.is_integer() else float(f"{v:.6g}") for v in values.astype(float).tolist()]


class Runs:
    """Runs by name: those that were given, and those in folders of runs that were given, also as more begin there."""

    def __init__(self, given: Sequence[Path]) -> None:
        """Raises LlmpyError for one that is neither; none given: those below `runs`."""
        self._given = list(given) or [BELOW]
        self._lock = threading.Lock()
        self._runs: dict[Path, Run] = {}
        for path in self._given:
            if not is_run(path) and not children(path):
                where = f"{path} holds no run" if path.exists() else f"no run folder {path}" if given else "no run here"
                near = did_you_mean(str(path), map(str, children(BELOW)))
                raise LlmpyError(where, near or f"name the folder of a run, or begin one: {command('train')}")
        self.named = {path for path in given if is_run(path)}

    def all(self) -> dict[str, Run]:
        """Name → run: first those that were named, then the newest."""
        with self._lock:
            found = {p: self._runs.get(p) or Run(p) for p in dict.fromkeys(self._given) if is_run(p) or p in self._runs}
            for folder in self._given:
                if folder not in found:
                    found |= {p: self._runs.get(p) or Run(p) for p in children(folder)}
            self._runs = found
            return {name_of(path): run for path, run in found.items()}

    def chosen(self, runs: dict[str, Run]) -> list[str]:
        """The names to show when none is asked for: those that were named, and of folders those that train, or the
        newest.
        """
        named = [name for name, run in runs.items() if run.folder in self.named]
        others = [name for name in runs if name not in named]
        return named + ([name for name in others if runs[name].trains()] or ([] if named else others[:1]))


def name_of(path: Path) -> str:
    """A path as text that does nothing to a terminal."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in str(path))


def is_run(path: Path) -> bool:
    """Whether a run ever began in this folder."""
    return any((path / name).is_file() for name in (METRICS, CONFIG_FILE))


def children(folder: Path) -> list[Path]:
    """The runs in a folder, newest first."""
    try:
        found = [Path(folder, entry.name) for entry in os.scandir(folder) if entry.is_dir() and is_run(Path(entry))]
    except OSError:
        return []
    return sorted(found, key=lambda path: (-changed(path), path))[:MOST_RUNS]


def board(
    runs: Runs,
    show: Collection[str] | None = None,
    have: dict[str, str] | None = None,
    first: float = -math.inf,
    last: float = math.inf,
    over: float | None = None,
    points: int = POINTS,
    seconds: float = math.inf,
    axis: str = "step",
) -> dict[str, Any]:
    """All that a page shows, as JSON: every run by name, with curves those to be shown (None: as `Runs.chosen`).

    `have` names the version of a run that the page has: of the same one there are no curves. Each run is read for about
    `seconds`, and those that are not shown are glanced at for as long in all, first those whose last turn is longest
    ago; one that had none yet has no numbers, and `read` 0. `first` and `last` are of an axis: "step", or a clock.
    """
    found = runs.all()
    chosen = runs.chosen(found) if show is None else [name for name in found if name in show]
    rows, left = {}, seconds
    for name, run in sorted(found.items(), key=lambda item: item[1].seen):
        with run.lock:
            row: dict[str, Any] = {"name": name, "described": run.described(), "trains": run.trains()}
            begun = time.monotonic()
            if name in chosen:
                run.metrics.read(seconds)
                run.seen = begun
                mark = version(run, first, last, over, axis)
                row |= {"read": run.metrics.share, "version": mark}
                if (have or {}).get(name) != mark:
                    row |= {"picture": run.picture(first, last, over, points, axis), "samples": run.samples()}
            elif left > 0:
                run.metrics.glance(left)
                run.seen = begun
                left -= time.monotonic() - begun
            row |= {"numbers": run.numbers()} if run.seen else {"read": 0.0}
        rows[name] = row
    return {"runs": [rows[name] for name in found], "chosen": chosen}


def version(run: Run, *view: float | str | None) -> str:
    """Another one whenever the picture of a run would be."""
    return f"{run.token}.{run.metrics.version}.{mark_of(run.folder / SAMPLES)}.{view}"
