"""Find run folders, check whether they are training, and read their files.

Names sent by a page are only looked up among the runs found here, never used as paths.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ..errors import LlmpyError
from ..run.folder import CONFIG_FILE, LOCK, METRICS, SAMPLES
from ..system.command import command
from ..system.lock import Lock
from ..system.words import did_you_mean
from .curves import Curves, latest

BELOW = Path("runs")  # the default folder of runs
MOST_RUNS = 200  # per folder, the newest
CONFIG_BYTES, SAMPLE_BYTES = 1 << 20, 1 << 16  # read at most; of samples the last bytes
TAIL = 1 << 17  # bytes read for the newest numbers: 450 steps, enough to contain an evaluation
SHOWN_SAMPLES, SAMPLE_LETTERS = 8, 6000
HEADING = re.compile(r"^--- step (\d{1,15})$", re.MULTILINE)
SHOWN_OPTIONS = {
    "model": "", "lora": "LoRA ", "batch_size": "B ", "sequence_length": "T ", "lr": "lr ", "dtype": "",
    "threads": "threads ",
}  # fmt: skip

T = TypeVar("T")


class Run:
    """A run folder; its files are read again only after a change."""

    def __init__(self, folder: Path, index: int) -> None:
        self.folder = folder
        self.index = index  # in order of appearance: picks the colour
        self._known: dict[Any, tuple[Any, Any]] = {}  # reader → state of the file, result

    def _read(self, name: str, reader: Callable[[BinaryIO], T], last: int = 1 << 62) -> T | None:
        """Return the cached result of `reader` on the last bytes of a file; None if it cannot be read."""
        path = self.folder / name
        try:
            if not path.is_file():  # a pipe would block, a device might be endless
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
        """Return whether a process, possibly on another machine, holds its lock."""
        return Lock(self.folder / LOCK).held()

    def described(self) -> str:
        """Return a one-line summary of config.json, or ""."""
        return self._read(CONFIG_FILE, described_in) or ""

    def samples(self) -> list[dict[str, Any]]:
        """Return step and text of the samples, newest first."""
        return self._read(SAMPLES, samples_of, SAMPLE_BYTES) or []

    def numbers(self) -> dict[str, Any]:
        """Return the newest numbers, for a table."""
        return self._read(METRICS, latest, TAIL) or {}

    def curves(self) -> Curves:
        """Return all numbers; empty curves for a run without any."""
        return self._read(METRICS, Curves) or Curves(io.BytesIO())

    def state(self) -> tuple[object, ...]:
        """Return a value that changes with the curves and the samples."""
        return tuple(mark(self.folder / name) for name in (METRICS, SAMPLES))


def described_in(file: BinaryIO) -> str:
    """Return a one-line summary of config.json. Raises ValueError, TypeError or LookupError for an invalid file."""
    config = json.loads(file.read(CONFIG_BYTES))
    values = {**config["options"], **config["machine"]}
    return " · ".join(f"{word}{values[name]}"[:60] for name, word in SHOWN_OPTIONS.items() if name in values)


def samples_of(file: BinaryIO) -> list[dict[str, Any]]:
    """Return the last samples, newest first."""
    pieces = HEADING.split(file.read(SAMPLE_BYTES).decode("utf-8", "replace"))
    last = list(zip(pieces[1::2], pieces[2::2], strict=True))[: -SHOWN_SAMPLES - 1 : -1]
    return [{"step": int(step), "text": text.strip("\n")[:SAMPLE_LETTERS]} for step, text in last]


def mark(path: Path) -> tuple[int, int, int] | None:
    """Return a value that changes with the file; None if it is missing."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def changed(folder: Path) -> float:
    """Return the time of the last change of its metrics, as `time.time`; 0 if there are none."""
    found = mark(folder / METRICS)
    return found[2] / 1e9 if found else 0.0


class Runs:
    """Runs by name, from run folders and folders of runs; new runs in the latter appear by themselves."""

    def __init__(self, given: Sequence[Path]) -> None:
        """Use these folders, or `runs` if there are none. Raises LlmpyError for one without a run."""
        self._given = list(given) or [BELOW]
        self._runs: dict[Path, Run] = {}
        for path in self._given:
            if not has_curves(path) and not children(path):
                near = did_you_mean(str(path), map(str, children(BELOW)))
                hint = near or f"Pass a run folder, or start a run: {command('train')}"
                raise LlmpyError("run.missing", f"no run in {path}", hint)

    def all(self) -> dict[str, Run]:
        """Return name → run: run folders that were given, then those in folders of runs, newest first."""
        paths = [path for path in self._given if has_curves(path) or path in self._runs]
        paths += [child for folder in self._given if folder not in paths for child in children(folder)]
        for path in paths:
            self._runs.setdefault(path, Run(path, len(self._runs)))
        return {"".join(c if c.isprintable() else "\ufffd" for c in str(path)): self._runs[path] for path in paths}

    def chosen(self, runs: dict[str, Run]) -> list[str]:
        """Return the default selection: run folders that were given, runs in training, else the newest run."""
        named = [name for name, run in runs.items() if run.folder in self._given]
        others = [name for name in runs if name not in named]
        return named + ([name for name in others if runs[name].trains()] or ([] if named else others[:1]))


def has_curves(path: Path) -> bool:
    """Return whether the folder holds a run."""
    return any((path / name).is_file() for name in (METRICS, CONFIG_FILE))


def children(folder: Path) -> list[Path]:
    """Return the runs in a folder, newest first."""
    try:
        found = [Path(folder, entry.name) for entry in os.scandir(folder) if entry.is_dir() and has_curves(Path(entry))]
    except OSError:
        return []
    return sorted(found, key=lambda path: (-changed(path), path))[:MOST_RUNS]
