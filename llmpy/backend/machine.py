"""What a backend reports of its machine, beside the operations of the seam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from . import Ops


class Machine(Ops, Protocol):
    """A backend that can train: the operations, and what they run on. The one protocol of all that is handed one."""

    threads: int
    isa: str

    def compiled(self) -> bool:
        """Whether the kernels of training are in the cache."""

    def warm_up(self, log: Callable[[str], None], decoding: bool = False) -> None:
        """Compile the kernels of training, or of decoding, that are not cached, and report that."""

    def measure_peak(self) -> float:
        """GFLOP/s of multiply-adds in its dtype over all threads, measured now (about 0.2 s)."""

    def measure_bandwidth(self) -> float:
        """GB/s of a stream over all threads, measured now: three arrays, two read and one written."""

    def measure_reading(self, x: Any) -> float:
        """GB/s at which all threads read the array, measured now."""

    def version_info(self) -> dict[str, str]:
        """Versions of what computes, for the run's records."""
