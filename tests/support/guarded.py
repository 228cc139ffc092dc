"""Operation calls with guards around every array, and bitwise comparison."""

from __future__ import annotations

from typing import Any

import numpy as np
from support.cases import Call

GUARD = 67  # elements on either side of every array; odd, so that arrays are not aligned to vectors
CANARY = 12345.0


def bits(x: np.ndarray) -> np.ndarray:
    """Return x as bytes: NaN equals itself, and 0 differs from −0."""
    return np.ascontiguousarray(x).view(np.uint8)


def guarded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a copy of x between canaries, and the whole buffer; x starts GUARD elements past a cache line."""
    buffer = np.full(x.size + 2 * GUARD, canary(x.dtype), x.dtype)
    buffer[GUARD : GUARD + x.size] = x.reshape(-1)
    return buffer[GUARD : GUARD + x.size].reshape(x.shape), buffer


def unharmed(buffer: np.ndarray) -> bool:
    edge = bits(np.full(GUARD, canary(buffer.dtype), buffer.dtype))
    return np.array_equal(bits(buffer[:GUARD]), edge) and np.array_equal(bits(buffer[-GUARD:]), edge)


def canary(dtype: np.dtype) -> float:
    return 57 if dtype == np.uint8 else CANARY


class Guarded:
    """A call with arrays in the middle of larger buffers.

    Outputs are surrounded by a canary that must survive; inputs by NaN (or the largest int32), which spoils the
    outputs of a kernel that uses values beyond the end.
    """

    def __init__(self, call: Call) -> None:
        self.before = call
        self.buffers: dict[str, np.ndarray] = {}
        self.call = call.map(self._surround)

    def _surround(self, name: str, x: np.ndarray) -> np.ndarray:
        edge: Any = CANARY if name in self.before.outputs else np.nan
        if x.dtype.kind == "i":
            edge = np.iinfo(x.dtype).max
        buffer = np.full(x.size + 2 * GUARD, edge, x.dtype)
        buffer[GUARD : GUARD + x.size] = x.reshape(-1)
        self.buffers[name] = buffer
        return buffer[GUARD : GUARD + x.size].reshape(x.shape)

    def check(self) -> None:
        """Assert that guards and inputs are bitwise unchanged."""
        for name, buffer in self.buffers.items():
            edge = np.full(GUARD, buffer[0], buffer.dtype)
            if name in self.before.outputs:
                edge[:] = CANARY
            assert np.array_equal(bits(buffer[:GUARD]), bits(edge)), f"wrote before {name}"
            assert np.array_equal(bits(buffer[-GUARD:]), bits(edge)), f"wrote beyond {name}"
            if name not in self.before.outputs:
                assert np.array_equal(bits(self.call.args[name]), bits(self.before.args[name])), f"changed {name}"


def only(x: np.ndarray, where: Any) -> None:
    """Assert that exactly x[where] is NaN."""
    expected = np.zeros(x.shape, bool)
    expected[where] = True
    assert np.array_equal(np.isnan(x), expected)
