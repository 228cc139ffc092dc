"""Benchmarks: what this machine can do at best, and what comes of it. Here is what all of them share."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil


def peak_memory() -> int:
    """Return the most memory this process ever held, in bytes."""
    if known := high_water(os.getpid()):
        return known
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes


def high_water(pid: int) -> int:
    """The most memory a process on Linux ever held, in bytes; 0 where that cannot be read, or it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def process_age() -> float:
    """Seconds since this process was started."""
    if sys.platform == "linux":
        # psutil adds the hour of the last boot, which Linux gives in whole seconds.
        started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(started) / os.sysconf("SC_CLK_TCK")
    return time.time() - psutil.Process().create_time()
