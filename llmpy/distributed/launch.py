"""Start the ranks, or detect that a launcher has started them.

llmpy train --ranks 4         runs itself four times under mpiexec (next to this Python, where the wheels put it, or on
                              PATH), forwards signals to the first rank, and prints one line if the ranks fail
mpiexec -n 4 llmpy train …    by hand, or srun: detected from the environment

If the scheduler started four tasks but MPI finds one, four runs would write to one folder: `world.join` refuses that.
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
from ..system.terminal import printable

PARENT = "LLMPY_LAUNCH"  # the folder for files from the ranks to the process that started them
OPEN_MPI = "OMPI_COMM_WORLD_SIZE"  # set by its mpiexec alone
TASKS = (  # variables of launchers and schedulers; the first that is set counts
    OPEN_MPI, "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "FLUX_JOB_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS",
)  # fmt: skip
# By default Open MPI binds each rank to one core, and refuses more ranks than cores and root (the user of containers).
OPEN_MPI_SETTINGS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none", "OMPI_MCA_rmaps_base_oversubscribe": "1",  # up to version 4
    "PRTE_MCA_hwloc_default_binding_policy": "none", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}  # fmt: skip
POLL = 0.2  # seconds
FAREWELL = 0.5  # seconds for an error to reach all ranks before the first of them exits and mpiexec kills the others
MPI = "llmpy[mpi]"  # the extra


def tasks(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of processes according to the environment; 1 if it has none of TASKS."""
    values = (environment.get(name, "") for name in TASKS)
    return next((int(text) for text in values if text.isdecimal() and int(text) > 0), 1)


def needed(ranks: int, given: bool, environment: Mapping[str, str] = os.environ) -> str:
    """Return "launch" (start ranks), "join" (ranks are running) or "alone".

    `given`: --ranks is set; `--ranks 1` then overrides the scheduler.
    """
    if PARENT in environment:
        return "join"
    if given and ranks == 1:
        return "alone"
    # A batch script has SLURM_NTASKS too, but is one process: --ranks launches ranks there.
    launched = {name: text for name, text in environment.items() if name != "SLURM_NTASKS"}
    if "PMIX_RANK" in environment or tasks(launched if given else environment) > 1:
        return "join"
    return "launch" if ranks > 1 else "alone"


def mpiexec() -> str:
    """Return the mpiexec next to this Python, else the one on PATH. Raises LlmpyError if it or mpi4py is missing."""
    hint = f"Install them: {install(MPI)}"
    if importlib.util.find_spec("mpi4py") is None:
        raise LlmpyError("package.missing", "several ranks need mpi4py and an MPI library", hint)
    found = shutil.which("mpiexec", path=sysconfig.get_path("scripts")) or shutil.which("mpiexec")
    if found is None:
        raise LlmpyError("mpi.no-mpiexec", "mpiexec is neither next to this Python nor on PATH", hint)
    return found


def run(ranks: int, arguments: Sequence[str]) -> int:
    """Run `llmpy` with these arguments on every rank; return the exit code. Raises LlmpyError if ranks failed."""
    command = [mpiexec(), "-n", str(ranks), sys.executable, "-m", "llmpy", *arguments]
    with tempfile.TemporaryDirectory(prefix="llmpy-ranks-") as name:
        folder, signals = Path(name), list[int]()
        lock = Lock(folder / "launcher")
        lock.take()
        environment = OPEN_MPI_SETTINGS | os.environ | {PARENT: name}
        with on_signal(lambda number, _: signals.append(number)):
            # In its own session: Ctrl-C in a terminal reaches this process only, which forwards it.
            try:
                process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
            except OSError as full:
                why, hint = f"mpiexec cannot be started: {full.strerror}", "Raise `ulimit -u`, or use --ranks 1"
                raise LlmpyError("mpi.failed", why, hint) from full
            dead = _wait(process, folder, ranks, signals)
        lock.drop()
        if code := _word(folder, "code"):
            return int(code)
        if signals and _word(folder, "stopped"):
            raise Stopped(signals[-1])
        exited = f"1 mpi.failed mpiexec exited with code {process.returncode} before the run ended"
        exit_code, code, text = (_word(folder, "error") or exited).split(" ", 2)
        error = LlmpyError("rank.died", dead) if dead else LlmpyError(code, text)
        error.exit_code = int(exit_code)
        raise error


