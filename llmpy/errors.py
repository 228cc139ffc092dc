"""The exceptions for users: what is wrong, how to fix it, and a stable code."""

from __future__ import annotations

import signal
from pathlib import Path


class LlmpyError(Exception):
    """An error in the input or the machine, not in the program; the command line prints it on one line.

    `code` (`data.not-utf8`) is stable. `message` states the problem, `hint` the fix. `exit_code` is the process's.
    """

    exit_code = 1

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(f"{message}. {hint}" if hint else message)
        self.code, self.message, self.hint = code, message, hint


class Diverged(LlmpyError):
    """A training run with numbers that are not finite."""

    exit_code = 3


class Stopped(LlmpyError):
    """A signal before there was anything to save, or a second signal."""

    def __init__(self, number: int) -> None:
        super().__init__(
            "stopped", f"stopped by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}"
        )
        self.exit_code = 128 + number


def unreadable(path: Path, error: OSError) -> LlmpyError:
    """Return the error for a file that the system cannot read."""
    return LlmpyError(
        "file.unreadable", f"cannot read {path}: {error.strerror or error}", "Check the path and its permissions"
    )
