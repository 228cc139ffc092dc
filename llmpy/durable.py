"""Files that are written whole or not at all, and that survive a power cut once written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from .errors import LlmpyError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary)` beside `path`, then fsync, rename, and fsync of the folder.

    Raises LlmpyError if the disk refuses; what was there stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        put_in_place(temporary, path)
    except OSError as fault:
        raise LlmpyError(
            f"cannot write {path}: {fault.strerror or fault}", "free some space or choose another folder"
        ) from fault
    finally:
        temporary.unlink(missing_ok=True)


def put_in_place(temporary: Path, path: Path) -> None:
    """fsync, rename, and fsync of the folder. OSError if the disk refuses; what was there stays."""
    _sync(temporary, os.O_RDWR)  # Windows syncs only what may be written
    os.replace(temporary, path)
    if os.name == "posix":  # Windows opens no folder; its rename needs no second sync
        _sync(path.parent, os.O_RDONLY)


def _sync(path: Path, mode: int) -> None:
    handle = os.open(path, mode)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
