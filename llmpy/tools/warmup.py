"""`llmpy warmup`: compile all kernels now, for the image of a container or the computers of a class."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import cast

from .. import backend
from ..backend import kernel_cache
from ..backend.machine import KINDS, Machine
from ..errors import LlmpyError
from ..options.tools import WarmupOptions
from ..system.words import count_of, duration


def warmup(_options: WarmupOptions, log: Callable[[str], None]) -> None:
    """Compile the kernels that the cache lacks, of training and decoding, all models and dtypes; log what was done.

    Raises LlmpyError if the cache cannot be written.
    """
    start, folder = time.perf_counter(), kernel_cache.FOLDER
    if folder is None:
        raise unusable(kernel_cache.problem)
    before = set(folder.glob("*.kernel"))
    # A single thread would not need the kernel of helper threads.
    work = {"float32": None, "bfloat16": None, "int8": True}  # int8: decoding alone
    machines = [(cast(Machine, backend.load("cpu", threads=2, dtype=dtype)), which) for dtype, which in work.items()]
    if not os.access(folder, os.W_OK) and not all(machine.compiled(KINDS, which) for machine, which in machines):
        raise unusable(f"cannot write to {folder}")
    for machine, which in machines:
        machine.warm_up(log, which, KINDS)
    if kernel_cache.problem:
        raise unusable(kernel_cache.problem)
    found = set(folder.glob("*.kernel"))
    new, size = len(found - before), sum(path.stat().st_size for path in found) / 1e6
    done = f"compiled {count_of(new, 'kernel')} in {duration(time.perf_counter() - start)}" if new else "nothing to do"
    log(f"{done}: {count_of(len(found), 'kernel')}, {size:.0f} MB in {folder}")


def unusable(why: str) -> LlmpyError:
    """Return the error to raise: without a cache, the verb is of no use."""
    return LlmpyError("cache.unusable", f"kernels cannot be cached: {why}", kernel_cache.ELSEWHERE)
