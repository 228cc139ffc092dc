"""Arrays in files, read when they are sliced."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LlmpyError, unreadable


class Stored:
    """Values (n,) in a file, read when they are sliced. The file stays open: removing or replacing it changes nothing.

    Mapped memory would end the process by SIGBUS if the file shrinks or the disk fails; this raises LlmpyError.
    """

    def __init__(self, path: Path, dtype: Any, offset: int, size: int) -> None:
        """Raises OSError if the file cannot be opened."""
        self.path, self.dtype, self._offset, self._size = path, np.dtype(dtype), offset, size
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._handle)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, _ = where.indices(self._size)
        out = np.empty(max(0, stop - start), self.dtype)
        self.read(start, out)
        return out

    def part(self, start: int, stop: int) -> Stored:
        """Return values [start, stop) without reading them."""
        return Stored(self.path, self.dtype, self._offset + start * self.dtype.itemsize, stop - start)

    def read(self, start: int, out: np.ndarray) -> None:
        """Read values from `start` on into all of `out`: contiguous, of this dtype. Raises LlmpyError."""
        assert out.dtype == self.dtype
        rest, at = out.view(np.uint8), self._offset + start * self.dtype.itemsize
        try:
            while rest.size:  # network file systems may return fewer bytes than requested
                if hasattr(os, "preadv"):
                    count = os.preadv(self._handle, [rest.data], at)
                else:  # Windows, where an open file cannot be replaced
                    count = len(data := np.fromfile(self.path, np.uint8, rest.size, offset=at))
                    rest[:count] = data
                if not count:
                    what = f"{self.path} became shorter while in use: it ends before byte {at + rest.size:,}"
                    raise LlmpyError("file.changed", what, "Restore it, then resume or start again")
                rest, at = rest[count:], at + count
        except OSError as error:
            raise unreadable(self.path, error) from error
