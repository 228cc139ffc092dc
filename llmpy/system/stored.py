"""Arrays in files, read when they are sliced."""

from __future__ import annotations

import copy
import os
import threading
import weakref
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..errors import LlmpyError, unreadable

_SEEKING = threading.Lock()


class Stored:
    """Values (n,) in a file. A slice is read, as a new array.

    Mapped memory would end the process by SIGBUS if the file shrinks or the disk fails; this raises LlmpyError. The
    file stays open: removing or replacing it changes nothing.
    """

    def __init__(self, path: Path, dtype: Any, offset: int, size: int) -> None:
        """Raises OSError if the file cannot be opened."""
        self.path, self.dtype, self._offset, self._size = path, np.dtype(dtype), offset, size
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._handle)

    def __len__(self) -> int:
        return self._size

    def part(self, start: int, stop: int) -> Self:
        """Return values [start, stop) without reading them."""
        part = copy.copy(self)
        part._offset, part._size = self._offset + start * self.dtype.itemsize, stop - start
        part._whole = self  # type: ignore[attr-defined]  # keeps the file open
        return part

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, _ = where.indices(self._size)
        out = np.empty(max(0, stop - start), self.dtype)
        self.read(start, out)
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def read(self, start: int, out: np.ndarray) -> None:
        """Read values from `start` on into all of `out`: contiguous, of this dtype. Raises LlmpyError."""
        assert out.dtype == self.dtype
        rest, at = out.view(np.uint8), self._offset + start * self.dtype.itemsize
        try:
            while rest.size:  # network file systems may return fewer bytes than requested
                if not (count := _read(self._handle, rest, at)):
                    what = f"{self.path} became shorter while in use: it ends before byte {at + rest.size:,}"
                    raise LlmpyError("file.changed", what, "Restore it, then resume or start again")
                rest, at = rest[count:], at + count
        except OSError as error:
            raise unreadable(self.path, error) from error


def _read(handle: int, out: np.ndarray, at: int) -> int:
    """Read at most out.size bytes at an offset; return their number, 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(handle, [out.data], at)
    with _SEEKING:  # Windows
        os.lseek(handle, at, os.SEEK_SET)
        data = os.read(handle, out.size)
    out[: len(data)] = np.frombuffer(data, np.uint8)
    return len(data)
