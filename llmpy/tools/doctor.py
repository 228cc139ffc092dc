"""`llmpy doctor`: check this machine for training, and print a fix for each problem.

ok       no problem
note     training works, but something is slow or missing
error    training is impossible: exit code 1

It installs, removes and downloads nothing; it sends one HEAD request to the Hugging Face hub.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil

from .. import backend
from ..backend.machine import Machine
from ..errors import LlmpyError
from ..model.config import ModelConfig
from ..options.tools import DoctorOptions
from ..options.train import DEFAULT_MODEL, TrainOptions
from ..system.cache import data_cache, exposed, user_cache
from ..system.resources import available_memory, cores, cpu_name
from ..system.terminal import aside, paint, printable
from ..system.words import gigabytes
from ..train.memory import PROGRAM_BYTES, disk_needed, memory_of
from ..train.start import BUILTIN_VOCAB
from ..version import __version__

OK, NOTE, ERROR = "ok", "note", "error"
STYLES = {OK: "green", NOTE: "yellow", ERROR: "red"}
PACKAGES = (
    "numpy", "numba", "tokenizers", "safetensors", "ml_dtypes", "huggingface_hub", "jinja2", "matplotlib", "plotly",
    "pyarrow", "gguf", "tensorboardX", "mpi4py", "lm_eval",
)  # fmt: skip
DEFAULT = ModelConfig.from_dial(DEFAULT_MODEL, vocab_size=BUILTIN_VOCAB)  # the model of `llmpy train`
SCALING = 0.75  # of threads × one thread's peak; below it, cores are shared
NETWORK_SECONDS = 4.0


@dataclass(frozen=True)
class Check:
    """One check: its state, the finding, a fix if there is a problem, and numbers for --json."""

    name: str
    state: str
    found: str
    fix: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


def seen(name: str, found: str, fix: str = "", error: bool = False, **numbers: Any) -> Check:
    """Return a check: ok without a fix, else a note or an error."""
    return Check(name, ERROR if error else NOTE if fix else OK, found, fix, numbers)


def doctor(options: DoctorOptions, load: Callable[..., Any] = backend.load) -> list[Check]:
    """Return every check in the order of the report; an exception in one becomes its error."""
    needed = disk_needed(TrainOptions(), DEFAULT)
    looks = {
        "program": program(),
        "cpu": machine_checks(load, options),
        "kernel cache": kernel_cache(),
        "data cache": place("data cache", data_cache, "Set LLMPY_DATA to a folder that you own"),
        "disk": place("disk", lambda: Path("runs"), "Free some space, or use --out FOLDER on another disk", needed),
    } | ({"network": network()} if options.network else {})
    checks: list[Check] = []
    for name, look in looks.items():
        try:
            checks.extend(look)
        except LlmpyError as error:
            checks.append(seen(name, error.message, error.hint or "Reinstall llm.py", error=True))
        except (OSError, ImportError) as error:
            checks.append(seen(name, f"{type(error).__name__}: {error}", "Reinstall llm.py", error=True))
    return checks


def program() -> Iterator[Check]:
    """Report the versions of llm.py, Python, the system and the installed packages."""
    found = [f"llm.py {__version__}", f"Python {platform.python_version()}", platform.platform()]
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    yield seen("program", ", ".join(found))


def machine_checks(load: Callable[..., Any], options: DoctorOptions) -> Iterator[Check]:
    """Report every check that needs the CPU backend."""
    machine: Machine = load("cpu", threads=options.threads, dtype=options.dtype)
    count, logical = psutil.cpu_count(logical=False), psutil.cpu_count()
    found = f"{cpu_name()}, {count} cores ({logical} logical); kernels for {machine.isa}, products in {machine.dtype}"
    fix = "This CPU has no wide vectors: expect a tenth of the usual speed" if machine.isa == "generic" else ""
    yield seen("cpu", found, fix, cores=count, logical=logical, isa=machine.isa, dtype=str(machine.dtype))
    yield threads(machine)
    yield peaks(machine, load)
    yield memory(machine)


def threads(machine: Machine) -> Check:
    """Check the number of threads against the cores that affinity and the container allow."""
    n, usable, count = machine.threads, cores(), psutil.cpu_count(logical=False) or os.cpu_count() or 1
    found, fix = f"{n} of {count} cores", ""
    if usable < count:
        found += f"; this process may use {usable} (affinity, container)"
    if n > usable:
        found, fix = f"{found}: more threads than cores", f"Use --threads {usable}"
    elif n < count:
        fix = "If the other cores are yours, give them to the container or job, or unset the affinity"
    return seen("threads", found, fix, threads=n, cores=count, usable_cores=usable)


def peaks(machine: Machine, load: Callable[..., Any]) -> Check:
    """Measure the peaks of this machine, and check that they scale with the threads."""
    machine.warm_up(aside)
    single: Machine = load("cpu", threads=1, dtype=str(machine.dtype))
    one, all_, stream = single.measure_peak(), machine.measure_peak(), machine.measure_bandwidth()
    found = (
        f"{all_:,.0f} GFLOP/s of multiply-adds in {machine.dtype}, {all_ / one:.2f} times one thread's {one:,.0f}; "
        f"memory {stream:,.0f} GB/s"
    )
    best, shared = max(1, round(all_ / one)), all_ < SCALING * machine.threads * one
    fix = f"Cores are shared (other programs, hyper-threads, a container): try --threads {best}" if shared else ""
    return seen("peaks", found, fix, gflops=all_, gflops_one_thread=one, bandwidth_gb_s=stream)


def memory(machine: Machine) -> Check:
    """Check that the default training fits in the available memory, within the container's limit."""
    needed = memory_of(TrainOptions(), DEFAULT, machine)
    free, total = available_memory(), psutil.virtual_memory().total
    found = f"{gigabytes(free)} free of {gigabytes(total)}; the default training needs {gigabytes(needed)}"
    fix = "Close other programs, or raise the container's limit" if free < needed + PROGRAM_BYTES else ""
    return seen("memory", found, fix, free < needed, available=free, total=total, default_training=needed)


