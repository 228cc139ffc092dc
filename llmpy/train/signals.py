"""Signals that stop a run; ranks agree on them, so that all stop after the same step."""

from __future__ import annotations

import contextlib
import os
import signal
from contextlib import AbstractContextManager
from types import FrameType

from ..system.interrupts import on_signal
from .single_process import SINGLE_PROCESS, SingleProcess

HANGUP = getattr(signal, "SIGHUP", None)  # not on Windows


class StopSignals:
    """The stop request of a run: a signal to any of its ranks."""

    def __init__(self, world: SingleProcess = SINGLE_PROCESS) -> None:
        self.asked = 0  # signal received by this rank
        self._agreed = 0  # signal known to all ranks
        self._world = world

    @property
    def signal(self) -> int:
        """The number of the signal that stops the run; 0: none."""
        return self._agreed or (self.asked if self._world.size == 1 else 0)

    def agree(self, *numbers: float) -> list[tuple[float, ...]]:
        """Return the numbers of every rank, by rank, and share their stop signals."""
        rows = self._world.gather(self.asked, *numbers)
        self._agreed = int(max(row[0] for row in rows))
        return [row[1:] for row in rows]

    def handled(self) -> AbstractContextManager[None]:
        """Within: the first signal stops the run after its step; a second SIGINT or SIGTERM ends the process.

        A second SIGHUP is ignored, since a closing terminal may send two; under nohup all are.
        """
        return on_signal(self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        for n in (signal.SIGINT, signal.SIGTERM, HANGUP):
            if n is not None and signal.getsignal(n) == self._handle:
                signal.signal(n, signal.SIG_IGN if n == HANGUP else signal.SIG_DFL)
        self.asked = number
        if self._world.rank == 0:
            again = b"; press Ctrl-C again to quit at once" if number == signal.SIGINT else b""
            with contextlib.suppress(OSError):  # the terminal is gone; no print: the signal may have interrupted one
                os.write(2, b"\nstopping after this step, and saving" + again + b"\n")
