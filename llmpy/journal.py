"""What a run says and records: lines on the terminal and in `main.log`, numbers in `metrics.jsonl`.

On a terminal a progress bar stays below the lines; elsewhere (a log, a pipe) there are only lines. Nothing that
fails here ends a run: a terminal that is gone (a closed window, a reader that left) is printed to no more, and
of a full disk there is one warning.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TextIO

from .errors import LlmpyError


class Journal:
    """The log and the metrics of one run. Until `open` gives them files they are held. A context manager."""

    def __init__(self) -> None:
        self._held = io.StringIO()
        self._log: TextIO = self._held
        self._metrics: TextIO = io.StringIO()
        self._bar: Any = None
        self._gone = False  # the terminal
        self._warned = False  # of a file that cannot be written

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_progress()
        for file in (self._log, self._metrics):
            with contextlib.suppress(OSError):  # a full disk, of which the user was warned
                file.close()

    def open(self, folder: Path) -> None:
        """Start main.log, with all that was said until now, and metrics.jsonl. Neither may exist."""
        try:
            self._log = open(folder / "main.log", "x", encoding="utf-8", errors="replace", buffering=1)  # noqa: SIM115
            self._metrics = open(folder / "metrics.jsonl", "x", encoding="utf-8", buffering=1)  # noqa: SIM115
        except OSError as fault:
            raise LlmpyError(
                f"cannot write {fault.filename}: {fault.strerror}", "choose another folder with --out"
            ) from fault
        self._write(self._log, self._held.getvalue())

    def say(self, line: str = "") -> None:
        """Print a line, above the bar if there is one, and keep it in main.log."""
        self._print(line)
        self._write(self._log, line + "\n")

    def record(self, **numbers: int | float) -> None:
        """One JSON object, one line; it is in the file when this returns."""
        self._write(self._metrics, json.dumps(numbers) + "\n")

    def begin_progress(self) -> None:
        """Show a bar if the output is a terminal."""

        def begin() -> None:
            if sys.stdout.isatty():
                from tqdm import tqdm

                shape = "{percentage:3.0f}% |{bar}| {desc}"
                self._bar = tqdm(total=1.0, bar_format=shape, leave=False, file=sys.stdout, dynamic_ncols=True)

        self._show(begin)

    def progress(self, share: float, text: str) -> None:
        """Move the bar to `share` (0 … 1) of the run, with `text` behind it."""
        if self._bar is not None:
            self._bar.n = min(1.0, share)
            self._show(self._bar.set_description_str, text)

    def end_progress(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            self._show(bar.close)

    def _print(self, line: str) -> None:
        if self._bar is None:
            self._show(lambda: print(line, flush=True))
        else:
            self._show(self._bar.write, line)

    def _show(self, act: Callable[..., object], *arguments: object) -> None:
        """Do what prints. If that fails the terminal is gone, and nothing is shown from then on."""
        if self._gone:
            return
        try:
            act(*arguments)
        except (OSError, ValueError):  # ValueError: a closed file
            self._gone = True
            silence()
            if self._bar is not None:
                self._bar.disable = True  # else it would print once more when it is deleted
                self._bar = None

    def _write(self, file: TextIO, text: str) -> None:
        """Into a file. One that cannot be written is warned of once, and tried again at the next line."""
        try:
            file.write(text)
        except OSError as fault:
            if not self._warned:
                self._warned = True
                self._print(f"warning: cannot write {file.name}: {fault.strerror or fault}; the run goes on")


def silence() -> None:
    """Send standard output nowhere, with what it still holds: else Python's last flush would fail once more."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
