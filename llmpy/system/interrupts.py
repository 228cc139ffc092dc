"""The signals that end a program: SIGINT (Ctrl-C), SIGTERM and SIGHUP."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def on_signal(handler: Callable[[int, Any], object]) -> Iterator[None]:
    """Call `handler(number, frame)` on signals within, except SIGHUP under nohup. Has no effect in other threads."""
    numbers = [signal.SIGINT, signal.SIGTERM] if threading.current_thread() is threading.main_thread() else []
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    if numbers and hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        numbers.append(hangup)
    before = {n: signal.signal(n, handler) for n in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """Hold signals back within and raise them at the end."""
    came: list[int] = []
    try:
        with on_signal(lambda number, _: came.append(number)):
            yield
    finally:
        for number in came:
            signal.raise_signal(number)


def interruptible(work: Callable[[], T]) -> T:
    """Return `work()`, run in another thread, so that this one handles signals during a long call of a library.

    After an exception here (Ctrl-C) the thread is abandoned: it ends with the process.
    """
    from concurrent.futures import Future, wait

    from .thread_limit import few

    if few():
        return work()
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not wait([result], 0.2).done:  # on Windows a wait without a timeout ignores Ctrl-C
        pass
    return result.result()
