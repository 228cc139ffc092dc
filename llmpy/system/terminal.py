"""Colour, which a terminal shows and a file does not, and lines for stderr.

Only where a person looks (a terminal that is not "dumb"), and not with NO_COLOR in the environment (no-color.org).
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO

STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


def coloured(stream: TextIO) -> bool:
    """Return whether `stream` shows colour."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and stream.isatty()


def paint(text: str, style: str, stream: TextIO) -> str:
    """Return `text` in one of STYLES where `stream` shows colour, else as it is."""
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if coloured(stream) else text


def silence() -> None:
    """Send standard output nowhere, with what it still holds: else Python's last flush would fail once more."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def aside(line: str) -> None:
    """Print what is no part of the output to stderr."""
    print(line, file=sys.stderr, flush=True)