def kernel_cache() -> Iterator[Check]:
    """Check that the folder of compiled kernels is writable, and only by this user."""
    folder = user_cache() / "kernels"
    yield from place("kernel cache", lambda: folder, "Set LLMPY_CACHE_DIR, or every start compiles for half a minute")
    if folder.exists() and (why := exposed(folder)):
        fix = "Set LLMPY_CACHE_DIR to a folder that only you can write to, or chmod go-w that folder"
        yield seen("kernel cache", f"it is ignored, because {why}", fix)


def place(name: str, find: Callable[[], Path], fix: str, needed: int = 0) -> Iterator[Check]:
    """Check that a folder can be written or created, with `needed` bytes free; failing is an error if needed > 0."""
    folder = find().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        yield seen(name, f"cannot write to {there}: {error.strerror}", fix, error=needed > 0)
        return
    found = f"{gigabytes(free)} free in {folder}" + (f", {gigabytes(needed)} needed" if free < needed else "")
    yield seen(name, found, fix if free < needed else "", free < needed, folder=str(folder), free=free, needed=needed)


def network() -> Iterator[Check]:
    """Check that the hub is reachable. Training on your own text needs no network."""
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    found, fix = f"{address} is reachable", ""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=NETWORK_SECONDS).close()
    except (OSError, ValueError, HTTPException) as error:  # an invalid URL, or a server without HTTP
        if not isinstance(error, urllib.error.HTTPError):
            found = f"{address} is unreachable: {getattr(error, 'reason', error)}"
            fix = "Only downloads need it: check the proxy (HTTPS_PROXY), or set a mirror in HF_ENDPOINT"
    yield seen("network", found, fix)


def record(checks: list[Check]) -> dict[str, Any]:
    """Return the checks and whether this machine can train, as --json prints them."""
    return {"can_train": all(c.state != ERROR for c in checks), "checks": [asdict(check) for check in checks]}


def table(numbers: dict[str, Any]) -> str:
    """Return the checks as text: one line each, with the fix below it."""
    checks = numbers["checks"]
    width = max(len(check["name"]) for check in checks)
    lines = []
    for check in checks:
        state = paint(f"{check['state']:<5}", STYLES[check["state"]], sys.stdout)
        lines.append(f"{state}  {check['name']:<{width}}  {printable(check['found'])}")
        if check["fix"]:
            lines.append(f"{'':5}  {'':{width}}  → {printable(check['fix'])}")
    errors = sum(check["state"] == ERROR for check in checks)
    ending = "this machine can train; to check its results, run llmpy selftest"
    return "\n".join([*lines, "", f"errors that prevent training: {errors}" if errors else ending])
