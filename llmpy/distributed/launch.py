"""Who starts the ranks, and whether there are as many as the scheduler thinks.

llmpy train --ranks 4         finds mpiexec beside this Python (the wheels put it there) or on PATH, starts itself four
                              times under it, and waits: signals go on to the first rank, and what ended the ranks is
                              told here in one line, whatever the launcher prints
mpiexec -n 4 llmpy train …    by hand, or srun: the environment tells that there are others

If the scheduler says four and MPI says one, four runs would write to one folder: that is refused in `world.join`.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil

from ..errors import LlmpyError, Stopped
from ..system.command import install

PARENT = "LLMPY_LAUNCH"  # PID of who started the ranks, and the folder where they leave word for it
# How many tasks there are, as launchers and schedulers tell it; the first that is set counts.
OPEN_MPI = "OMPI_COMM_WORLD_SIZE"  # set by its mpiexec alone
TASKS = (
    OPEN_MPI, "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "FLUX_JOB_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS",
)  # fmt: skip
LOOK = 0.2  # seconds
MPI = "llmpy[mpi]"  # the extra


def tasks(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes the environment says there are; 1 where it says nothing."""
    told = (environment.get(name, "") for name in TASKS)
    return next((int(text) for text in told if text.isdecimal() and int(text) > 0), 1)


def needed(ranks: int, given: bool, environment: Mapping[str, str] = os.environ) -> str:
    """What is to be done: "launch" ranks, "join" those that are there, or be "alone".

    `given`: the user said --ranks himself; then 1 is one process whatever the scheduler says.
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


def mpiexec() -> Path:
    """The launcher that belongs to this environment. Raises LlmpyError if there is none, or no mpi4py."""
    if importlib.util.find_spec("mpi4py") is None:
        raise LlmpyError("training by several processes needs mpi4py and an MPI", f"install them: {install(MPI)}")
    found = find_mpiexec()
    if found is None:
        raise LlmpyError("there is no mpiexec, neither beside this Python nor on PATH", f"install one: {install(MPI)}")
    return found


def find_mpiexec() -> Path | None:
    """The launcher that the wheels put beside this Python, else the one on PATH."""
    found = shutil.which("mpiexec", path=sysconfig.get_path("scripts")) or shutil.which("mpiexec")
    return Path(found) if found else None


def flags(launcher: Path) -> tuple[list[str], dict[str, str]]:
    """What this launcher needs to start ranks on one machine as they are wanted: arguments and environment."""
    told = subprocess.run([launcher, "--version"], capture_output=True, text=True, timeout=60)
    if "Open MPI" not in told.stdout and "OpenRTE" not in told.stdout and "prte" not in told.stdout.lower():
        return [], {}
    # Open MPI binds each rank to one core, refuses more ranks than cores, and root: in a container all are root.
    environment = {}
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        environment = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return ["--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"], environment


def run(ranks: int, arguments: Sequence[str]) -> int:
    """`llmpy` with these arguments, once for each rank; returns the exit code."""
    launcher = mpiexec()
    options, environment = flags(launcher)
    command = [str(launcher), *options, "-n", str(ranks), sys.executable, "-m", "llmpy", *arguments]
    with tempfile.TemporaryDirectory(prefix="llmpy-ranks-") as name:
        folder = Path(name)
        environment = {**os.environ, **environment, PARENT: f"{os.getpid()}:{folder}"}
        # A session of its own: Ctrl-C in a terminal reaches this process alone, which hands it on.
        launchers: list[subprocess.Popen[bytes]] = []
        with _handing_on(folder, launchers) as handed:
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
            launchers.append(process)
            if _word(folder, "stopped"):  # while it was being started
                _end(process)
            dead = _first_death(folder, process, ranks)
        code, fault, stopped = _word(folder, "code"), _word(folder, "fault"), _word(folder, "stopped")
        if stopped and handed and (dead is not None or fault or not code):
            raise Stopped(handed[-1])
        if dead is not None:
            fault = f"rank {dead[0]} (process {dead[1]}) has died" + _word(folder, "hint")
        elif not fault and not code:
            fault = f"mpiexec ended with code {process.returncode} before the run did"
        if fault:
            error = LlmpyError(fault)
            error.code = int(code) if code and dead is None else 1
            raise error
        return int(code)


def _word(folder: Path, name: str) -> str:
    """What a rank left here under this name, or ""."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / name).read_text("utf-8")
    return ""


