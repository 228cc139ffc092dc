"""The exceptions for users: what is wrong, how to fix it, and a stable code."""

from __future__ import annotations

import os
import signal
import traceback
from pathlib import Path
from typing import Any


class LlmpyError(Exception):
    """An error in the input or the machine, not in the program; the command line prints it on one line.

    `code` (`data.not-utf8`) is stable. `message` states the problem, `hint` the fix. `exit_code` is the process's.
    """

    exit_code = 1

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        message = " ".join(message.splitlines()).rstrip(". ")  # of files and libraries: several lines, a full stop
        super().__init__(f"{message}. {hint}" if hint else message)
        self.code, self.message, self.hint = code, message, hint

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy without calling __init__, whose arguments differ between subclasses."""
        return Exception.__new__, (type(self), *self.args), self.__dict__


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


def unusable_library(error: BaseException) -> LlmpyError | None:
    """Return the error if `error` comes from the import of a library, mostly for an environment variable, else None."""
    frames = (
        frame.f_globals for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"
    )
    name = next((n for f in frames if (n := f["__name__"].split(".")[0]) not in ("llmpy", "__main__")), "")
    if not name or not isinstance(error, Exception) or isinstance(error, LlmpyError):
        return None
    if found := " ".join(f"{key}={value}" for key, value in os.environ.items() if value and repr(value) in str(error)):
        return LlmpyError("environment.invalid", f"{name} cannot be used with {found}", "Correct or unset it")
    what = f"{name} cannot be imported: {type(error).__name__}: {error}"
    return LlmpyError("package.unusable", what, "Install it again, or check its settings and environment variables")


def unreadable(path: Path, error: OSError) -> LlmpyError:
    """Return the error for a file that the system cannot read."""
    if isinstance(error, FileNotFoundError):
        return LlmpyError("file.missing", f"cannot read {path}: {error.strerror}", "Check the path")
    return LlmpyError(
        "file.unreadable", f"cannot read {path}: {error.strerror or error}", "Check the path and its permissions"
    )
