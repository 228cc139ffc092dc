"""Color on terminals (not "dumb" ones, and not if NO_COLOR is set, see no-color.org), and text that is safe on them."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from typing import TextIO

STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}

# C0 (without tab), C1, line separators and overrides of the writing direction: they act on a terminal or hide text.
UNPRINTABLE = re.compile("[\0-\x08\n-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def printable(line: str) -> str:
    """Return a line with control characters escaped, as \\x1b."""
    return UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], line)


def generated(text: str) -> str:
    """Return a model's text for standard output: exact, but `printable` lines on a terminal."""
    return "\n".join(map(printable, text.split("\n"))) if sys.stdout.isatty() else text


def coloured(stream: TextIO) -> bool:
    """Return whether `stream` shows color."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and stream.isatty()


def paint(text: str, style: str, stream: TextIO) -> str:
    """Return `text` in one of STYLES if `stream` shows color, else unchanged, as for the style ""."""
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if style and coloured(stream) else text


def silence() -> None:
    """Redirect standard output and its buffer to devnull, so that Python's flush at exit cannot fail again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def aside(line: str, style: str = "") -> None:
    """Print a line to stderr, apart from the output."""
    print(paint(printable(line), style, sys.stderr), file=sys.stderr, flush=True)
