"""The one exception a user ever sees: what is wrong, and what to do about it; and words for such messages."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


class LlmpyError(Exception):
    """A fault of the input or the machine, not of the program; the command line prints it as one line.

    `hint` names the fix and follows the message after a dash. `code` is the exit code of the process.
    """

    code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} — {hint}" if hint else message)


class Diverged(LlmpyError):
    """Training produced numbers that are not finite."""

    code = 3


class Stopped(LlmpyError):
    """A signal ended the program before there was anything to save, or a second one at once."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}")
        self.code = 128 + number


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean …?` with the nearest of the known words, or ""."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}?" if close else ""


def count_of(n: int, one: str, many: str = "") -> str:
    """1 step, 2 steps; `many`: where that is not `one` with an s."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"
