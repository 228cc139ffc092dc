"""Communication between ranks, over MPI.

All MPI calls are non-blocking and polled: a wait ends when the watchdog reports a failure, and leaves its core free
(MPI's own waits spin). One thread per rank transfers large messages, in order; small exchanges have their own
communicator. mpi4py is imported only in `join`.
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

from ..errors import LlmpyError, unusable_library
from ..model.language_model import LanguageModel
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

SPINS = 50  # polls before sleeping: a message from this host mostly arrives sooner
NAP = 1e-4  # seconds
BLAME = 3.0  # seconds for the watchdog to name the dead rank when MPI fails


class World(SingleProcess):
    """All ranks of a run. A context manager: an exception that leaves it on one rank ends all of them."""

    def __init__(self, mpi: Any, patience: float) -> None:
        """Set up the ranks of COMM_WORLD; `mpi` is mpi4py.MPI. Raises LlmpyError if heartbeats cannot connect."""
        self._mpi = mpi
        self._lock = threading.Lock()  # one thread at a time inside MPI
        self._words, self._loads = mpi.COMM_WORLD.Dup(), mpi.COMM_WORLD.Dup()
        self.rank, self.size = mpi.COMM_WORLD.Get_rank(), mpi.COMM_WORLD.Get_size()
        self._watch = Watch(self.rank, patience)
        self._runner = ThreadPoolExecutor(1, thread_name_prefix="transport")
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
            code, text = "rank.failed", f"{type(failure).__name__}: {failure}"
            failure = (failure and unusable_library(failure)) or failure
            if isinstance(failure, LlmpyError):
                code, text = failure.code, str(failure)
            else:
                traceback.print_exception(failure)
            name = "" if self.rank == 0 else f"rank {self.rank} on {socket.gethostname()}: "
            exit_code = getattr(failure, "exit_code", 130 if kind is KeyboardInterrupt else 1)
            if isinstance(failure, SystemExit) and isinstance(failure.code, int):
                exit_code = failure.code
            watch.broadcast(RankFailure(self.rank, name + text, exit_code, code))
        assert watch.failure is not None
        end(watch, watch.failure)

    def _finish(self, start: Callable[[], list[Any]]) -> None:
        """Start requests and wait until all are done. Raises Ended if another rank fails first."""
        spins = 0
        try:
            with self._lock:
                requests = start()
            while True:
                with self._lock:
                    if self._mpi.Request.Testall(requests):
                        return
                if self._watch.failure is not None:
                    raise Ended("rank.ended", "another rank ended the run")
                spins += 1
                time.sleep(NAP if spins > SPINS else 0)
        except self._mpi.Exception as error:  # mostly because a rank is dead
            until = time.monotonic() + BLAME
            while self._watch.failure is None and time.monotonic() < until:
                time.sleep(NAP)
            if self._watch.failure is not None:
                raise Ended("rank.ended", "another rank ended the run") from error
            raise LlmpyError("mpi.failed", f"MPI failed: {error}", "See the output of mpiexec") from error

    def gather(self, *numbers: float) -> list[tuple[float, ...]]:
        """See `SingleProcess`, also for all methods below without a docstring."""
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
        others = [(self.rank + i) % self.size for i in range(1, self.size)]  # each rank starts with a different one
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
        """Run the body on the `first` ranks, then on the others."""
        if not first:
            self.gather(0)
        yield
        if first:
            self.gather(0)

    @contextlib.contextmanager
    def others_waiting(self) -> Iterator[bool]:
        self.result(self.submit(lambda: None))  # jobs run in order: all earlier messages are delivered
        yield self.rank == 0
        self.gather(0)

    def threads(self, options: TrainOptions) -> int | None:
        """Return the cores that this rank may use, divided by the number of ranks on this host that share them."""
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
            f"warning: the ranks on {host} run {count} threads on {cores[host]} cores. Use fewer --ranks or --threads"
            for host, count in counts.items()
            if count > cores[host]
        ]

    def journal(self) -> Journal:
        return Journal() if self.rank == 0 else NullJournal()

    def claim(self, options: TrainOptions) -> RunFolder:
        """Return the run's folder: claimed on the first rank, a `SharedRunFolder` on the others."""
        mine = RunFolder.claim(options) if self.rank == 0 else None
        path, resumed = self.gather_values([str(mine.path.absolute()), mine.resumed] if mine else None)[0]
        if mine is not None:
            return mine
        if not Path(path).is_dir():
            raise LlmpyError(
                "rank.no-run-folder", f"{path} is missing on this host", "Put the run folder on a shared file system"
            )
        return SharedRunFolder(Path(path), resumed)

    def optimizer(self, model: LanguageModel, o: TrainOptions) -> Zero:
        return Zero(model, self, o.beta1, o.beta2, o.weight_decay, o.clip)

    def checkpoints(
        self, run: Path, model: LanguageModel, optimizer: Any, length: int, journal: Journal, o: TrainOptions
    ) -> CheckpointWriter:
        self._watch.hint = f". Resume, on fewer ranks too, with: {command('train', '--resume', run)}"
        if self.rank == 0:
            launch.leave_word("hint", self._watch.hint)
        return super().checkpoints(run, model, optimizer, length, journal, o)


