"""The protocol of a backend that can train: the operations of the seam, and its machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from . import Ops


class Machine(Ops, Protocol):
    """A backend that can train: the operations, and measurements of the machine they run on."""

    threads: int
    isa: str

    def compiled(self, kinds: Sequence[str] = ("gpt2",)) -> bool:
        """Return whether the kernels of training these kinds of models are in the cache."""

    def warm_up(self, log: Callable[[str], None], decoding: bool = False, kinds: Sequence[str] = ("gpt2",)) -> None:
        """Compile the kernels of training, or of decoding, that are not cached, and log that."""

    def measure_peak(self) -> float:
        """Measure GFLOP/s of multiply-adds in its dtype over all threads (about 0.2 s)."""

    def measure_bandwidth(self) -> float:
        """Measure GB/s of a stream over all threads: three arrays, two read and one written."""

    def measure_reading(self, x: Any) -> float:
        """Measure GB/s at which all threads read the array."""

    def version_info(self) -> dict[str, str]:
        """Return versions of the software that computes, for the run's records."""
