"""Cores and memory available to this process, within its container's limits (Linux's cgroup v2)."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

import psutil

from .words import count_of

CONTAINER = Path("/sys/fs/cgroup")


def cores() -> int:
    """Return the number of physical cores that this process may use, within its affinity and container limit."""
    found = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        found = min(found, len(os.sched_getaffinity(0)))
    return max(1, min(found, int(container_cores() or found)))


def available_memory() -> int:
    """Return the bytes that this process may still allocate, within its container's limit."""
    free, limit = int(psutil.virtual_memory().available), container_memory()
    return free if limit is None else max(0, min(free, limit))


def crowded(threads: int) -> list[str]:
    """Return a note if there are more threads than available cores, else nothing."""
    n = cores()
    if threads <= n:
        return []
    return [f"note: {threads} threads compete for {count_of(n, 'core')}. Use --threads {n}"]


def cpu_name() -> str:
    """Return the CPU's model name, or its architecture if the name is unknown."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def container_cores(folder: Path = CONTAINER) -> float | None:
    """Return the container's CPU limit in cores; None: no limit."""
    try:
        quota, period = map(int, (folder / "cpu.max").read_text().split())
    except (OSError, ValueError):  # ValueError: "max"
        return None
    return quota / period


def container_memory(folder: Path = CONTAINER) -> int | None:
    """Return the bytes that the container may still allocate, including reclaimable cache; None: no limit."""
    try:
        most, taken = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # ValueError: "max"
        return None
    return most - max(0, taken - int(stat["inactive_file"]))  # inactive page cache is reclaimed on demand
