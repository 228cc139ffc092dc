"""Threads under a limit of processes (`ulimit -u`, a container's pids limit): fewer do the work."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

from .terminal import aside


class Thread(threading.Thread):
    """A thread; if it cannot be started, `start` does its work."""

    def start(self) -> None:
        try:
            super().start()
        except RuntimeError:
            warn_few()
            self.run()

    def join(self, timeout: float | None = None) -> None:
        if self.ident is not None:  # it was started
            super().join(timeout)


def submit(pool: Executor, call: Callable[..., Any], *arguments: object) -> Future[Any]:
    """Submit a call, or make it here if no thread can be started. A thread started earlier may then repeat it."""
    try:
        return pool.submit(call, *arguments)
    except RuntimeError:
        warn_few()
        done: Future[Any] = Future()
        try:
            done.set_result(call(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done


@functools.cache
def warn_few() -> None:
    """Warn once, and keep the tokenizers' library from starting threads."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    aside("warning: no more threads can be started (limit of processes); using fewer. Raise ulimit -u or pids.max")


@functools.cache
def check() -> None:
    """Try to start a thread per core, as the tokenizers' library does: it cannot work with fewer."""
    end, count = threading.Event(), os.cpu_count() or 1
    with ThreadPoolExecutor(count) as pool:
        try:
            for _ in range(count):
                pool.submit(end.wait)
        except RuntimeError:
            warn_few()
        end.set()
