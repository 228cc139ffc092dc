"""`llmpy doctor`: what training finds on this machine, and for each problem its fix.

ok       as it should be
note     training works; something could be faster, or is not installed
fault    something prevents training: exit code 1

Nothing is installed, removed or downloaded; the hub is asked whether it answers (HEAD of its address).
"""

from __future__ import annotations

import http.client
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import psutil

from .. import backend
from ..backend.machine import Machine
from ..distributed import launch
from ..errors import LlmpyError
from ..model.config import ModelConfig
from ..options.tools import DoctorOptions
from ..options.train import DEFAULT_MODEL, TrainOptions
from ..run.trackers import PACKAGES
from ..system.cache import data_cache, user_cache
from ..system.command import command, install
from ..system.download import hub
from ..system.resources import container_cores, container_memory, cpu_name
from ..system.terminal import paint
from ..system.words import gigabytes
from ..train.memory import PROGRAM_BYTES, disk_needed, memory_of
from ..train.start import BUILTIN_VOCAB
from ..version import __version__

OK, NOTE, FAULT = "ok", "note", "fault"
STYLES = {OK: "green", NOTE: "yellow", FAULT: "red"}
SCALING = 0.75  # of as many times the peak of one thread as there are threads: less means shared cores
BUSY = 0.25  # cores that others use: from here on it is told
CACHE_LARGE = 1 << 30  # bytes of compiled kernels: builds of earlier versions are never removed
COMPILED = 20 << 20  # bytes of one build, roughly
NETWORK_SECONDS, MPI_SECONDS = 4.0, 10.0
REQUIREMENT = re.compile(r"([\w.-]+)\s*([^;]*?)\s*(?:;.*extra\s*==\s*['\"](\w+)['\"])?$")
MPI = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: how it is, what was found, what to do about it, and the numbers."""

    name: str
    state: str
    found: str
    fix: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


Load = Callable[..., Any]  # `backend.load`


def doctor(options: DoctorOptions, load: Load = backend.load) -> list[Check]:
    """Every check, in the order of the report; one that raises a fault of the system is one."""
    o = options
    checks: list[Check] = []
    machine: list[Machine] = []

    def look(name: str, check: Callable[..., Iterator[Check]], *arguments: Any) -> None:
        try:
            checks.extend(check(*arguments))
        except (LlmpyError, OSError, ImportError) as fault:
            what, _, fix = str(fault).partition(" — ")
            checks.append(Check(name, FAULT, f"{type(fault).__name__}: {what}", fix or "reinstall llm.py"))

    look("program", program)
    look("packages", packages)
    look("cpu", cpu, load, o, machine)
    if machine:
        look("threads", threads, machine[0])
        look("peaks", peaks, machine[0], load)
        look("memory", memory, machine[0])
    look("kernel cache", kernel_cache)
    look("data cache", data_folder)
    look("disk", disk)
    look("MPI", mpi)
    if o.network:
        look("network", network)
    return checks


def program() -> Iterator[Check]:
    """Version, Python, system."""
    bits = 64 if sys.maxsize > 1 << 32 else 32
    found = f"llm.py {__version__}, Python {platform.python_version()} ({bits} bits), {platform.platform()}"
    if bits == 32:
        yield Check("program", FAULT, found, "install a 64-bit Python")
    else:
        yield Check("program", OK, found)


def packages() -> Iterator[Check]:
    """What is required, and each extra with what it brings, by the metadata of the installed llmpy."""
    try:
        wanted = importlib.metadata.requires("llmpy") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("packages", NOTE, "llm.py runs from its sources, uninstalled", install("-e", "."))
        return
    groups: dict[str, list[tuple[str, str]]] = {"": []}
    for line in wanted:
        if match := REQUIREMENT.match(line):
            groups.setdefault(match[3] or "", []).append((match[1], match[2]))
    groups.setdefault("trackers", []).extend((p, "") for p in PACKAGES.values() if p != PACKAGES["tensorboard"])
    have = {name: version(name) for names in groups.values() for name, _ in names}
    missing = [f"{name}{bound}" for name, bound in groups[""] if not have[name]]
    found = ", ".join(f"{name} {have[name]}" for name, _ in groups.pop("") if have[name])
    if missing:
        yield Check("packages", FAULT, f"missing: {', '.join(missing)}", install(*missing))
    else:
        yield Check("packages", OK, found)
    for extra, names in sorted(groups.items()):
        if extra in ("dev", "mpi"):  # the latter has a row of its own, "MPI"
            continue
        there = [f"{name} {have[name]}" for name, _ in names if have[name]]
        absent = [name for name, _ in names if not have[name]]
        text = ", ".join(there + [f"{name} is not installed" for name in absent])
        fix = f"if you want it: {install(*absent)}" if absent else ""
        yield Check(f"extra {extra}", NOTE if absent and not there else OK, text, fix if not there else "")


def version(package: str) -> str:
    """Of an installed package, or ""."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cpu(load: Load, options: DoctorOptions, machine: list[Machine]) -> Iterator[Check]:
    """The CPU and the row of the table of instruction sets that its kernels are compiled for."""
    ops = cast(Machine, load("cpu", threads=options.threads, dtype=options.dtype))
    machine.append(ops)
    cores, logical = psutil.cpu_count(logical=False), psutil.cpu_count()
    found = f"{cpu_name()}, {cores} cores ({logical} logical); kernels for {ops.isa}, products in {ops.dtype}"
    numbers = {"cores": cores, "logical": logical, "isa": ops.isa, "dtype": str(ops.dtype)}
    forced = [f"{name}={os.environ[name]}" for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES") if name in os.environ]
    if forced:
        yield Check("cpu", NOTE, f"{found}; chosen by {', '.join(forced)}", f"unset {forced[0].split('=')[0]}", numbers)
    elif ops.isa == "generic":
        yield Check("cpu", NOTE, found, "this CPU has no wide vectors: expect a tenth of the usual speed", numbers)
    else:
        yield Check("cpu", OK, found, numbers=numbers)


def threads(machine: Machine) -> Iterator[Check]:
    """How many threads there are, and what bounds them: affinity, the container's share, other programs."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    share = container_cores()
    n = machine.threads
    found = f"{n} of {cores} cores"
    numbers = {"threads": n, "cores": cores, "affinity": allowed, "container_cores": share}
    if allowed < cores:
        found += f"; this process may run on {allowed} (taskset, scheduler)"
    if share is not None:
        found += f"; the container has the time of {share:g}"
    if n > allowed or (share is not None and n > max(1, share)):
        most = max(1, int(min(allowed, share or allowed)))
        yield Check("threads", NOTE, f"{found}: more threads than cores", f"use --threads {most}", numbers)
    elif n < cores:
        fix = "give the container or job more cores, or unset the affinity, if they are yours"
        yield Check("threads", NOTE, found, fix, numbers)
    else:
        yield Check("threads", OK, found, numbers=numbers)
    used = psutil.cpu_percent(0.3) / 100 * (psutil.cpu_count() or 1)
    if used > BUSY:
        fix = "close them, or wait: a step takes up to twice as long beside one busy program"
        yield Check("other programs", NOTE, f"other programs use {used:.1f} cores now", fix, {"busy_cores": used})


def peaks(machine: Machine, load: Load) -> Iterator[Check]:
    """What the machine reaches now, and whether all threads of the pool take part."""
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, file=sys.stderr, flush=True)

    machine.warm_up(say)
    single = cast(Machine, load("cpu", threads=1, dtype=str(machine.dtype)))
    one, all_, stream = single.measure_peak(), machine.measure_peak(), machine.measure_bandwidth()
    times = all_ / one
    found = (
        f"{all_:,.0f} GFLOP/s of multiply-adds in {machine.dtype}, {times:.2f} times one thread's {one:,.0f}; memory "
        f"{stream:,.0f} GB/s"
    )
    numbers = {"gflops": all_, "gflops_one_thread": one, "bandwidth_gb_s": stream}
    if times < SCALING * machine.threads:
        fix = f"cores are shared (other programs, hyper-threads, a container): try --threads {max(1, round(times))}"
        yield Check("peaks", NOTE, found, fix, numbers)
    else:
        yield Check("peaks", OK, found, numbers=numbers)
    if lines:
        yield Check("kernels", NOTE, f"{lines[0]}: done just now", "", {"compiled": True})


def memory(machine: Machine) -> Iterator[Check]:
    """Whether the default training fits into what is free, and into the container."""
    needed = memory_of(TrainOptions(), ModelConfig.from_dial(DEFAULT_MODEL, vocab_size=BUILTIN_VOCAB), machine)
    told = psutil.virtual_memory()
    limit = container_memory()
    free = told.available
    found = f"{gigabytes(told.available)} of {gigabytes(told.total)} free"
    if limit is not None and limit[0] < told.total:
        free = min(free, limit[0] - limit[1])
        found += f"; the container may take {gigabytes(limit[0])} and has {gigabytes(limit[1])}"
    numbers = {"available": free, "total": told.total, "cgroup": limit and limit[0], "default_training": needed}
    if free < needed:
        fix = "close other programs, or give the container more"
        yield Check("memory", FAULT, f"{found}; the default training needs {gigabytes(needed)}", fix, numbers)
    elif free < PROGRAM_BYTES + needed:
        yield Check("memory", NOTE, f"{found}: room for little more than the default training", "", numbers)
    else:
        yield Check("memory", OK, found, numbers=numbers)


def kernel_cache() -> Iterator[Check]:
    """Where compiled kernels are kept: writable, by this user alone, and not too large."""
    folder = user_cache() / "kernels"
    numbers: dict[str, Any] = {"folder": str(folder)}
    fix = "set LLMPY_CACHE_DIR to a folder that you own: without one every start compiles for half a minute"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as fault:  # RuntimeError: this user has no home
        yield Check("kernel cache", NOTE, f"{folder} cannot be written: {fault}", fix, numbers)
        return
    if hasattr(os, "getuid") and (folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022):
        yield Check(
            "kernel cache", NOTE, f"{folder} can be written by others", f"chmod 700 {folder}, or {fix}", numbers
        )
        return
    builds = [path for path in folder.iterdir() if path.is_dir()]
    size = sum(file.stat().st_size for build in builds for file in build.rglob("*") if file.is_file())
    numbers |= {"bytes": size, "builds": len(builds)}
    found = f"{folder}: {size / 1e6:,.0f} MB, {len(builds)} build{'s' * (len(builds) != 1)}"
    if size > CACHE_LARGE:
        yield Check("kernel cache", NOTE, found, "old builds may go: remove the folder, it is made again", numbers)
    elif shutil.disk_usage(folder).free < COMPILED:
        yield Check("kernel cache", NOTE, f"{found}; its disk is full", "make room, or set LLMPY_CACHE_DIR", numbers)
    else:
        yield Check("kernel cache", OK, found, numbers=numbers)


def data_folder() -> Iterator[Check]:
    """Where downloads are kept."""
    folder = data_cache()
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    found = f"{folder}: {gigabytes(free)} free" + ("" if folder.exists() else ", not made yet")
    if os.access(there, os.W_OK):
        yield Check("data cache", OK, found, numbers={"folder": str(folder), "free": free})
    else:
        yield Check(
            "data cache", NOTE, f"{found}; {there} cannot be written", "set LLMPY_DATA to a folder that you own"
        )


def disk() -> Iterator[Check]:
    """Whether runs can be written here, and the default one fits."""
    here = Path("runs") if Path("runs").exists() else Path()
    needed = disk_needed(TrainOptions(), ModelConfig.from_dial(DEFAULT_MODEL, vocab_size=BUILTIN_VOCAB))
    try:
        with tempfile.TemporaryFile(dir=here):
            pass
    except OSError as fault:
        yield Check("disk", FAULT, f"no run can be written in {here.absolute()}: {fault.strerror}", "use --out FOLDER")
        return
    free = shutil.disk_usage(here).free
    found, numbers = f"{gigabytes(free)} free in {here.absolute()}", {"free": free, "default_training": needed}
    if free < needed:
        fix = "make room, or use --out FOLDER on another disk"
        yield Check("disk", FAULT, f"{found}; the default training needs {gigabytes(needed)}", fix, numbers)
    else:
        yield Check("disk", OK, found, numbers=numbers)


def mpi() -> Iterator[Check]:
    """Whether several processes could train together. MPI is loaded by another process: a broken one ends its own."""
    package, launcher = version("mpi4py"), launch.find_mpiexec()
    if not package:
        fix = f"only needed to train with several processes: {install(launch.MPI)}"
        yield Check("MPI", NOTE, "mpi4py is not installed", fix)
        return
    try:
        tried = subprocess.run([sys.executable, "-c", MPI], capture_output=True, encoding="utf-8", timeout=MPI_SECONDS)
    except subprocess.TimeoutExpired:
        yield Check("MPI", NOTE, f"mpi4py {package} does not load within {MPI_SECONDS:g} s", "reinstall MPI")
        return
    if tried.returncode:
        last = (tried.stderr.strip().splitlines() or ["it said nothing"])[-1]
        fix = f"install its library: {install('mpich')}, or module load your cluster's MPI"
        yield Check("MPI", NOTE, f"mpi4py {package} cannot load MPI: {last}", fix)
        return
    found = f"mpi4py {package}, {tried.stdout.splitlines()[0].strip()}, {launcher or 'no mpiexec'}"
    sizes = [f"{name}={os.environ[name]}" for name in launch.TASKS if os.environ.get(name, "1") != "1"]
    if sizes:
        found += f"; this is one of a job's processes ({', '.join(sizes)})"
    yield Check("MPI", OK if launcher else NOTE, found, "" if launcher else "install mpiexec of the same MPI")


def network() -> Iterator[Check]:
    """Whether the hub answers. Text of one's own needs no network."""
    address = hub()
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=NETWORK_SECONDS).close()
    except urllib.error.HTTPError as fault:
        yield Check("network", OK, f"{address} answers ({fault.code})")
    except (OSError, ValueError, http.client.HTTPException) as fault:  # no URL, or what answers speaks no HTTP
        fix = "needed only to download models and data sets: check proxy (HTTPS_PROXY), or name a mirror in HF_ENDPOINT"
        yield Check("network", NOTE, f"{address} does not answer: {getattr(fault, 'reason', fault)}", fix)
    else:
        yield Check("network", OK, f"{address} answers")


def record(checks: list[Check]) -> dict[str, Any]:
    """What --json tells: every check, and whether nothing prevents training."""
    return {"can_train": all(c.state != FAULT for c in checks), "checks": [asdict(check) for check in checks]}


def table(numbers: dict[str, Any]) -> str:
    """The same for a reader: a line for each, its fix below it."""
    checks = numbers["checks"]
    width = max(len(check["name"]) for check in checks)
    lines = []
    for check in checks:
        state = paint(f"{check['state']:<5}", STYLES[check["state"]], sys.stdout)
        lines.append(f"{state}  {check['name']:<{width}}  {check['found']}")
        if check["fix"]:
            lines.append(f"{'':5}  {'':{width}}  → {check['fix']}")
    faults = sum(check["state"] == FAULT for check in checks)
    lines.append("")
    lines.append(f"faults that prevent training: {faults}" if faults else "this machine can train")
    if not faults:
        lines.append(f"whether it computes what it should is tested by:  {command('selftest')}")
    return "\n".join(lines)
