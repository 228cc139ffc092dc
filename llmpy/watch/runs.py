"""The runs that are watched: where they are, whether they train, and what they wrote.

A name that a page sends is only ever looked up among the runs that were found, so that no path comes from outside.
"""

from __future__ import annotations

import io
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import psutil

from ..errors import LlmpyError
from ..run.folder import CONFIG_FILE, LOCK, METRICS, SAMPLES
from ..system.command import command
from ..system.words import did_you_mean
from .curves import Curves, latest

BELOW = Path("runs")  # where runs are sought when none is named
MOST_RUNS = 200  # of a folder of runs, the newest
CONFIG_BYTES, SAMPLE_BYTES = 1 << 20, 1 << 16  # that are read, of samples the last ones
TAIL = 1 << 17  # bytes that hold the newest numbers: 450 steps, so that an evaluation is among them
SHOWN_SAMPLES, SAMPLE_LETTERS = 8, 6000
ALIVE_SECONDS = 10.0  # a run whose process is not known here trains if its metrics grew since
HEADING = re.compile(r"^--- step (\d{1,15})$", re.MULTILINE)
SHOWN_OPTIONS = {
    "model": "", "batch_size": "B ", "sequence_length": "T ", "lr": "lr ", "dtype": "", "threads": "threads ",
}  # fmt: skip

T = TypeVar("T")


class Run:
    """A run folder, of which files are read again only when they have changed."""

    def __init__(self, folder: Path, index: int) -> None:
        self.folder = folder
        self.index = index  # in order of appearance: picks the colour
        self._known: dict[Any, tuple[Any, Any]] = {}  # reader → state of the file, what was read

    def _read(self, name: str, reader: Callable[[BinaryIO], T], last: int = 1 << 62) -> T | None:
        """What `reader` made of the last bytes of a file in its present state; None if that cannot be read."""
        path = self.folder / name
        try:
            if not path.is_file():  # a pipe would hang, a device never end
                return None
            state = mark(path)
            if reader not in self._known or self._known[reader][0] != state:
                with path.open("rb") as file:
                    file.seek(max(0, file.seek(0, os.SEEK_END) - last))
                    self._known[reader] = state, reader(file)
            value: T = self._known[reader][1]
            return value
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            return None

    def trains(self) -> bool:
        """Whether a process trains it: one that holds its lock, or, on another machine, seems to."""
        process = self._read(LOCK, process_of)
        return process is not None and (
            psutil.pid_exists(process) or abs(time.time() - changed(self.folder)) < ALIVE_SECONDS
        )

    def described(self) -> str:
        """What is trained, in a line, as far as config.json says it."""
        return self._read(CONFIG_FILE, described_in) or ""

    def samples(self) -> list[dict[str, Any]]:
        """What the model wrote, newest first: the step and the text."""
        return self._read(SAMPLES, samples_of, SAMPLE_BYTES) or []

    def numbers(self) -> dict[str, Any]:
        """The newest numbers, for a table."""
        return self._read(METRICS, latest, TAIL) or {}

    def curves(self) -> Curves:
        """All numbers; of a run without any, none."""
        return self._read(METRICS, Curves) or Curves(io.BytesIO())

    def state(self) -> tuple[object, ...]:
        """Differs whenever the curves or the samples do."""
        return tuple(mark(self.folder / name) for name in (METRICS, SAMPLES))


def process_of(lock: BinaryIO) -> int:
    """Return the process that holds a lock. Raises ValueError if it names none."""
    return int(lock.read(9))


def described_in(file: BinaryIO) -> str:
    """What config.json says of a run. Raises TypeError or LookupError if it has another form."""
    config = json.loads(file.read(CONFIG_BYTES))
    told = {**config["options"], **config["machine"]}
    return " · ".join(f"{word}{told[name]}"[:60] for name, word in SHOWN_OPTIONS.items() if name in told)


def samples_of(file: BinaryIO) -> list[dict[str, Any]]:
    """The last samples, newest first."""
    pieces = HEADING.split(file.read(SAMPLE_BYTES).decode("utf-8", "replace"))
    last = list(zip(pieces[1::2], pieces[2::2], strict=True))[: -SHOWN_SAMPLES - 1 : -1]
    return [{"step": int(step), "text": text.strip("\n")[:SAMPLE_LETTERS]} for step, text in last]


def mark(path: Path) -> tuple[int, int, int] | None:
    """Differs whenever the file does; None if it is missing."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def changed(folder: Path) -> float:
    """When its metrics grew last, in seconds as `time.time`; 0 if there are none."""
    found = mark(folder / METRICS)
    return found[2] / 1e9 if found else 0.0


class Runs:
    """Runs by name: those that were given, and those in folders of runs that were given, also as more start there."""

    def __init__(self, given: Sequence[Path]) -> None:
        """Raises LlmpyError for one that is neither; none given: those below `runs`."""
        self._given = list(given) or [BELOW]
        self._runs: dict[Path, Run] = {}
        for path in self._given:
            if not has_curves(path) and not children(path):
                near = did_you_mean(str(path), map(str, children(BELOW)))
                raise LlmpyError(
                    "watch.x", f"no run in {path}", near or f"name a run's folder, or start one: {command('train')}"
                )

    def all(self) -> dict[str, Run]:
        """Name → run: first those that were named, then the newest."""
        paths = [path for path in self._given if has_curves(path) or path in self._runs]
        paths += [child for folder in self._given if folder not in paths for child in children(folder)]
        for path in paths:
            self._runs.setdefault(path, Run(path, len(self._runs)))
        # names do nothing to a terminal
        return {"".join(c if c.isprintable() else "\ufffd" for c in str(path)): self._runs[path] for path in paths}

    def chosen(self, runs: dict[str, Run]) -> list[str]:
        """The names to show if none is asked for: those named, and of folders those that train, or the newest."""
        named = [name for name, run in runs.items() if run.folder in self._given]
        others = [name for name in runs if name not in named]
        return named + ([name for name in others if runs[name].trains()] or ([] if named else others[:1]))


def has_curves(path: Path) -> bool:
    """Return whether there is something of a run to show."""
    return any((path / name).is_file() for name in (METRICS, CONFIG_FILE))


def children(folder: Path) -> list[Path]:
    """The runs in a folder, newest first."""
    try:
        found = [Path(folder, entry.name) for entry in os.scandir(folder) if entry.is_dir() and has_curves(Path(entry))]
    except OSError:
        return []
    return sorted(found, key=lambda path: (-changed(path), path))[:MOST_RUNS]
