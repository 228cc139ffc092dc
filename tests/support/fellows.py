"""Ranks as threads of one process, for tests of everything above MPI."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np


class Fellows:
    """The shared state of the ranks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barriers = [threading.Barrier(size, timeout=20) for _ in range(2)]
        self.boards: list[list[Any]] = [[None] * size for _ in range(2)]

    def run(self, act: Callable[[Fellow], Any]) -> list[Any]:
        """Run `act` on all ranks concurrently; return its results."""
        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(act, Fellow(self, rank)) for rank in range(self.size)]
            return [future.result() for future in futures]


class Fellow:
    """One rank: the methods of `World` that optimizer and checkpoints use."""

    local_size = 1

    def __init__(self, all_of_them: Fellows, rank: int) -> None:
        self.all, self.rank, self.size = all_of_them, rank, all_of_them.size
        self.runner = ThreadPoolExecutor(1)

    def _meet(self, kind: int, value: Any) -> list[Any]:
        self.all.boards[kind][self.rank] = value
        self.all.barriers[kind].wait()
        values = list(self.all.boards[kind])
        self.all.barriers[kind].wait()
        return values

    def gather(self, *numbers: float) -> list[tuple[float, ...]]:
        return self._meet(0, tuple(float(n) for n in numbers))

    def gather_values(self, value: Any) -> list[Any]:
        return [json.loads(text) for text in self._meet(0, json.dumps(value))]

    def exchange(self, tag: int, outgoing: Sequence[np.ndarray], incoming: Sequence[np.ndarray]) -> None:
        values = self._meet(1, (tag, [x.copy() for x in outgoing]))
        assert {t for t, _ in values} == {tag}
        for q, (_, theirs) in enumerate(values):
            if q != self.rank:
                incoming[q][...] = theirs[self.rank]

    def submit(self, job: Callable[[], None]) -> Future[None]:
        return self.runner.submit(job)

    def result(self, future: Future[None]) -> None:
        future.result()
