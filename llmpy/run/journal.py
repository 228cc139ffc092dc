"""What a run says and records.

the terminal and console.log   lines for people                    metrics.jsonl   every number, a JSON object a line
main.log                       llm.c's lines, for its readers      samples.txt     what the model wrote

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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TextIO, cast

from ..errors import LlmpyError
from ..system import durable
from ..system.terminal import silence
from .folder import CONSOLE, LOGS, MAIN, METRICS, SAMPLES


class Journal:
    """The logs and the metrics of one run. Until `open` gives them files they are held. A context manager."""

    def __init__(self) -> None:
        self._console: TextIO = io.StringIO()
        self._files: dict[str, TextIO] = {}  # METRICS, MAIN, SAMPLES
        self._bar: Any = None
        self._gone = False  # the terminal
        self._warned = False  # of a file that cannot be written

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_progress()
        for file in (self._console, *self._files.values()):
            with contextlib.suppress(OSError):  # a full disk, of which the user was warned
                file.close()

    def open(self, folder: Path, sizes: Mapping[str, int] | None = None) -> None:
        """Start the files; console.log with all that was said until now.

        None of them may exist; but of a resumed run, `sizes` holds the bytes of each one that remain, and console.log
        keeps all of them. Raises LlmpyError if one cannot be written.
        """
        try:
            for name in LOGS:
                file = self._files[name] = _lines(folder / name, sizes is None)
                if sizes is not None:
                    file.truncate(min(os.fstat(file.fileno()).st_size, sizes.get(name, 0)))
            held, self._console = cast(io.StringIO, self._console), _lines(folder / CONSOLE, sizes is None)
        except OSError as error:
            raise LlmpyError(
                "run.x", f"cannot write {error.filename}: {error.strerror}", "Choose another --out"
            ) from error
        self._write(self._console, held.getvalue())

    def sizes(self) -> dict[str, int]:
        """Bytes of each file of numbers or samples as of now, for `open`."""
        return {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}

    def sync(self) -> None:
        """Wait until these are on the disk. Raises OSError if that fails; may run beside all else."""
        for file in self._files.values():
            durable.sync(file.fileno())

    def log(self, line: str = "") -> None:
        """Print a line, above the bar if there is one, and keep it in console.log."""
        self._print(line)
        self._write(self._console, line + "\n")

    def record(self, **numbers: Any) -> None:
        """One JSON object, one line of metrics.jsonl; it is in the file when this returns."""
        self._keep(METRICS, json.dumps(numbers) + "\n")

    def record_llmc(self, line: str) -> None:
        """One line of main.log."""
        self._keep(MAIN, line + "\n")

    def record_sample(self, heading: str, text: str) -> None:
        """What the model wrote, into samples.txt."""
        self._keep(SAMPLES, f"{heading}\n{text}\n\n")

    def _keep(self, name: str, text: str) -> None:
        if name in self._files:
            self._write(self._files[name], text)

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
        except OSError as error:
            if not self._warned:
                self._warned = True
                self._print(f"warning: cannot write {file.name}: {error.strerror or error}; the run goes on")


def _lines(path: Path, new: bool) -> TextIO:
    """A file that every line reaches at once; `new`: that must not exist, else to append to."""
    file: Any = open(path, "x" if new else "a", encoding="utf-8", errors="replace", newline="\n", buffering=1)  # noqa: SIM115
    return cast(TextIO, file)
