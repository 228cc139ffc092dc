"""Who starts the ranks, and whether there are as many as the scheduler thinks.

llmpy train --ranks 4         finds mpiexec next to this Python (the wheels put it there) or on PATH, starts itself four
                              times under it, and waits: it passes signals to the first rank, and prints in one line
                              what ended the ranks, whatever mpiexec prints
mpiexec -n 4 llmpy train …    by hand, or srun: the environment says that there are others

If the scheduler says four and MPI says one, four runs would write to one folder: `world.join` refuses that.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import psutil

from ..errors import LlmpyError, Stopped
from ..system.command import install
from ..system.interrupts import on_signal
from ..system.lock import Lock

PARENT = "LLMPY_LAUNCH"  # the folder where ranks leave word for the process that started them
# How many tasks there are, as launchers and schedulers tell it; the first that is set counts.
OPEN_MPI = "OMPI_COMM_WORLD_SIZE"  # set by its mpiexec alone
TASKS = (
    OPEN_MPI, "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "FLUX_JOB_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS",
)  # fmt: skip
# Open MPI binds each rank to one core and refuses more ranks than cores, and root: in a container all are root.
OPEN_MPI_SETTINGS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none", "OMPI_MCA_rmaps_base_oversubscribe": "1",  # up to version 4
    "PRTE_MCA_hwloc_default_binding_policy": "none", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}  # fmt: skip
LOOK = 0.2  # seconds
FAREWELL = 0.5  # seconds for an error to reach all ranks before the first of them ends and mpiexec kills the others
MPI = "llmpy[mpi]"  # the extra


def tasks(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many processes the environment says there are; 1 where it says nothing."""
    told = (environment.get(name, "") for name in TASKS)
    return next((int(text) for text in told if text.isdecimal() and int(text) > 0), 1)


def needed(ranks: int, given: bool, environment: Mapping[str, str] = os.environ) -> str:
    """Return what to do: "launch" ranks, "join" those that are there, or be "alone".

    `given`: the user said --ranks; then 1 is one process whatever the scheduler says.
    """
    if PARENT in environment:
        return "join"
    if given and ranks == 1:
        return "alone"
    # A batch script has SLURM_NTASKS too, but is one process: there --ranks may still be meant to launch them.
    launched = {name: text for name, text in environment.items() if name != "SLURM_NTASKS"}
    if "PMIX_RANK" in environment or tasks(launched if given else environment) > 1:
        return "join"
    return "launch" if ranks > 1 else "alone"


def mpiexec() -> str:
    """Return the mpiexec next to this Python, else the one on PATH. Raises LlmpyError if it or mpi4py is missing."""
    if importlib.util.find_spec("mpi4py") is None:
        raise LlmpyError(
            "distributed.x", "training by several processes needs mpi4py and an MPI", f"Install them: {install(MPI)}"
        )
    found = shutil.which("mpiexec", path=sysconfig.get_path("scripts")) or shutil.which("mpiexec")
    if found is None:
        raise LlmpyError(
            "distributed.x",
            "there is no mpiexec, neither beside this Python nor on PATH",
            f"Install one: {install(MPI)}",
        )
    return found


def run(ranks: int, arguments: Sequence[str]) -> int:
    """Run `llmpy` with these arguments, once for each rank; return the exit code. Raises LlmpyError if ranks failed."""
    command = [mpiexec(), "-n", str(ranks), sys.executable, "-m", "llmpy", *arguments]
    with tempfile.TemporaryDirectory(prefix="llmpy-ranks-") as name:
        folder, signals = Path(name), list[int]()
        lock = Lock(folder / "launcher")
        lock.take()
        environment = OPEN_MPI_SETTINGS | os.environ | {PARENT: name}
        with on_signal(lambda number, _: signals.append(number)):
            # A session of its own: Ctrl-C in a terminal reaches this process alone, which passes it on.
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
            dead = _wait(process, folder, ranks, signals)
        lock.drop()
        if code := _word(folder, "code"):
            return int(code)
        if signals and _word(folder, "stopped"):
            raise Stopped(signals[-1])
        code, _, error = _word(folder, "error").partition(" ")
        raised = LlmpyError(
            "distributed.x", dead or error or f"mpiexec ended with code {process.returncode} before the run did"
        )
        raised.exit_code = int(code or 1)
        raise raised


