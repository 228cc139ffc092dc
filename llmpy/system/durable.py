"""Atomic, durable file writes: a file is complete or absent, and survives a power failure once written.

Checkpoints reach the disk only through `write`, `sync`, `sync_folder`, `replace`, `link` and `remove`, in this order:
data → sync → rename → sync of the folder. Tests replace these functions to count, fail, truncate or drop each call.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LlmpyError

if TYPE_CHECKING:  # the command line needs this module, and answers --help without NumPy
    import numpy as np

STRETCH = 4 << 20  # bytes of one write and of one checksum
PAGE = 4096  # addresses and lengths of direct I/O must be multiples of it


def write(handle: int, data: np.ndarray) -> None:
    """Write all of `data`, uint8 (n,), at the current position."""
    left = data.data
    while left:
        left = left[os.write(handle, left) :]


def sync(handle: int) -> None:
    """Flush the file's contents to the disk."""
    os.fsync(handle)


def sync_folder(folder: Path) -> None:
    """Flush the folder's entries to the disk."""
    if os.name == "posix":  # Windows cannot open a folder, and its rename needs no second sync
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace(source: Path, target: Path) -> None:
    """Rename `source` to `target`, replacing a file of that name."""
    os.replace(source, target)


def link(source: Path, target: Path) -> None:
    """Make a hard link to a file, or a copy if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        shutil.copyfile(source, target)


def no_link(path: str, flags: int) -> int:
    """Open a file, but not through a symbolic link, and without waiting for the reader of a pipe: an `opener`."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)


def remove(path: Path) -> None:
    """Remove a file, or a folder and its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """Create a folder and its parents; on any error, remove the new ones again if empty. Raises LlmpyError."""
    new = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"cannot create {folder}: {error.strerror}"
            raise LlmpyError("file.unwritable", what, "Choose another folder") from error
        yield
    except BaseException:
        for path in new:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()
        raise


def unwritable(path: Path, error: OSError) -> LlmpyError:
    """Return the error for a file or folder that cannot be written. Libraries report a full disk without a number."""
    what = f"cannot write {path}: {error.strerror or 'the write failed; the disk may be full'}"
    return LlmpyError("file.unwritable", what, "Free some space or choose another folder")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)`, sync, rename, sync the folder. Raises LlmpyError, and leaves `path` as it was."""
    # The name cannot be guessed, so that no link of this name waits for us.
    temporary = path.with_name(f".{path.name}.{int.from_bytes(os.urandom(7))}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:  # Windows syncs only files opened for writing
            sync(file.fileno())
        replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # the folder itself may be missing
            temporary.unlink(missing_ok=True)


def write_stretches(path: Path, pieces: Sequence[np.ndarray]) -> tuple[int, list[int]]:
    """Write `pieces` to a new file, in order, and sync it; return its size in bytes and the CRC-32 of every STRETCH.

    Pieces that start on a page bypass the page cache (O_DIRECT) where supported. Through the cache they would evict
    other data, and the copy costs eighty times the CPU time (dev/LOG.md).
    """
    try:
        return _write_stretches(path, pieces, getattr(os, "O_DIRECT", 0))
    except OSError as error:
        if error.errno != errno.EINVAL:  # the file system lacks O_DIRECT
            raise
        path.unlink(missing_ok=True)
        return _write_stretches(path, pieces, 0)


def _write_stretches(path: Path, pieces: Sequence[np.ndarray], direct: int) -> tuple[int, list[int]]:
    import numpy as np

    sums: list[int] = []
    size = held = 0
    gathered = np.frombuffer(mmap.mmap(-1, STRETCH), np.uint8)  # starts on a page
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | direct, 0o666)
    try:
        for piece in pieces:
            rest = piece.reshape(-1).view(np.uint8)
            size += rest.size
            while rest.size:
                if held == 0 and rest.size >= STRETCH and rest.ctypes.data % PAGE == 0:
                    stretch, rest = rest[:STRETCH], rest[STRETCH:]
                else:
                    part, rest = rest[: STRETCH - held], rest[STRETCH - held :]
                    gathered[held : held + part.size] = part
                    held += part.size
                    if held < STRETCH:
                        continue
                    stretch, held = gathered, 0
                write(handle, stretch)
                sums.append(zlib.crc32(stretch.data))
        if held:
            sums.append(zlib.crc32(gathered[:held].data))
            write(handle, gathered[: -(-held // PAGE) * PAGE])  # whole pages, truncated below
            os.ftruncate(handle, size)
        sync(handle)
    finally:
        os.close(handle)
    return size, sums


def stretches_differ(path: Path, size: int, sums: Sequence[int]) -> str:
    """Compare a file with the results of `write_stretches`; return the error, or "". Raises OSError."""
    found = path.stat().st_size
    if found != size:
        return f"it has {found:,} bytes instead of {size:,}"
    buffer = bytearray(min(STRETCH, size))
    with path.open("rb") as file:  # buffered, so that a read that returns fewer bytes is continued
        for number, expected in enumerate(sums):
            count = file.readinto(buffer)
            if zlib.crc32(memoryview(buffer)[:count]) != expected:
                return f"its checksum differs in the block at byte {number * STRETCH:,}"
    return ""
