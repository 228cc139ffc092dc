"""The one exception a user ever sees: what is wrong, and what to do about it."""

from __future__ import annotations


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
