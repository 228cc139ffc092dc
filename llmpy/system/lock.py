"""A lock file that names the process holding it and is removed on release."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from ..errors import LlmpyError
from .durable import no_link
from .terminal import aside

UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # network file systems without a lock service


class Lock:
    """An exclusive lock on a file. The system releases it when the process ends, even if killed.

    If the file system has no locks, a file that names process and machine, PATH.held, takes its place. One of a dead
    process of this machine is ignored; one of another machine must be removed by hand if its process was killed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held = path.with_name(f"{path.name}.held")
        self._lock: BaseFileLock = FileLock(path, thread_local=False, poll_interval=0.2, on_acquired=_sign)

    def take(self, wait: bool = False) -> bool:
        """Acquire the lock; return whether this process has it. Raises OSError if the file cannot be locked."""
        if self.path.is_symlink():  # filelock refuses it too, as "Too many levels"
            raise LlmpyError("lock.symlink", f"the lock {self.path} is a symbolic link", "Remove it")
        for again in range(3):
            try:
                self._lock.acquire(blocking=wait)
            except Timeout:
                if self._lock.lock_file != str(self.path) or (again and self.path.exists()):
                    return False
                time.sleep(0.01)  # `held` may have it for a moment, or the holder removed the file after we opened it
                continue
            except (OSError, NotImplementedError) as error:
                if self._lock.lock_file != str(self.path) or getattr(error, "errno", errno.ENOSYS) not in UNSUPPORTED:
                    raise
                aside(f"warning: {self.path.parent} is on a file system without locks; using {self._held.name} instead")
                self._lock = SoftFileLock(self._held, thread_local=False, poll_interval=0.2)
                continue
            return True
        return False

    def held(self) -> bool:
        """Return whether any process holds the lock, without changing it; False if that cannot be found."""
        with contextlib.suppress(OSError), open(self.path, "rb", 0, opener=no_link) as file:
            try:
                if os.name == "posix":
                    import fcntl

                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                file.read(1)  # Windows locks this byte
            except (BlockingIOError, PermissionError):
                return True
        return False

    def holder(self) -> str:
        """Return the process that holds the lock, as named in the file."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            pid, host = self._held.read_text("utf-8").splitlines()[:2]
            return f"process {int(pid)} on {host} (if it has ended, remove {self._held})"
        with contextlib.suppress(OSError, ValueError), self.path.open("rb", buffering=0) as file:
            file.seek(1)
            return f"process {int(file.read(20))}"
        return "another process"

    @contextlib.contextmanager
    def waited(self, log: Callable[[str], None], what: str) -> Iterator[None]:
        """Hold the lock within, waiting if necessary; `what` the holder does is logged. Raises OSError as `take`."""
        if not self.take():
            log(f"waiting for {self.holder()}, which {what}")
            self.take(wait=True)
        try:
            yield
        finally:
            self.drop()

    def drop(self) -> None:
        """Remove the file, then release the lock: filelock ignores a missing file."""
        if self._lock.is_locked:
            with contextlib.suppress(OSError):  # Windows cannot remove an open file; filelock does so later
                self.path.unlink()
            self._lock.release()


def _sign(file: int) -> None:
    with contextlib.suppress(OSError):  # a full disk: the number is optional
        os.ftruncate(file, 0)
        os.write(file, f"\n{os.getpid()}\n".encode())  # Windows locks the first byte, also against reading