def _word(folder: Path, name: str) -> str:
    """Return what a rank left here under this name, or ""."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / name).read_text("utf-8")
    return ""


def _wait(process: subprocess.Popen[bytes], folder: Path, ranks: int, signals: list[int]) -> str:
    """Wait for mpiexec while passing on the signals that come; return which rank died first, or "".

    MPICH's mpiexec kills the others within a millisecond of a death and prints a PID alone; where the system can wait
    for a process that is no child, this one sees who was first.
    """
    ranks_by_handle: dict[int, tuple[int, str]] = {}
    dead, passed = "", 0
    poll = select.epoll() if hasattr(os, "pidfd_open") else None
    while process.poll() is None:
        for number in signals[passed:]:
            passed += 1
            _pass_on(number, process, folder, passed > 1)
        if poll is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LOOK)
            continue
        known = [rank for rank, _ in ranks_by_handle.values()]
        for rank in range(ranks if len(known) < ranks else 0):
            if rank not in known and (pid := _word(folder, f"rank-{rank}")):
                with contextlib.suppress(ProcessLookupError):
                    handle = os.pidfd_open(int(pid))
                    ranks_by_handle[handle] = rank, pid
                    poll.register(handle, select.EPOLLIN)
        for handle, _ in poll.poll(LOOK):  # in the order in which they ended
            poll.unregister(handle)
            if not (dead or _word(folder, "code") or _word(folder, "error")):
                rank, pid = ranks_by_handle[handle]
                dead = f"rank {rank} (process {pid}) has died" + _word(folder, "hint")
    for handle in ranks_by_handle:
        os.close(handle)
    return dead


def _pass_on(number: int, process: subprocess.Popen[bytes], folder: Path, again: bool) -> None:
    """Pass a signal to the first rank, which tells the others; before it has started, end all at once.

    Leaves word if the signal ends the ranks at once: without a rank, and as any after the first but SIGHUP does (see
    `StopSignals`). A rank that has nothing to save leaves it itself. mpiexec sends ranks signals of its own.
    """
    at_once = again and signal.Signals(number).name != "SIGHUP"
    try:
        os.kill(int(_word(folder, "rank-0")), number)
    except (OSError, ValueError):
        at_once = True
        _kill(process)
    if at_once:
        (folder / "stopped").write_text(str(number))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill mpiexec and all below it: ranks that MPI is bringing together may wait for ever for those that ended."""
    family = [psutil.Process(process.pid)]
    for one in family:  # which grows meanwhile: a suspended process starts no other
        with contextlib.suppress(psutil.Error):
            one.suspend()
            family += one.children()
    for one in family:
        with contextlib.suppress(psutil.Error):
            one.kill()


def leave_word(name: str, text: str) -> bool:
    """Leave something to read for the process that started the ranks; False where they were started by hand."""
    folder = os.environ.get(PARENT)
    if folder is None:
        return False
    temporary = Path(folder, f".{name}-{os.getpid()}")
    with contextlib.suppress(OSError):
        temporary.write_text(text, "utf-8")
        temporary.replace(Path(folder, name))
    return True


def end_with_parent() -> None:
    """If the process that started the ranks was killed, end as if by SIGTERM, with a checkpoint."""
    folder = Path(os.environ.get(PARENT, "/nowhere"))
    if folder.is_dir() and Lock(folder / "launcher").take():
        shutil.rmtree(folder, ignore_errors=True)  # nobody else does; and once is enough
        os.kill(os.getpid(), signal.SIGTERM)


def conclude(code: int) -> int:
    """Return the exit code of a rank of a run that ended well: 0 if the process that started the ranks has the code."""
    return 0 if leave_word("code", str(code)) else code


def leave(message: str, code: int, speaks: bool) -> NoReturn:
    """End this process without MPI's farewell, which would wait for ranks that are gone.

    The message is left for the process that started the ranks; without one, the rank that `speaks` prints it.
    """
    line = " ".join(message.split())
    with contextlib.suppress(OSError, ValueError):
        if not leave_word("error", f"{code} {line}") and speaks:
            os.write(2, f"llmpy: error: {line}\n".encode())
        sys.stdout.flush()
        sys.stderr.flush()
    time.sleep(FAREWELL)
    os._exit(code)