class Ended(LlmpyError):
    """Another rank or the watchdog ended the run; `Watch.failure` has the cause."""


class NullJournal(Journal):
    """The journal of all ranks but the first, which would print and record the same again."""

    def log(self, line: str = "") -> None:
        pass

    def open(self, folder: Path, sizes: Any = None) -> None:
        pass

    def begin_progress(self) -> None:
        pass


class SharedRunFolder(RunFolder):
    """The run's folder on all ranks but the first: they do not lock, clean or remove it."""

    def __init__(self, path: Path, resumed: bool) -> None:
        super().__init__(path, [])
        self.resumed, self._kept = resumed, True

    def keep(self) -> None:
        pass


def _line(library: str) -> str:
    """Return name and version from MPI's description of its library."""
    return " ".join(library.split("\n")[0].split(",")[0].strip("\0").split())


def join(options: TrainOptions) -> World | None:
    """Initialise MPI; return the ranks started together with this one, or None if it is the only one.

    Raises LlmpyError if MPI is missing or not the launcher's, or if the number of ranks is not the expected one.
    """
    try:
        import mpi4py

        mpi4py.rc(initialize=False, finalize=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # if the launcher is another MPI's: see below
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no library
        variable = next(filter(os.environ.get, (*launch.TASKS, "PMIX_RANK")), launch.PARENT)
        what = f"several ranks ({variable} is set) need mpi4py and an MPI library"
        hint = f"For a single process, use --ranks 1. For several, install them: {install(launch.MPI)}"
        raise LlmpyError("package.missing", what, hint) from error
    library = _line(MPI.Get_library_version())
    if launch.OPEN_MPI in os.environ and "Open MPI" not in library:  # MPICH would end the process here
        what = f"the launcher is Open MPI's, but mpi4py uses another MPI: {library}"
        raise LlmpyError("mpi.mismatch", what, "Use the mpiexec of the same MPI")
    with signals_held_back():  # restores our handlers afterwards: MPICH would swallow SIGHUP
        if MPI.Init_thread(MPI.THREAD_MULTIPLE) < MPI.THREAD_SERIALIZED:
            raise LlmpyError("mpi.no-threads", f"{library} allows one thread only", "Use an MPI built with threads")
    size, expected = MPI.COMM_WORLD.Get_size(), launch.tasks()
    if size == 1 and expected > 1:
        raise LlmpyError(
            "mpi.one-rank",
            f"the launcher started {expected} tasks, but MPI finds one rank: each would write to the same folder",
            "Use the mpiexec of the same MPI, srun --mpi=pmix (Open MPI) or srun --mpi=pmi2 (MPICH). For a single "
            "process, use --ranks 1",
        )
    if "ranks" in options.given and options.ranks != size:
        what = f"--ranks {options.ranks}, but the launcher started {size}"
        raise LlmpyError("rank.count", what, "Leave --ranks out or correct it")
    return World(MPI, options.rank_timeout) if size > 1 else None
