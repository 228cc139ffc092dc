"""A lock on a file: filelock's, signed by the process that holds it, and removed with it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout


class Lock:
    """An exclusive hold on a file. The system releases it when the process ends, in whatever way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path, thread_local=False, poll_interval=0.2, on_acquired=_sign)

    def take(self, wait: bool = False) -> bool:
        """Return whether this process has it now. Raises OSError if the file cannot be made or locked."""
        for _ in range(3):
            try:
                self._lock.acquire(blocking=wait)
            except Timeout:
                if self.path.exists():
                    return False
                continue  # whoever had it removed the file between our opening and our locking it
            return True
        return False

    def holder(self) -> str:
        """Return who has it, as far as the file says."""
        with contextlib.suppress(OSError, ValueError), self.path.open("rb", buffering=0) as file:
            file.seek(1)
            return f"process {int(file.read(20))}"
        return "another process"

    @contextlib.contextmanager
    def waited(self, log: Callable[[str], None], what: str) -> Iterator[None]:
        """Hold it within. `say` prints who is waited for, and `what` they do. Raises OSError as `take` does."""
        if not self.take():
            log(f"waiting for {self.holder()}, which {what}")
            self.take(wait=True)
        try:
            yield
        finally:
            self.drop()

    def drop(self) -> None:
        """Remove the file and release it, in this order: filelock passes over a file that is gone."""
        if self._lock.is_locked:
            with contextlib.suppress(OSError):  # Windows removes no open file; there filelock does, later
                self.path.unlink()
            self._lock.release()


def _sign(file: int) -> None:
    with contextlib.suppress(OSError):  # a full disk: the number is a courtesy
        os.ftruncate(file, 0)
        os.write(file, f"\n{os.getpid()}\n".encode())  # the first byte is what Windows locks, also against reading
