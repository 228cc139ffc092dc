"""Signs that a long step is running: a bar on a terminal, else lines on stderr."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from .terminal import aside
from .thread_limit import few

EVERY = 4.0  # seconds between lines if stderr is not a terminal


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int], object]]:
    """Yield a function that counts characters. A thread shows them, also during a long call of a library."""
    from tqdm import tqdm

    if not hasattr(tqdm, "_lock"):  # its own is for processes too, and from Python 3.14 starts one that outlives this
        tqdm.set_lock(threading.RLock())
    bar = tqdm(desc=what, unit=" characters", unit_scale=True, leave=False, disable=None, delay=1)
    started, counted, ended = time.monotonic(), [0], threading.Event()

    def count(characters: int) -> None:
        counted[0] += characters
        bar.update(characters)

    def show() -> None:
        while not ended.wait(EVERY if bar.disable else 0.5):
            if bar.disable:
                aside(f"{what}: {counted[0]:,} characters, {time.monotonic() - started:.0f} s")
            else:
                bar.refresh()

    thread = None if few() else threading.Thread(target=show, daemon=True)
    if thread:
        thread.start()
    try:
        yield count
    finally:
        ended.set()
        if thread:
            thread.join()
        bar.close()