def _first_death(folder: Path, process: subprocess.Popen[bytes], ranks: int) -> tuple[int, int] | None:
    """Wait for the launcher; rank and PID of the process that ended first, if it ended before its time.

    MPICH's launcher kills the others within a millisecond of a death and tells a PID alone; where the system can wait
    for a process that is no child, this one sees who was first.
    """
    seen: dict[int, tuple[int, int]] = {}
    dead: tuple[int, int] | None = None
    poll = select.poll() if hasattr(os, "pidfd_open") else None
    while process.poll() is None:
        if poll is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LOOK)
            continue
        for rank in range(ranks if len(seen) < ranks else 0):
            pid = _word(folder, f"rank-{rank}")
            if pid and rank not in {r for r, _ in seen.values()}:
                with contextlib.suppress(ProcessLookupError):
                    handle = os.pidfd_open(int(pid))
                    seen[handle] = rank, int(pid)
                    poll.register(handle, select.POLLIN)
        for handle, _ in poll.poll(1e3 * LOOK):
            poll.unregister(handle)
            if dead is None and not _word(folder, "code"):
                dead = seen[handle]
    for handle in seen:
        os.close(handle)
    return dead


@contextlib.contextmanager
def _handing_on(folder: Path, launchers: list[subprocess.Popen[bytes]]) -> Any:
    """Within: signals go to the first rank, which tells the others; before it has begun they end all at once. Gives the
    list of those that came.

    That they ended the ranks at once is left here as a word: by a rank that has nothing to save yet, or, for it cannot,
    of any signal after the first but SIGHUP (see `trainer.stop_signals`). A launcher sends ranks signals of its own.
    """
    handed: list[int] = []

    def hand_on(number: int, _frame: Any) -> None:
        at_once = bool(handed) and signal.Signals(number).name != "SIGHUP"
        handed.append(number)
        try:
            os.kill(int((folder / "rank-0").read_text()), number)
        except (OSError, ValueError):
            at_once = True
            for process in launchers:
                _end(process)
        if at_once:
            (folder / "stopped").write_text(str(number))

    numbers = [n for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
    before = {getattr(signal, n): signal.signal(getattr(signal, n), hand_on) for n in numbers}
    try:
        yield handed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the launcher and all below it. Told by it, ranks that MPI is bringing together may wait for ever for those
    that were faster to end.
    """
    family = []
    with contextlib.suppress(psutil.Error):  # it may end at any moment
        family = [psutil.Process(process.pid)] if process.poll() is None else []
    for one in family:  # which grows meanwhile: who is stopped starts nobody else
        with contextlib.suppress(psutil.Error):
            one.suspend()
            family += one.children()
    for one in family:
        with contextlib.suppress(psutil.Error):
            one.kill()


def _parent() -> tuple[int, Path] | None:
    """PID and folder of who started the ranks; None where they were started by hand."""
    pid, colon, folder = os.environ.get(PARENT, "").partition(":")
    return (int(pid), Path(folder)) if colon else None


def leave_word(name: str, text: str) -> bool:
    """Something for who started the ranks to read; False where they were started by hand."""
    parent = _parent()
    if parent is None:
        return False
    temporary = parent[1] / f".{name}-{os.getpid()}"
    with contextlib.suppress(OSError):
        temporary.write_text(text, "utf-8")
        temporary.replace(parent[1] / name)
    return True


def end_with_parent() -> None:
    """Where who started the ranks was killed: end as if by SIGTERM, with a checkpoint."""
    parent = _parent()
    if parent is not None and os.name == "posix" and parent[1].is_dir():
        try:  # dead before anybody asked for its code counts: who started it may wait for our output first
            gone = psutil.Process(parent[0]).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            gone = True
        if gone:
            shutil.rmtree(parent[1], ignore_errors=True)  # it cannot any more; and once is enough
            os.kill(os.getpid(), signal.SIGTERM)


def report(message: str) -> None:
    """The fault that ends all ranks, in one line: to who started them, or on stderr."""
    line = " ".join(message.split())
    if leave_word("fault", line):
        return
    with contextlib.suppress(OSError):
        os.write(2, f"llmpy: error: {line}\n".encode())


def conclude(code: int) -> int:
    """The exit code of a rank of a run that ended well: who started the ranks is told, and then 0 serves them."""
    return 0 if leave_word("code", str(code)) else code


def leave(code: int) -> NoReturn:
    """End this process without MPI's farewell, which would wait for who is gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    conclude(code)
    os._exit(code)
