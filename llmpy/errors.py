"""The one exception a user ever sees: what is wrong, and what to do about it; and words for such messages."""

from __future__ import annotations

import signal
from pathlib import Path


class LlmpyError(Exception):
    """An error of the input or the machine, not of the program; the command line prints it as one line.

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


def unreadable(path: Path, fault: OSError) -> LlmpyError:
    """Return what to raise for a file that the system does not give us."""
    return LlmpyError(f"cannot read {path}: {fault.strerror or fault}", "check the path and its permissions")
