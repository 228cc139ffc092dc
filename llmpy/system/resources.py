"""What of this machine a process may use: cores and memory, within its container's limits.

Containers are Linux's control groups, version 1 or 2.
"""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

import psutil

from .words import count_of

CONTROL_GROUPS = Path("/sys/fs/cgroup")


def cores() -> int:
    """Cores that this process may use: physical ones, within its affinity and its container's share."""
    found = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        found = min(found, len(os.sched_getaffinity(0)))
    return max(1, min(found, int(container_cores() or found)))


def available_memory() -> int:
    """Bytes that this process may still take, within its container's limit."""
    free, limit = int(psutil.virtual_memory().available), container_memory()
    return free if limit is None else max(0, min(free, limit[0] - limit[1]))


def crowded(threads: int) -> list[str]:
    """A note where one process has more threads than it may use cores."""
    n = cores()
    if threads <= n:
        return []
    return [f"note: {threads} threads on {count_of(n, 'core')}: more than cores are slower; --threads {n} is best"]


def cpu_name() -> str:
    """The CPU as its maker calls it, where that can be read."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def container_cores(root: Path = CONTROL_GROUPS) -> float | None:
    """Cores whose time the container may use; None: no limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass  # version 1, or none
    try:
        quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def container_memory(root: Path = CONTROL_GROUPS) -> tuple[int, int] | None:
    """Bytes that the container may take, and has taken; None: no limit that can be read.

    Files that were read and not used since do not count: the system gives their memory back when it is asked for.
    """
    for folder, limit, used, idle in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, taken = int((folder / limit).read_text()), int((folder / used).read_text())
        except (OSError, ValueError):  # ValueError: "max"
            continue
        with contextlib.suppress(OSError, ValueError, KeyError):
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            taken = max(0, taken - int(stat[idle]))
        return most, taken
    return None
