"""Signals that stop a run, and the numbers by which ranks agree, so that all of them stop after the same step."""

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
    """Whether the run was asked to stop, by a signal to any of its ranks."""

    def __init__(self, world: SingleProcess = SINGLE_PROCESS) -> None:
        self.asked = 0  # the signal that came to this rank
        self._agreed = 0  # the one that all ranks know of
        self._world = world

    @property
    def signal(self) -> int:
        """The number of the signal that stops the run; 0: none has come."""
        return self._agreed or (self.asked if self._world.size == 1 else 0)

    def agree(self, *numbers: float) -> list[tuple[float, ...]]:
        """Return the numbers of every rank, in their order; from here on all know whether one was asked to stop."""
        rows = self._world.gather(self.asked, *numbers)
        self._agreed = int(max(row[0] for row in rows))
        return [row[1:] for row in rows]

    def handled(self) -> AbstractContextManager[None]:
        """Within, the first signal asks the run to stop after its step; a further SIGINT or SIGTERM ends the process.

        A further SIGHUP does nothing, for a closing terminal may send two; under nohup none does.
        """
        return on_signal(self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        for n in (signal.SIGINT, signal.SIGTERM, HANGUP):
            if n is not None and signal.getsignal(n) == self._handle:
                signal.signal(n, signal.SIG_IGN if n == HANGUP else signal.SIG_DFL)
        self.asked = number
        if self._world.rank == 0:
            again = b"; press Ctrl-C again to quit at once" if number == signal.SIGINT else b""
            with contextlib.suppress(OSError):  # the terminal is gone; print may be what the signal interrupted
                os.write(2, b"\nstopping after this step, and saving" + again + b"\n")
