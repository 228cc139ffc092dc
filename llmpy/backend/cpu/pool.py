"""Helper threads: they spin for a job for a while, then sleep until a kernel is called.

A job is a compiled function that takes items from counters until they are exhausted (`jit.fork`). The thread that
calls a kernel opens the job, works on it, closes it, and waits only for helpers still inside. A helper that is not
scheduled delays nothing, and without helpers the work is done all the same; a barrier would wait for every thread.

Spinning is compiled code (`jit.help_out`), without the GIL. A helper spins while a kernel runs, since its next job
may be milliseconds away; within SPINS looks of the end it returns here and sleeps on a semaphore. `begin` and `end`
around every kernel cost a fraction of a microsecond.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from ...system.thread_limit import few

# The board that announces jobs: one number per cache line (8 int64), against false sharing. LOCK: a job is running;
# GENERATION: number of jobs; JOB: the function, 0 when closed; STATE: its argument; ACTIVE: helpers inside; KERNEL: 1
# while one runs; REVERSED: 1 for items in reverse order; COUNTERS: the next item of each worker's range.
LINE = 8
MOST = 1024  # workers
LOCK, GENERATION, JOB, STATE, ACTIVE, KERNEL, REVERSED, COUNTERS = (LINE * i for i in range(8))
SIZE = COUNTERS + LINE * MOST
SPINS = 20_000  # looks, about half a millisecond: longer than Python takes between kernels
LAST_LOOKS = 1_000  # longer than from `begin` to the announcement of the job

_memory = np.zeros(SIZE + LINE, np.int64)
BOARD = _memory.ctypes.data + -_memory.ctypes.data % (8 * LINE)  # its address, on a cache line
_kernel = _memory[(BOARD - _memory.ctypes.data) // 8 + KERNEL :].data  # a memoryview: twice as fast to assign
_reversed = _memory[(BOARD - _memory.ctypes.data) // 8 + REVERSED :].data

machines: weakref.WeakSet[Any] = weakref.WeakSet()  # backends; each has a lock
_helpers: list[threading.Thread] = []
_bell = threading.Semaphore(0)
_count = threading.Lock()  # of _sleeping
_hiring = threading.RLock()  # two helpers must not be the same worker
_sleeping = 0
_work: Callable[[int, int], object] = print  # of a helper
_lost = 0  # helpers of the parent process, until `begin` hires as many in this one


def yield_address() -> int:
    """Return the address of the C function that lets another thread run on this core."""
    if sys.platform == "win32":
        function = ctypes.WinDLL("kernel32").SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def hire(threads: int, help_out: Callable[[int, int], object]) -> None:
    """Start helpers until there are `threads` − 1: workers 1, 2, …

    `help_out(worker, SPINS)` works until it has found no job for a while.
    """

    def live(worker: int) -> None:
        global _sleeping
        while True:
            help_out(worker, SPINS)
            with _count:
                _sleeping += 1
            help_out(worker, LAST_LOOKS)  # for a job that started before this sleeper was counted
            _bell.acquire()

    global _work
    with _hiring:
        _work = help_out
        while not few() and len(_helpers) < threads - 1:
            worker = len(_helpers) + 1
            helper = threading.Thread(target=live, args=(worker,), name=f"llmpy-helper-{worker}", daemon=True)
            _helpers.append(helper)
            helper.start()


def begin() -> None:
    """Mark that a kernel runs, and wake sleeping helpers."""
    global _sleeping, _lost
    _kernel[0] = 1
    if _sleeping:
        with _count:
            sleeping, _sleeping = _sleeping, 0
        if sleeping:  # else another kernel has just woken them
            _bell.release(sleeping)
        if _lost:
            lost, _lost = _lost, 0
            hire(lost + 1, _work)


def end() -> None:
    """Mark that no kernel runs; if another thread still runs one, its helpers may sleep too early.

    A count would be exact, but Ctrl-C between its two updates would leave it wrong for good.
    """
    _kernel[0] = 0


def reverse(on: bool) -> None:
    """Let jobs take their items from the last to the first, so other threads compute them, in another order."""
    _reversed[0] = on


def _after_fork() -> None:
    """Start over, in a child process: threads do not survive a fork, and what they held is never released."""
    global _bell, _count, _hiring, _sleeping, _lost
    _bell, _count, _hiring = threading.Semaphore(0), threading.Lock(), threading.RLock()
    _memory.fill(0)
    _lost = _sleeping = len(_helpers) or _lost
    _helpers.clear()
    for machine in machines:
        machine.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
