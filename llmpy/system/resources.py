"""Cores and memory available to this process, within the limits of its container (Linux's cgroups v1 and v2)."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import psutil

from .words import count_of

CONTAINER, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
MEMORY_FILES = (  # limit, usage, and what of it is reclaimable: version 2, its soft limit, version 1
    ("memory.max", "memory.current", "inactive_file"), ("memory.high", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)  # fmt: skip


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


def container_cores(root: Path = CONTAINER, own: Path = MEMBERSHIP) -> float | None:
    """Return the smallest CPU limit in cores of the container and its parents; None: no limit."""
    found = []
    for folder in _groups("cpu", root, own):
        for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
            with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
                quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
                found += [quota / period] if min(quota, period) > 0 else []  # version 1: -1 without a limit
    return min(found, default=None)


def container_memory(root: Path = CONTAINER, own: Path = MEMBERSHIP) -> int | None:
    """Return the bytes that the container and its parents may still allocate; None: no limit."""
    found = []
    for folder in _groups("memory", root, own):
        for limit, usage, reclaimable in MEMORY_FILES:
            with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
                most, taken = (int((folder / name).read_text()) for name in (limit, usage))
                with contextlib.suppress(OSError, ValueError):  # inactive page cache is reclaimed on demand
                    words = (folder / "memory.stat").read_text().split()
                    taken = max(0, taken - int(words[words.index(reclaimable) + 1]))
                found.append(most - taken)
    return min(found, default=None)


def _groups(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """Yield the control groups of this process, of both versions, from its own to the outermost visible one."""
    lines = ["0::/", f"1:{controller}:/"]  # a container may see only its own group, as the root
    with contextlib.suppress(OSError):
        lines += own.read_text(errors="replace").splitlines()
    for _, controllers, path in (line.split(":", 2) for line in dict.fromkeys(lines) if line.count(":") > 1):
        names = {controller, controllers} if controllers else {"", "unified"}
        parts = [] if ".." in path else list(filter(None, path.split("/")))  # "..": not visible from here
        for name in names if not controllers or controller in controllers.split(",") else ():
            yield from (root.joinpath(name, *parts[:depth]) for depth in range(len(parts), -1, -1))
