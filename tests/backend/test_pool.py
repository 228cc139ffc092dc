"""Helper threads: every item runs once, ranges belong to workers, idle helpers sleep."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.refused import refused

from llmpy.backend import load
from llmpy.backend.cpu import jit, pool
from llmpy.backend.cpu.jit import fork, inline

THREADS = 4


@pytest.fixture(autouse=True, scope="module")
def helpers() -> None:
    jit.hire(THREADS)


@inline
def _mark(worker, item, times, workers, rounds):
    once = 1.0 + 0.0 * times[item]
    for _ in range(rounds):  # work that the compiler cannot remove, as it does not know that the number is 1
        once = once * 0.5 + 0.5
    times[item] += once
    workers[item] = worker


@jit.kernel
def mark(threads, times, workers, rounds):
    """times[item] += 1 and workers[item] := worker for every item, after some `rounds` of work."""
    fork(_mark, threads, times.shape[0], (times, workers, rounds))


def marked(threads: int, items: int, rounds: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return how often each item ran, and on which worker."""
    times, workers = np.zeros(items), np.full(items, -1)
    mark(threads, times, workers, rounds)
    return times, workers


@pytest.mark.parametrize("threads", [1, 2, 3, THREADS])
@pytest.mark.parametrize("items", [0, 1, 2, 3, 5, 64, 1001])
def test_every_item_once(threads: int, items: int) -> None:
    for _ in range(50):
        times, workers = marked(threads, items)
        assert (times == 1).all()
        assert ((workers >= 0) & (workers < threads)).all()


@inline
def _number(worker, item, order, count):
    order[item] = count[0]
    count[0] += 1


@jit.kernel
def number(threads, order, count):
    """order[item] := how many items ran before it, on one thread."""
    fork(_number, threads, order.shape[0], (order, count))


def test_reverse_order() -> None:
    order, count = np.zeros(7, np.int64), np.zeros(1, np.int64)
    number(1, order, count)
    assert order.tolist() == [0, 1, 2, 3, 4, 5, 6]
    with load("cpu", threads=THREADS).reversed():
        number(1, order, count)
        assert order.tolist() == [13, 12, 11, 10, 9, 8, 7]
        for items in (1, 2, 3, 64, 1001):
            assert (marked(THREADS, items)[0] == 1).all()
    number(1, order, count)
    assert order.tolist() == [14, 15, 16, 17, 18, 19, 20]


def test_the_order_changes_while_others_compute() -> None:
    """Every thread of a job takes the order that it started with."""
    done = threading.Event()

    def toggle() -> None:
        for n in itertools.count():
            pool.reverse(bool(n % 2))
            if done.wait(1e-4):
                break
        pool.reverse(False)

    thread = threading.Thread(target=toggle)
    thread.start()
    try:
        for _ in range(400):
            assert (marked(THREADS, 5000)[0] == 1).all()
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("threads", [4 * THREADS, pool.MOST])
def test_more_threads_than_helpers(threads: int) -> None:
    """Ranges without a worker are done by the others."""
    for items in (threads - 1, 5000):
        times, _ = marked(threads, items)
        assert (times == 1).all()


@pytest.mark.parametrize("threads", [0, pool.MOST + 1])
def test_the_board_has_room_for_every_worker(threads: int) -> None:
    with refused("option.out-of-range", threads):
        load("cpu", threads=threads)


def test_a_worker_starts_with_its_own_range() -> None:
    """Items of another's range come after all of its own."""
    items, end, seen = 400, time.monotonic() + 60, set()
    while seen != {0, 1}:
        times, workers = marked(2, items, rounds=5000)
        assert (times == 1).all()
        for worker, own, other in ((0, workers[: items // 2], workers[items // 2 :]), (1, *np.split(workers, 2)[::-1])):
            if (other == worker).any():
                assert (own == worker).all()
                seen.add(worker)
        assert time.monotonic() < end, "no worker helped another"


def test_kernels_of_several_threads_at_once() -> None:
    """One call has the helpers, the others run alone; no item is lost or repeated."""
    with ThreadPoolExecutor(3) as callers:
        results = list(callers.map(lambda _: marked(THREADS, 301)[0], range(600)))
    assert all((times == 1).all() for times in results)


def test_helpers_sleep_when_there_is_nothing_to_do() -> None:
    marked(THREADS, 64)
    helpers = len(pool._helpers)
    end = time.monotonic() + 60
    while pool._sleeping < helpers:
        assert time.monotonic() < end, f"{helpers - pool._sleeping} of {helpers} helpers still look for work"
        time.sleep(0.01)
    for _ in range(50):  # only a kernel wakes them
        time.sleep(0.002)
        assert pool._sleeping == helpers
    assert (marked(THREADS, 64)[0] == 1).all()