def _word(folder: Path, name: str) -> str:
    """Return the text that a rank wrote under this name, or ""."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / name).read_text("utf-8")
    return ""


def _wait(process: subprocess.Popen[bytes], folder: Path, ranks: int, signals: list[int]) -> str:
    """Wait for mpiexec and forward signals; return an error naming the rank that died first, or "".

    MPICH's mpiexec kills the others within a millisecond and prints a PID. On Linux a pidfd shows which one was first.
    """
    ranks_by_handle: dict[int, tuple[int, str]] = {}
    dead, forwarded = "", 0
    poll = select.epoll() if hasattr(os, "pidfd_open") else None
    while process.poll() is None:
        for number in signals[forwarded:]:
            forwarded += 1
            _forward(number, process, folder, forwarded > 1)
        if poll is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL)
            continue
        known = [rank for rank, _ in ranks_by_handle.values()]
        for rank in range(ranks if len(known) < ranks else 0):
            if rank not in known and (pid := _word(folder, f"rank-{rank}")):
                with contextlib.suppress(ProcessLookupError):
                    handle = os.pidfd_open(int(pid))
                    ranks_by_handle[handle] = rank, pid
                    poll.register(handle, select.EPOLLIN)
        for handle, _ in poll.poll(POLL):  # in the order in which they ended
            poll.unregister(handle)
            if not (dead or _word(folder, "code") or _word(folder, "error")):
                rank, pid = ranks_by_handle[handle]
                dead = f"rank {rank} (process {pid}) died" + _word(folder, "hint")
    for handle in ranks_by_handle:
        os.close(handle)
    return dead


def _forward(number: int, process: subprocess.Popen[bytes], folder: Path, again: bool) -> None:
    """Send a signal to the first rank, and through it to the others; kill all if that rank is not running.

    Writes "stopped" if the signal ends the ranks at once, as any but the first and SIGHUP does (see `StopSignals`).
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
    """Kill mpiexec and its descendants: inside MPI_Init, ranks may wait forever for a dead one."""
    family = [psutil.Process(process.pid)]
    for one in family:  # grows in the loop; a suspended process starts no other
        with contextlib.suppress(psutil.Error):
            one.suspend()
            family += one.children()
    for one in family:
        with contextlib.suppress(psutil.Error):
            one.kill()


def leave_word(name: str, text: str) -> bool:
    """Write text for the process that started the ranks; return False if they were started by hand."""
    folder = os.environ.get(PARENT)
    if folder is None:
        return False
    temporary = Path(folder, f".{name}-{os.getpid()}")
    with contextlib.suppress(OSError):
        temporary.write_text(text, "utf-8")
        temporary.replace(Path(folder, name))
    return True


def end_with_parent() -> None:
    """If the process that started the ranks was killed, send this one SIGTERM: it stops with a checkpoint."""
    folder = Path(os.environ.get(PARENT, "/nowhere"))
    if folder.is_dir() and Lock(folder / "launcher").take():
        shutil.rmtree(folder, ignore_errors=True)  # its owner is gone; also prevents a second SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)


def conclude(code: int) -> int:
    """Return the exit code of a rank whose run succeeded: 0 if the process that started the ranks received `code`."""
    return 0 if leave_word("code", str(code)) else code


def leave(code: str, message: str, exit_code: int, prints: bool) -> NoReturn:
    """Report to the launching process, or print if `prints`; exit without MPI_Finalize: it waits for dead ranks."""
    line = printable(" ".join(message.split()))
    with contextlib.suppress(OSError, ValueError):
        if not leave_word("error", f"{exit_code} {code} {line}") and prints:
            os.write(2, f"llmpy: error: {line} [{code}]\n".encode())
        sys.stdout.flush()
        sys.stderr.flush()
    time.sleep(FAREWELL)
    os._exit(exit_code)
