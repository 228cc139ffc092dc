"""What a run says and records: lines on the terminal and in `main.log`, numbers in `metrics.jsonl`.

On a terminal a progress bar stays below the lines; elsewhere (a log, a pipe) there are only lines.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Self


class Journal:
    """The open log and metrics of one run, started anew. A context manager."""

    def __init__(self, folder: Path) -> None:
        self._log = open(folder / "main.log", "w", encoding="utf-8", buffering=1)  # noqa: SIM115  # closed in __exit__
        self._metrics = open(folder / "metrics.jsonl", "w", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_progress()
        self._log.close()
        self._metrics.close()

    def say(self, line: str = "") -> None:
        """Print a line, above the bar if there is one, and keep it in main.log."""
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.write(line)
        self._log.write(line + "\n")

    def record(self, **numbers: int | float) -> None:
        """One JSON object, one line; it is in the file when this returns."""
        self._metrics.write(json.dumps(numbers) + "\n")

    def begin_progress(self) -> None:
        """Show a bar if the output is a terminal."""
        if sys.stdout.isatty():
            from tqdm import tqdm

            shape = "{percentage:3.0f}% |{bar}| {desc}"
            self._bar = tqdm(total=1.0, bar_format=shape, leave=False, file=sys.stdout, dynamic_ncols=True)

    def progress(self, share: float, text: str) -> None:
        """Move the bar to `share` (0 … 1) of the run, with `text` behind it."""
        if self._bar is not None:
            self._bar.n = min(1.0, share)
            self._bar.set_description_str(text)

    def end_progress(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
