"""Files that are written whole or not at all, and that survive a power cut once written.

Whatever a run must not lose reaches the disk by the operations `write`, `sync`, `sync_folder`, `replace`, `link` and
`remove` alone, in this order: data → sync → rename → sync of the folder. A test that replaces them can count, fail, cut
off or forget each one.
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
PAGE = 4096  # what direct input and output wants addresses and lengths to be multiples of


def write(handle: int, data: np.ndarray) -> None:
    """Write all of `data`, uint8 (n,), at the file's place."""
    left = data.data
    while left:
        left = left[os.write(handle, left) :]


def sync(handle: int) -> None:
    """Wait until the file's contents are on the disk."""
    os.fsync(handle)


def sync_folder(folder: Path) -> None:
    """Wait until the folder's names are on the disk."""
    if os.name == "posix":  # Windows opens no folder; its rename needs no second sync
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace(source: Path, target: Path) -> None:
    """Give `source` the name `target`, in place of the file that had it."""
    os.replace(source, target)


def link(source: Path, target: Path) -> None:
    """Make a second name for a file; a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        shutil.copyfile(source, target)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder; if that or what is within fails, remove those made for it. Raises LlmpyError if making does."""
    new = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LlmpyError("system.x", f"cannot make {folder}: {error.strerror}", "Choose another folder") from error
        yield
    except BaseException:
        for path in new:
            with contextlib.suppress(OSError):  # not empty: let it be
                path.rmdir()
        raise


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)`, then sync, rename, sync the folder. Raises LlmpyError; what was at `path` then stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:  # Windows syncs only what may be written
            sync(file.fileno())
        replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        what = f"cannot write {path}: {error.strerror or error}"
        raise LlmpyError("system.x", what, "Free some space or choose another folder") from error
    finally:
        with contextlib.suppress(OSError):  # the folder itself may be what is wrong
            temporary.unlink(missing_ok=True)


def write_stretches(path: Path, pieces: Sequence[np.ndarray]) -> tuple[int, list[int]]:
    """Write a new file of `pieces`, one after another, and sync it; return its bytes and the CRC-32 of every STRETCH.

    Pieces that start on a page go to the disk past the system's cache where it can do that: what is written once and
    not read soon would only push out other things, and the copy costs eighty times the processor time (dev/LOG.md).
    """
    try:
        return _write_stretches(path, pieces, getattr(os, "O_DIRECT", 0))
    except OSError as error:
        if error.errno != errno.EINVAL:  # how a file system says that it has no such thing
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
            write(handle, gathered[: -(-held // PAGE) * PAGE])  # whole pages, cut to the size below
            os.ftruncate(handle, size)
        sync(handle)
    finally:
        os.close(handle)
    return size, sums


def stretches_differ(path: Path, size: int, sums: Sequence[int]) -> str:
    """Return what is wrong with a file that `write_stretches` wrote, or "". Raises OSError if it cannot be read."""
    found = path.stat().st_size
    if found != size:
        return f"it has {found:,} bytes instead of {size:,}"
    buffer = bytearray(min(STRETCH, size))
    with path.open("rb", buffering=0) as file:
        for number, expected in enumerate(sums):
            count = file.readinto(buffer)
            if zlib.crc32(memoryview(buffer)[:count]) != expected:
                return f"its bytes from {number * STRETCH:,} on are not those that were written"
    return ""
