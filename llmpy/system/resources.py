"""What of this machine a process may use: cores and memory, within its container's limits (Linux's cgroup v2)."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

import psutil

from .words import count_of

CONTAINER = Path("/sys/fs/cgroup")


def cores() -> int:
    """Return the cores that this process may use: physical ones, within its affinity and its container's share."""
    found = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        found = min(found, len(os.sched_getaffinity(0)))
    return max(1, min(found, int(container_cores() or found)))


def available_memory() -> int:
    """Return the bytes that this process may still take, within its container's limit."""
    free, limit = int(psutil.virtual_memory().available), container_memory()
    return free if limit is None else max(0, min(free, limit))


def crowded(threads: int) -> list[str]:
    """Return a note where one process has more threads than it may use cores."""
    n = cores()
    if threads <= n:
        return []
    return [f"note: {threads} threads on {count_of(n, 'core')}: more than cores are slower; --threads {n} is best"]


def cpu_name() -> str:
    """Return the CPU as its maker calls it, where that can be read."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def container_cores(folder: Path = CONTAINER) -> float | None:
    """Return the cores whose time the container may use; None: no limit."""
    try:
        quota, period = map(int, (folder / "cpu.max").read_text().split())
    except (OSError, ValueError):  # ValueError: "max"
        return None
    return quota / period


def container_memory(folder: Path = CONTAINER) -> int | None:
    """Return the bytes that the container may still take, cached files' among them; None: no limit."""
    try:
        most, taken = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # ValueError: "max"
        return None
    return most - max(0, taken - int(stat["inactive_file"]))  # of files not used since: given back when asked for
