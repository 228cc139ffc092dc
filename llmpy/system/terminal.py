"""Color on terminals (not "dumb" ones, and not if NO_COLOR is set, see no-color.org), and lines for stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO

STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


def coloured(stream: TextIO) -> bool:
    """Return whether `stream` shows color."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and stream.isatty()


def paint(text: str, style: str, stream: TextIO) -> str:
    """Return `text` in one of STYLES if `stream` shows color, else unchanged."""
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if coloured(stream) else text


def silence() -> None:
    """Redirect standard output and its buffer to devnull, so that Python's flush at exit cannot fail again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def aside(line: str) -> None:
    """Print a line to stderr, apart from the output."""
    print(line, file=sys.stderr, flush=True)
