"""What ranks tell each other, over MPI.

Every call of MPI here returns at once and is asked again until it is done: a message that never comes can then be
given up when `watch` knows why, and a core that waits is free for whoever computes on it (the libraries' own waiting
turns in a loop). Large messages are carried by one thread of the rank, in the order in which they were handed to it;
the numbers by which ranks agree have a communicator of their own. mpi4py is imported in `join` and not before.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
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
from ..system.resources import cores
from ..train.single_process import SingleProcess
from . import launch
from .watchdog import Fault, Watch, end
from .zero import Zero

LOOKS = 50  # at a request in a row before sleeping: an answer from this host mostly comes sooner
NAP = 1e-4  # seconds
WORD_OF_DEATH = 3.0  # to learn from the watch whose fault it is when MPI finds one
MESSAGE = 1 << 28  # bytes of one message: MPI counts in 32 bits


class World(SingleProcess):
    """All ranks of a run. A context manager: whatever fault leaves it on one rank ends all of them."""

    def __init__(self, mpi: Any, patience: float) -> None:
        """`mpi` is mpi4py's module; the ranks are those of COMM_WORLD. Raises LlmpyError if they cannot be watched."""
        self._mpi = mpi
        self._lock = threading.Lock()  # one thread at a time inside MPI
        self._words, self._loads = mpi.COMM_WORLD.Dup(), mpi.COMM_WORLD.Dup()
        self.rank, self.size = mpi.COMM_WORLD.Get_rank(), mpi.COMM_WORLD.Get_size()
        self._watch: Watch | None = None
        self._threaded = mpi.Query_thread() >= mpi.THREAD_SERIALIZED
        self._runner = ThreadPoolExecutor(1, thread_name_prefix="courier")
        self._carried = self._waited = 0.0  # seconds
        mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._ranks = self.tell({"host": socket.gethostname(), "cores": mine, "available": cores()})
        local = [q for q, about in enumerate(self._ranks) if about["host"] == self._ranks[self.rank]["host"]]
        self.local_rank, self.local_size = local.index(self.rank), len(local)
        self._watch = Watch(self.rank, self.size, patience, self.tell)
        launch.leave_word(f"rank-{self.rank}", str(os.getpid()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, fault: BaseException | None, _: TracebackType | None) -> None:
        watch = self._watch
        assert watch is not None
        if fault is None:
            self.gather(0)
            watch.close()
            self._runner.shutdown()
            return
        if not isinstance(fault, Ended):
            import traceback

            known = isinstance(fault, LlmpyError)
            if not known:
                traceback.print_exception(fault)
            name = "" if self.rank == 0 else f"rank {self.rank} on {socket.gethostname()}: "
            text = str(fault) if known else f"{type(fault).__name__}: {fault}"
            watch.say(Fault(self.rank, name + text, getattr(fault, "code", 130 if kind is KeyboardInterrupt else 1)))
        assert watch.fault is not None
        end(watch, watch.fault)

    def _wait(self, requests: Sequence[Any]) -> None:
        """Until all are done. Raises Ended if the world ends before."""
        looks = 0
        try:
            while True:
                with self._lock:
                    if self._mpi.Request.Testall(requests):
                        return
                looks += 1
                if looks > LOOKS:
                    if self._watch is not None and self._watch.fault is not None:
                        raise Ended
                    time.sleep(NAP)
                else:
                    time.sleep(0)
        except self._mpi.Exception as fault:
            self._mourn(fault)

    def _mourn(self, fault: Exception) -> None:
        """MPI found something broken, mostly somebody dead: say who it is, if the watch learns it."""
        until = time.monotonic() + WORD_OF_DEATH
        while self._watch is not None and self._watch.fault is None and time.monotonic() < until:
            time.sleep(NAP)
        if self._watch is not None and self._watch.fault is not None:
            raise Ended from fault
        raise LlmpyError(f"MPI: {fault}", "see what mpiexec printed") from fault

    def gather(self, *numbers: float) -> list[tuple[float, ...]]:
        """See `SingleProcess`, as for all that have no text here."""
        start = time.perf_counter()
        mine = np.asarray(numbers, np.float64)
        all_of_them = np.empty((self.size, mine.size))
        with self._lock:
            request = self._words.Iallgather(mine, all_of_them)
        self._wait([request])
        self._waited += time.perf_counter() - start
        return [tuple(row) for row in all_of_them.tolist()]

    def tell(self, value: Any) -> list[Any]:
        mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
        counts = [int(count) for (count,) in self.gather(mine.size)]
        texts = np.empty(sum(counts), np.uint8)
        with self._lock:
            request = self._words.Iallgatherv(mine, [texts, counts])
        self._wait([request])
        return [json.loads(part.tobytes()) for part in np.split(texts, np.cumsum(counts)[:-1])]

    def exchange(self, tag: int, outgoing: Sequence[Any], incoming: Sequence[Any]) -> None:
        """See `zero.Courier`."""
        others = [(self.rank + i) % self.size for i in range(1, self.size)]  # not all to the same one first
        requests = []
        try:
            with self._lock:
                for q in others:
                    requests += [self._loads.Irecv([x, self._mpi.BYTE], q, tag) for x in _messages(incoming[q])]
                for q in others:
                    requests += [self._loads.Isend([x, self._mpi.BYTE], q, tag) for x in _messages(outgoing[q])]
        except self._mpi.Exception as fault:
            self._mourn(fault)
        self._wait(requests)

    def submit(self, job: Callable[[], None]) -> Future[None]:
        """See `zero.Courier`. An MPI that allows a single thread only gets the job now, and nothing overlaps."""

        def timed() -> None:
            start = time.perf_counter()
            try:
                job()
            finally:
                self._carried += time.perf_counter() - start

        if self._threaded:
            return self._runner.submit(timed)
        done: Future[None] = Future()
        timed()
        done.set_result(None)
        return done

    def result(self, future: Future[None]) -> None:
        """See `zero.Courier`."""
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
        yield from self._after(self.local_rank == 0)

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
        beside = [about for about in self._ranks if about["host"] == mine["host"]]
        sharing = sum(not mine["cores"] or bool({*mine["cores"]} & {*about["cores"]}) for about in beside)
        return max(1, int(mine["available"]) // sharing)

    def lines(self, threads: int) -> list[str]:
        return [self._describe(), *self._crowded(threads)]

    def _crowded(self, threads: int) -> list[str]:
        """A warning for every host whose ranks have more threads together than it has cores."""
        hosts = Counter[str]()
        for (count,), about in zip(self.gather(threads), self._ranks, strict=True):
            hosts[about["host"]] += int(count)
        physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
        counts = {about["host"]: count for about, count in zip(self._ranks, self.tell(physical), strict=True)}
        return [
            f"warning: the ranks on {host} have {count} threads together and {counts[host]} cores: they will wait for "
            "each other; use fewer --ranks or --threads"
            for host, count in hosts.items()
            if count > counts[host]
        ]

    def _describe(self) -> str:
        hosts = Counter(about["host"] for about in self._ranks)
        where = ", ".join(f"{count} on {host}" for host, count in hosts.items())
        overlap = "" if self._threaded else "; it allows one thread alone: communication overlaps with nothing"
        return f"ranks    {self.size}: {where}; {_line(self._mpi.Get_library_version())}{overlap}"

    def journal(self) -> Journal:
        return Journal() if self.rank == 0 else Mute()

    def claim(self, options: TrainOptions) -> RunFolder:
        """The run's folder: the first rank has it, the others write into it what they are told to."""
        mine = RunFolder.claim(options) if self.rank == 0 else None
        path, resumed = self.tell([str(mine.path.absolute()), mine.resumed] if mine else None)[0]
        if mine is not None:
            return mine
        if not Path(path).is_dir():
            raise LlmpyError(f"{path} is not there", "let all hosts have the run folder, on a shared file system")
        return Lent(Path(path), resumed)

    def optimizer(self, model: GPT2, o: TrainOptions) -> Zero:
        return Zero(model, self, o.beta1, o.beta2, o.weight_decay, o.clip)

    def checkpoints(
        self, run: Path, model: GPT2, optimizer: Any, length: int, journal: Journal, o: TrainOptions
    ) -> CheckpointWriter:
        assert self._watch is not None
        self._watch.hint = f" — go on, on fewer ranks too, with: {command('train', '--resume', run)}"
        if self.rank == 0:
            launch.leave_word("hint", self._watch.hint)
        return super().checkpoints(run, model, optimizer, length, journal, o)


class Ended(LlmpyError):
    """Another rank, or the watch, has ended the run: `Watch.fault` says why."""

    def __init__(self) -> None:
        super().__init__("another rank has ended the run")


class Mute(Journal):
    """What the other ranks say and record: nothing, for it would be the same."""

    def say(self, line: str = "") -> None:
        pass

    def open(self, folder: Path, sizes: Any = None) -> None:
        pass

    def begin_progress(self) -> None:
        pass


class Lent(RunFolder):
    """The run's folder on the other ranks, which neither clean it nor remove it."""

    def __init__(self, path: Path, resumed: bool) -> None:
        super().__init__(path, [])
        self.resumed, self._kept = resumed, True

    def keep(self) -> None:
        pass

    def discard(self) -> None:
        pass


def _messages(x: Any) -> list[Any]:
    """An array as messages that MPI can count; none for one without elements."""
    data = x.reshape(-1).view(np.uint8)
    return [data[i : i + MESSAGE] for i in range(0, data.size, MESSAGE)]


@contextlib.contextmanager
def _own_hangup() -> Iterator[None]:
    """Within: MPICH begins, which from then on would swallow SIGHUP."""
    number = getattr(signal, "SIGHUP", None)  # not on Windows
    before = signal.getsignal(number) if number is not None else None
    yield
    if number is not None and before is not None:
        signal.signal(number, before)


def _mpi() -> Any:
    """mpi4py's module, initialised. Raises LlmpyError if it is not there, or not the launcher's."""
    try:
        import mpi4py

        mpi4py.rc(initialize=False, finalize=True)
        from mpi4py import MPI
    except ImportError as fault:
        raise LlmpyError("training by several processes needs mpi4py", f"install it: {install(launch.MPI)}") from fault
    except RuntimeError as fault:  # mpi4py finds no library
        raise LlmpyError(f"mpi4py finds no MPI: {fault}", f"install one: {install(launch.MPI)}") from fault
    library = MPI.Get_library_version()
    if launch.OPEN_MPI in os.environ and "Open MPI" not in library:  # MPICH would end the process here
        raise LlmpyError(
            f"the launcher is Open MPI's, but mpi4py has found another MPI: {_line(library)}",
            "use the mpiexec of the same MPI",
        )
    if not MPI.Is_initialized():
        with _own_hangup():
            MPI.Init_thread(MPI.THREAD_MULTIPLE)
    return MPI


def _line(library: str) -> str:
    """Name and version, of all that MPI says of its library."""
    return " ".join(library.split("\n")[0].split(",")[0].strip("\0").split())


def join(options: TrainOptions) -> World | None:
    """The ranks that were started with this one, None if it is the only one.

    Raises LlmpyError if there are not as many as somebody thinks.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of mpi4py, where the launcher is another MPI's: see below
        MPI = _mpi()
    size, expected = MPI.COMM_WORLD.Get_size(), launch.tasks()
    if size == 1 and expected > 1:
        raise LlmpyError(
            f"the launcher says {expected} tasks, but MPI sees one: {expected} runs would write to one folder",
            "use the mpiexec of the same MPI, or srun --mpi=pmix (Open MPI) or --mpi=pmi2 (MPICH); or, if one process "
            "is meant, say --ranks 1",
        )
    if "ranks" in options.given and options.ranks != size:
        raise LlmpyError(f"--ranks {options.ranks}, but {size} were started", "leave --ranks out, or let them agree")
    return World(MPI, options.rank_timeout) if size > 1 else None
