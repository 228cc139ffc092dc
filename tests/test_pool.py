"""The threads that help: every item once, in ranges of their own, and asleep when there is nothing to do."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from llmpy.backend.cpu import jit, pool
from llmpy.backend.cpu.jit import fork, inline

THREADS = 4


@pytest.fixture(autouse=True, scope="module")
def helpers() -> None:
    jit.hire(THREADS)


@inline
def _mark(worker, item, times, workers):
    times[item] += 1
    workers[item] = worker


@jit.kernel
def marked(threads, times, workers):
    """times[item] += 1 and workers[item] := worker for every item."""
    fork(_mark, threads, times.shape[0], (times, workers))


@inline
def _slow(worker, item, times, workers, n):
    x = 1.0
    for _ in range(n):
        x = x * 0.5 + 1.0
    times[item] += x
    workers[item] = worker


@jit.kernel
def slow(threads, times, workers, n):
    """As `marked`, but an item takes a while: times[item] += 2."""
    fork(_slow, threads, times.shape[0], (times, workers, n))


@pytest.mark.parametrize("threads", [1, 2, 3, THREADS])
@pytest.mark.parametrize("items", [0, 1, 2, 3, 5, 64, 1001])
def test_every_item_once(threads: int, items: int) -> None:
    for _ in range(50):
        times, workers = np.zeros(items), np.full(items, -1)
        marked(threads, times, workers)
        assert (times == 1).all()
        assert ((workers >= 0) & (workers < threads)).all()


def test_more_threads_than_helpers() -> None:
    """Nobody comes for some of the ranges: those who are there do them."""
    times, workers = np.zeros(999), np.full(999, -1)
    marked(4 * THREADS, times, workers)
    assert (times == 1).all()


def test_a_worker_begins_with_its_own_range() -> None:
    """Of a worker that did most of its range, the first item of it is its own."""
    items, end = 400, time.monotonic() + 60
    while True:
        times, workers = np.zeros(items), np.full(items, -1)
        slow(2, times, workers, 50_000)
        assert (times == 2).all()
        if (workers[items // 2 :] == 1).sum() > 0.8 * items / 2:  # one that came late would share it with worker 0
            assert workers[items // 2] == 1
            return
        assert time.monotonic() < end, "the helper never did its part"


def test_kernels_of_two_threads_at_once() -> None:
    """One has the helpers, the other works alone: nobody's items are lost or done twice."""
    wrong: list[int] = []

    def work() -> None:
        for _ in range(200):
            times, workers = np.zeros(301), np.full(301, -1)
            marked(THREADS, times, workers)
            if not (times == 1).all():
                wrong.append(int((times != 1).sum()))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_helpers_sleep_when_there_is_nothing_to_do() -> None:
    times, workers = np.zeros(64), np.full(64, -1)
    marked(THREADS, times, workers)
    helpers = len(pool._helpers)
    end = time.monotonic() + 60
    while pool._sleeping < helpers:
        assert time.monotonic() < end, f"{helpers - pool._sleeping} of {helpers} helpers still look for work"
        time.sleep(0.01)
    for _ in range(50):  # and nothing but a kernel wakes them
        time.sleep(0.002)
        assert pool._sleeping == helpers
    marked(THREADS, times, workers)
    assert (times == 2).all()
