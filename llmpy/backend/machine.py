"""The protocol of a backend that can train: the operations of the seam, and its machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from . import Ops

KINDS = ("gpt2", "llama", "lora")  # of models, by the kernels they need


class Machine(Ops, Protocol):
    """A backend that can train: the operations, and measurements of the machine they run on."""

    threads: int
    isa: str

    def quantised_shape(self, OC: int, C: int) -> tuple[int, int]:
        """Return the shape, in bytes, of a quantised weight (OC, C)."""

    def quantise(self, packed: Any, weight: Any) -> None:
        """packed (quantised_shape) uint8 := weight (OC, C) float32, finite: int8, one scale for 32 along C.

        `linear_forward` takes it as weight, and also rounds inp to int8, one scale for 32 of a row.
        """

    def compiled(self, kinds: Sequence[str] = ("gpt2",), decoding: bool | None = False) -> bool:
        """Return whether the kernels of these models are in the cache: of training, of decoding or (None) both."""

    def warm_up(
        self, log: Callable[[str], None], decoding: bool | None = False, kinds: Sequence[str] = ("gpt2",)
    ) -> None:
        """Compile those of these kernels that are not cached, and log that."""

    def measure_peak(self) -> float:
        """Measure GFLOP/s of multiply-adds in its dtype over all threads (about 0.2 s)."""

    def measure_bandwidth(self) -> float:
        """Measure GB/s of a stream over all threads: three arrays, two read and one written."""

    def measure_reading(self, x: Any) -> float:
        """Measure GB/s at which all threads read the array."""

    def version_info(self) -> dict[str, str]:
        """Return versions of the software that computes, for the run's records."""
