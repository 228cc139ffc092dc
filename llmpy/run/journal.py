"""Output and logs of a run: see folder.py for the files.

On a terminal a progress bar stays below the lines; a file or pipe gets only the lines. No error here ends a run. If
the terminal is gone (closed window, closed pipe), nothing more is printed. A full disk causes one warning.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TextIO, cast

from ..errors import LlmpyError
from ..system import durable
from ..system.terminal import silence
from .folder import CONSOLE, LOGS, MAIN, METRICS, SAMPLES


class Journal:
    """The logs of one run, a context manager. Until `open`, lines are buffered."""

    def __init__(self) -> None:
        self._console: TextIO = io.StringIO()
        self._files: dict[str, TextIO] = {}  # METRICS, MAIN, SAMPLES
        self._bar: Any = None
        self._gone = False  # the terminal
        self._warned = False  # that a file cannot be written

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_progress()
        for file in (self._console, *self._files.values()):
            with contextlib.suppress(OSError):  # a full disk, already warned of
                file.close()

    def open(self, folder: Path, sizes: Mapping[str, int] | None = None) -> None:
        """Create the log files; of a resumed run, truncate them to `sizes` (bytes). Raises LlmpyError."""
        try:
            for name in LOGS:
                file = self._files[name] = _lines(folder / name, sizes is None)
                if sizes is not None:
                    file.truncate(min(os.fstat(file.fileno()).st_size, sizes.get(name, 0)))
            held, self._console = cast(io.StringIO, self._console), _lines(folder / CONSOLE, sizes is None)
        except OSError as error:
            what = f"cannot write {error.filename}: {error.strerror}"
            raise LlmpyError("file.unwritable", what, "Choose another --out") from error
        self._write(self._console, held.getvalue())

    def sizes(self) -> dict[str, int]:
        """Return the current bytes of metrics.jsonl, main.log and samples.txt, for `open`."""
        return {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}

    def sync(self) -> None:
        """Sync these files to disk. Raises OSError. Thread-safe."""
        for file in self._files.values():
            durable.sync(file.fileno())

    def log(self, line: str = "") -> None:
        """Print a line, above the progress bar, and append it to console.log."""
        self._print(line)
        self._write(self._console, line + "\n")

    def record(self, **numbers: Any) -> None:
        """Append one line to metrics.jsonl, unbuffered."""
        self._keep(METRICS, json.dumps(numbers) + "\n")

    def record_llmc(self, line: str) -> None:
        """Append one line to main.log."""
        self._keep(MAIN, line + "\n")

    def record_sample(self, heading: str, text: str) -> None:
        """Append a sample to samples.txt."""
        self._keep(SAMPLES, f"{heading}\n{text}\n\n")

    def _keep(self, name: str, text: str) -> None:
        if name in self._files:
            self._write(self._files[name], text)

    def begin_progress(self) -> None:
        """Show a progress bar if the output is a terminal."""

        def begin() -> None:
            if sys.stdout.isatty():
                from tqdm import tqdm

                shape = "{percentage:3.0f}% |{bar}| {desc}"
                self._bar = tqdm(total=1.0, bar_format=shape, leave=False, file=sys.stdout, dynamic_ncols=True)

        self._show(begin)

    def progress(self, share: float, text: str) -> None:
        """Move the bar to `share` (0 … 1), followed by `text`."""
        if self._bar is not None:
            self._bar.n = min(1.0, share)
            self._show(self._bar.set_description_str, text)

    def end_progress(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            self._show(bar.close)

    def _print(self, line: str) -> None:
        if self._bar is None:
            self._show(lambda: print(line, flush=True))
        else:
            self._show(self._bar.write, line)

    def _show(self, act: Callable[..., object], *arguments: object) -> None:
        """Call a function that prints. If it fails, the terminal is gone: print nothing from then on."""
        if self._gone:
            return
        try:
            act(*arguments)
        except (OSError, ValueError):  # ValueError: closed file
            self._gone = True
            silence()
            if self._bar is not None:
                self._bar.disable = True  # else it prints when it is deleted
                self._bar = None

    def _write(self, file: TextIO, text: str) -> None:
        """Write to a file. Warn of the first failure only; later lines try again."""
        try:
            file.write(text)
        except OSError as error:
            if not self._warned:
                self._warned = True
                self._print(f"warning: cannot write {file.name}: {error.strerror or error}; training continues")


def _lines(path: Path, new: bool) -> TextIO:
    """Open a line-buffered file, `new` or to append to."""
    file: Any = open(path, "x" if new else "a", encoding="utf-8", errors="replace", newline="\n", buffering=1)  # noqa: SIM115
    return cast(TextIO, file)
