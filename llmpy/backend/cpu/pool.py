"""The threads that help: they look for a job for a while, then sleep until a kernel is called.

A job is a compiled function that takes items from counters until none is left (`jit.fork`). The thread that
calls a kernel opens the job, works on it itself, closes it, and waits only for helpers that are still inside:
a helper that another program keeps from running is not waited for, and with no helper at all the work is
done all the same. A barrier would wait for every thread, whenever the scheduler lets it run.

Looking is done in compiled code (`jit.help_out`), without the GIL. A helper looks on as long as a kernel runs, whose
next job may be milliseconds away; within SPINS looks of its end it comes back here and sleeps on a semaphore.
`begin` and `end` around every kernel cost a fraction of a microsecond.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable

import numpy as np

# The board on which jobs are announced: one number to a cache line (8 int64), so that helpers which read one
# do not slow those that write another. LOCK: a job is being run; GENERATION: counts jobs; JOB: the function,
# 0 when closed; STATE: its argument; ACTIVE: helpers inside; KERNEL: 1 while one runs; COUNTERS: the next item of each
# worker's range.
LINE = 8
MOST = 1024  # workers
LOCK, GENERATION, JOB, STATE, ACTIVE, KERNEL, COUNTERS = (LINE * i for i in range(7))
SIZE = COUNTERS + LINE * MOST
SPINS = 20_000  # looks: half a millisecond or so, longer than Python takes from one kernel to the next
LAST_LOOKS = 1_000  # longer than from `begin` to the announcement of the job

_memory = np.zeros(SIZE + LINE, np.int64)
BOARD = _memory.ctypes.data + -_memory.ctypes.data % (8 * LINE)  # its address, on a cache line
_kernel = _memory[
    (BOARD - _memory.ctypes.data) // 8 + KERNEL :
].data  # as a memoryview, which takes a number in half the time

_helpers: list[threading.Thread] = []
_bell = threading.Semaphore(0)
_count = threading.Lock()
_sleeping = 0


def yield_address() -> int:
    """Address of the C function that lets another thread run on this core."""
    if sys.platform == "win32":
        function = ctypes.WinDLL("kernel32").SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def hire(threads: int, help_out: Callable[[int, int], object]) -> None:
    """Have at least `threads` − 1 helpers, workers 1, 2, …

    `help_out(worker, SPINS)` works until it has found nothing for a while.
    """

    def live(worker: int) -> None:
        global _sleeping
        while True:
            help_out(worker, SPINS)
            with _count:
                _sleeping += 1
            help_out(worker, LAST_LOOKS)  # for a job that began while nobody was known to sleep
            _bell.acquire()

    while len(_helpers) < threads - 1:
        worker = len(_helpers) + 1
        helper = threading.Thread(target=live, args=(worker,), name=f"llmpy-helper-{worker}", daemon=True)
        _helpers.append(helper)
        helper.start()


def begin() -> None:
    """A kernel begins: ring for the helpers that sleep, if any."""
    global _sleeping
    _kernel[0] = 1
    if _sleeping:
        with _count:
            sleeping, _sleeping = _sleeping, 0
        if sleeping:  # else another kernel that began just now has rung
            _bell.release(sleeping)


def end() -> None:
    """It has ended. Beside one that another thread runs this says too much: its helpers may sleep too soon.

    A count would not, but after a Ctrl-C between its two changes it would be wrong for ever.
    """
    _kernel[0] = 0
