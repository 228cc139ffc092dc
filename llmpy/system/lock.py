"""A lock on a file, which the system releases when the process ends."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import LlmpyError

PATIENCE = 0.2  # seconds between two looks at a lock that is waited for


class InUse(LlmpyError):
    """Another process is training in this folder."""


class Lock:
    """An exclusive hold on a file, which the system lets go when the process ends, in whatever way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def take(self) -> bool:
        """Whether this process has it now. Raises OSError if the file cannot be made or locked."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                held = _hold(file)
            except OSError:
                os.close(file)
                raise
            if not held:
                os.close(file)
                return False
            if _is(file, self.path):
                self._file = file
                os.ftruncate(file, 0)
                os.write(file, f"{os.getpid()}\n".encode())
                return True
            os.close(file)  # whoever had it removed the file between the two calls

    def holder(self) -> str:
        """Who has it, as far as the file says."""
        try:
            return f"process {int(self.path.read_text())}"
        except (OSError, ValueError):
            return "another process"

    @contextlib.contextmanager
    def waited(self, say: Callable[[str], None], what: str) -> Iterator[None]:
        """Within, this process has it. Whoever has it is waited for: `say` tells who, and `what` they do.

        Raises OSError as `take` does.
        """
        told = False
        while not self.take():
            if not told:
                say(f"waiting for {self.holder()}, which {what}")
            told = True
            time.sleep(PATIENCE)
        try:
            yield
        finally:
            self.drop()

    def drop(self) -> None:
        """Let it go."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # Windows removes no open file
                self.path.unlink()
            os.close(self._file)
            self._file = None


def _hold(file: int) -> bool:
    """Take the system's lock on an open file if nobody has it. Raises OSError where the file system has no locks."""
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            os.lseek(file, 1 << 30, os.SEEK_SET)  # a byte beyond the text, which others may read
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
            os.lseek(file, 0, os.SEEK_SET)
    except (BlockingIOError, PermissionError):  # the latter: Windows
        return False
    return True


def _is(file: int, path: Path) -> bool:
    """Whether the open file still has that name."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
