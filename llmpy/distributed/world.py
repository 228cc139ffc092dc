"""What ranks tell each other, over MPI.

Every call of MPI here returns at once and is asked again until it is done: a message that never comes is then given up
when the watchdog knows why, and a core that waits is free to compute (the libraries' own waiting turns in a loop).
Large messages are carried by one thread of the rank, in order; the numbers by which ranks agree have a communicator
of their own. mpi4py is imported in `join` and not before.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import psutil

from ..errors import LlmpyError
from ..model.gpt2 import GPT2
from ..options.train import TrainOptions
from ..run.checkpoint_writer import CheckpointWriter
from ..run.folder import RunFolder
from ..run.journal import Journal
from ..system.command import command, install
from ..system.interrupts import signals_held_back
from ..system.resources import cores
from ..train.single_process import SingleProcess
from . import launch
from .watchdog import RankFailure, Watch, end
from .zero import Zero

LOOKS = 50  # at a request in a row before sleeping: an answer from this host mostly comes sooner
NAP = 1e-4  # seconds
BLAME = 3.0  # to learn from the watchdog which rank is dead when MPI fails


class World(SingleProcess):
    """All ranks of a run. A context manager: whatever failure leaves it on one rank ends all of them."""

    def __init__(self, mpi: Any, patience: float) -> None:
        """`mpi` is mpi4py's module; the ranks are those of COMM_WORLD. Raises LlmpyError if they cannot be watched."""
        self._mpi = mpi
        self._lock = threading.Lock()  # one thread at a time inside MPI
        self._words, self._loads = mpi.COMM_WORLD.Dup(), mpi.COMM_WORLD.Dup()
        self.rank, self.size = mpi.COMM_WORLD.Get_rank(), mpi.COMM_WORLD.Get_size()
        self._watch = Watch(self.rank, patience)
        self._runner = ThreadPoolExecutor(1, thread_name_prefix="courier")
        self._carried = self._waited = 0.0  # seconds
        mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
        about = {"host": socket.gethostname(), "cores": mine, "available": cores(), "physical": physical}
        self._ranks = self.gather_values(about)
        self._local = [q for q, other in enumerate(self._ranks) if other["host"] == about["host"]]
        self.local_size = len(self._local)
        self._watch.start(self.size, self.gather_values)
        launch.leave_word(f"rank-{self.rank}", str(os.getpid()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, failure: BaseException | None, _: TracebackType | None) -> None:
        watch = self._watch
        if failure is None:
            self.gather(0)
            watch.close()
            self._runner.shutdown()
            return
        if not isinstance(failure, Ended):
            known = isinstance(failure, LlmpyError)
            if not known:
                traceback.print_exception(failure)
            name = "" if self.rank == 0 else f"rank {self.rank} on {socket.gethostname()}: "
            text = str(failure) if known else f"{type(failure).__name__}: {failure}"
            code = getattr(failure, "exit_code", 130 if kind is KeyboardInterrupt else 1)
            watch.broadcast(RankFailure(self.rank, name + text, code))
        assert watch.failure is not None
        end(watch, watch.failure)

    def _finish(self, start: Callable[[], list[Any]]) -> None:
        """Start requests and wait until all are done. Raises Ended if the world ends before."""
        looks = 0
        try:
            with self._lock:
                requests = start()
            while True:
                with self._lock:
                    if self._mpi.Request.Testall(requests):
                        return
                if self._watch.failure is not None:
                    raise Ended("ranks.ended", "another rank has ended the run")
                looks += 1
                time.sleep(NAP if looks > LOOKS else 0)
        except self._mpi.Exception as error:  # mostly a rank is dead
            until = time.monotonic() + BLAME
            while self._watch.failure is None and time.monotonic() < until:
                time.sleep(NAP)
            if self._watch.failure is not None:
                raise Ended("ranks.ended", "another rank has ended the run") from error
            raise LlmpyError("distributed.x", f"MPI: {error}", "See what mpiexec printed") from error

    def gather(self, *numbers: float) -> list[tuple[float, ...]]:
        """See `SingleProcess`, as for all that have no text here."""
        start = time.perf_counter()
        mine = np.asarray(numbers, np.float64)
        all_of_them = np.empty((self.size, mine.size))
        self._finish(lambda: [self._words.Iallgather(mine, all_of_them)])
        self._waited += time.perf_counter() - start
        return [tuple(row) for row in all_of_them.tolist()]

    def gather_values(self, value: Any) -> list[Any]:
        mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
        counts = [int(count) for (count,) in self.gather(mine.size)]
        texts = np.empty(sum(counts), np.uint8)
        self._finish(lambda: [self._words.Iallgatherv(mine, [texts, counts])])
        return [json.loads(part.tobytes()) for part in np.split(texts, np.cumsum(counts)[:-1])]

    def exchange(self, tag: int, outgoing: Sequence[Any], incoming: Sequence[Any]) -> None:
        """See `zero.Transport`."""
        others = [(self.rank + i) % self.size for i in range(1, self.size)]  # not all to the same one first
        byte, loads = self._mpi.BYTE, self._loads
        self._finish(
            lambda: (
                [loads.Irecv([incoming[q].view(np.uint8), byte], q, tag) for q in others]
                + [loads.Isend([outgoing[q].view(np.uint8), byte], q, tag) for q in others]
            )
        )

    def submit(self, job: Callable[[], None]) -> Future[None]:
        """See `zero.Transport`."""

        def timed() -> None:
            start = time.perf_counter()
            job()
            self._carried += time.perf_counter() - start

        return self._runner.submit(timed)

    def result(self, future: Future[None]) -> None:
        """See `zero.Transport`."""
        start = time.perf_counter()
        future.result()
        self._waited += time.perf_counter() - start

    def times(self) -> dict[str, float]:
        carried, waited = self._carried, self._waited
        self._carried = self._waited = 0.0
        return {"comm_ms": 1e3 * carried, "exposed_ms": 1e3 * waited}

    @contextlib.contextmanager
    def first_rank_first(self) -> Iterator[None]:
        yield from self._after(self.rank == 0)

    @contextlib.contextmanager
    def each_host_once(self) -> Iterator[None]:
        yield from self._after(self.rank == self._local[0])

    def _after(self, first: bool) -> Iterator[None]:
        """Let the `first` ranks through, and the others when those are done."""
        if not first:
            self.gather(0)
        yield
        if first:
            self.gather(0)

    @contextlib.contextmanager
    def others_waiting(self) -> Iterator[bool]:
        self.result(self.submit(lambda: None))  # all messages of before are delivered
        yield self.rank == 0
        self.gather(0)

    def threads(self, options: TrainOptions) -> int | None:
        """The cores that this rank may use, divided by how many ranks of this host may use them too."""
        if options.threads is not None:
            return options.threads
        mine = self._ranks[self.rank]
        theirs = [self._ranks[q]["cores"] for q in self._local]
        sharing = sum(not mine["cores"] or not {*mine["cores"]}.isdisjoint(other) for other in theirs)
        return max(1, int(mine["available"]) // sharing)

    def lines(self, threads: int) -> list[str]:
        hosts, cores, counts = Counter[str](), dict[str, int](), Counter[str]()
        for (count,), about in zip(self.gather(threads), self._ranks, strict=True):
            hosts[about["host"]] += 1
            counts[about["host"]] += int(count)
            cores[about["host"]] = about["physical"]
        where = ", ".join(f"{count} on {host}" for host, count in hosts.items())
        return [f"ranks    {self.size}: {where}; {_line(self._mpi.Get_library_version())}"] + [
            f"warning: the ranks on {host} have {count} threads together and {cores[host]} cores: they will wait for "
            "each other; use fewer --ranks or --threads"
            for host, count in counts.items()
            if count > cores[host]
        ]

    def journal(self) -> Journal:
        return Journal() if self.rank == 0 else NullJournal()

    def claim(self, options: TrainOptions) -> RunFolder:
        """The run's folder: the first rank has it, the others write into it what they are told to."""
        mine = RunFolder.claim(options) if self.rank == 0 else None
        path, resumed = self.gather_values([str(mine.path.absolute()), mine.resumed] if mine else None)[0]
        if mine is not None:
            return mine
        if not Path(path).is_dir():
            raise LlmpyError(
                "distributed.x", f"{path} is not there", "Let all hosts have the run folder, on a shared file system"
            )
        return Lent(Path(path), resumed)

    def optimizer(self, model: GPT2, o: TrainOptions) -> Zero:
        return Zero(model, self, o.beta1, o.beta2, o.weight_decay, o.clip)

    def checkpoints(
        self, run: Path, model: GPT2, optimizer: Any, length: int, journal: Journal, o: TrainOptions
    ) -> CheckpointWriter:
        self._watch.hint = f". Resume, on fewer ranks too, with: {command('train', '--resume', run)}"
        if self.rank == 0:
            launch.leave_word("hint", self._watch.hint)
        return super().checkpoints(run, model, optimizer, length, journal, o)


class Ended(LlmpyError):
    """Another rank, or the watchdog, has ended the run: `Watch.failure` says why."""


class NullJournal(Journal):
    """What the other ranks print and record: nothing, for it would be the same."""

    def log(self, line: str = "") -> None:
        pass

    def open(self, folder: Path, sizes: Any = None) -> None:
        pass

    def begin_progress(self) -> None:
        pass


class Lent(RunFolder):
    """The run's folder on the other ranks, which have no lock on it, and neither clean it nor remove it."""

    def __init__(self, path: Path, resumed: bool) -> None:
        super().__init__(path, [])
        self.resumed, self._kept = resumed, True

    def keep(self) -> None:
        pass


def _line(library: str) -> str:
    """Name and version, of all that MPI says of its library."""
    return " ".join(library.split("\n")[0].split(",")[0].strip("\0").split())


def join(options: TrainOptions) -> World | None:
    """Initialise MPI; return the ranks that were started with this one, None if it is the only one.

    Raises LlmpyError if there is no MPI, if it is not the launcher's, or if there are not as many ranks as expected.
    """
    try:
        import mpi4py

        mpi4py.rc(initialize=False, finalize=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # where the launcher is another MPI's: see below
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no library
        raise LlmpyError(
            "distributed.x", f"several processes need mpi4py and an MPI: {error}", install(launch.MPI)
        ) from error
    library = _line(MPI.Get_library_version())
    if launch.OPEN_MPI in os.environ and "Open MPI" not in library:  # MPICH would end the process here
        raise LlmpyError(
            "distributed.x",
            f"the launcher is Open MPI's, but mpi4py has found another MPI: {library}",
            "Use the mpiexec of the same MPI",
        )
    with signals_held_back():  # afterwards our handlers are back: MPICH would swallow SIGHUP
        if MPI.Init_thread(MPI.THREAD_MULTIPLE) < MPI.THREAD_SERIALIZED:
            raise LlmpyError("distributed.x", f"{library} allows one thread only", "Use an MPI built with threads")
    size, expected = MPI.COMM_WORLD.Get_size(), launch.tasks()
    if size == 1 and expected > 1:
        raise LlmpyError(
            "distributed.x",
            f"the launcher says {expected} tasks, but MPI sees one: {expected} runs would write to one folder",
            "Use the mpiexec of the same MPI, or srun --mpi=pmix (Open MPI) or --mpi=pmi2 (MPICH); or, if one process "
            "is meant, say --ranks 1",
        )
    if "ranks" in options.given and options.ranks != size:
        raise LlmpyError(
            "distributed.x", f"--ranks {options.ranks}, but {size} were started", "Leave --ranks out, or let them agree"
        )
    return World(MPI, options.rank_timeout) if size > 1 else None
