"""Benchmarks against the peaks of the machine, and the measurements that all of them share."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil


def peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    if known := high_water(os.getpid()):
        return known
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes


def high_water(pid: int) -> int:
    """Return the peak memory of a process in bytes; 0 if it has ended or the system is not Linux."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def process_age() -> float:
    """Return the seconds since this process was started."""
    if sys.platform == "linux":
        # More exact than psutil, which adds the boot time in whole seconds.
        started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(started) / os.sysconf("SC_CLK_TCK")
    return time.time() - psutil.Process().create_time()
