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
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..errors import LlmpyError

PARENT = "LLMPY_LAUNCH"  # PID of who started the ranks, and the folder where they leave word for it
# How many tasks there are, as launchers and schedulers tell it; the first that is set counts.
TASKS = (
    "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "FLUX_JOB_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS",
)  # fmt: skip
EXTRA = "pip install 'llmpy[mpi]'"


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
        raise LlmpyError("training by several processes needs mpi4py and an MPI", f"install them: {EXTRA}")
    beside = Path(sysconfig.get_path("scripts"), "mpiexec.exe" if os.name == "nt" else "mpiexec")
    found = beside if beside.is_file() else shutil.which("mpiexec")
    if not found:
        raise LlmpyError("there is no mpiexec, neither beside this Python nor on PATH", f"install one: {EXTRA}")
    return Path(found)


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
    command = [str(launcher), *options, "-n", str(ranks), sys.executable, "-m", "llmpy.cli", *arguments]
    with tempfile.TemporaryDirectory(prefix="llmpy-ranks-") as name:
        folder = Path(name)
        environment = {**os.environ, **environment, PARENT: f"{os.getpid()}:{folder}"}
        # A session of its own: Ctrl-C in a terminal reaches this process alone, which hands it on.
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        with _handing_on(folder, process):
            code = process.wait()
        with contextlib.suppress(FileNotFoundError, ValueError):
            code = int((folder / "code").read_text())
        fault = folder / "fault"
        if fault.exists() or (code and not (folder / "code").exists()):
            text = fault.read_text("utf-8") if fault.exists() else f"mpiexec ended with code {code} before the run did"
            error = LlmpyError(text)
            error.code = code or 1
            raise error
        return code


@contextlib.contextmanager
def _handing_on(folder: Path, process: subprocess.Popen[bytes]) -> Any:
    """Within: signals go to the first rank, which tells the others; before it has begun, to the launcher."""

    def hand_on(number: int, _frame: Any) -> None:
        try:
            os.kill(int((folder / "first").read_text()), number)
        except (OSError, ValueError):
            process.send_signal(number)

    numbers = [n for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
    before = {getattr(signal, n): signal.signal(getattr(signal, n), hand_on) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parent() -> tuple[int, Path] | None:
    """PID and folder of who started the ranks; None where they were started by hand."""
    pid, colon, folder = os.environ.get(PARENT, "").partition(":")
    return (int(pid), Path(folder)) if colon else None


def arrive() -> None:
    """The first rank is there: signals may go to it."""
    if parent := _parent():
        (parent[1] / "first").write_text(str(os.getpid()))


def end_with_parent() -> None:
    """Where who started the ranks was killed: end as if by SIGTERM, with a checkpoint."""
    parent = _parent()
    if parent is not None and os.name == "posix" and (parent[1] / "first").is_file():
        try:
            os.kill(parent[0], 0)
        except ProcessLookupError:
            os.kill(os.getpid(), signal.SIGTERM)
            (parent[1] / "first").unlink(missing_ok=True)  # once is enough


def report(message: str) -> None:
    """The fault that ends all ranks, in one line: to who started them, or on stderr."""
    line = " ".join(message.split())
    if parent := _parent():
        with contextlib.suppress(OSError):
            temporary = parent[1] / f".fault-{os.getpid()}"
            temporary.write_text(line, "utf-8")
            temporary.replace(parent[1] / "fault")
            return
    with contextlib.suppress(OSError):
        os.write(2, f"llmpy: error: {line}\n".encode())


def conclude(code: int) -> int:
    """The exit code of a rank of a run that ended well: who started the ranks is told, and then 0 serves them."""
    if parent := _parent():
        with contextlib.suppress(OSError):
            (parent[1] / "code").write_text(str(code))
        return 0
    return code


def leave(code: int) -> NoReturn:
    """End this process without MPI's farewell, which would wait for who is gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    conclude(code)
    os._exit(code)
