"""Compile kernels in several processes, since Numba compiles one at a time in each; the cache brings them here.

Every process takes the next name that no other has taken, by creating a file; helpers start at the end, where kernels
share other functions than those at the start (dev/LOG.md#first-start). What a helper fails to compile is compiled when
it is called.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...system.resources import cores
from ...system.thread_limit import few
from .. import kernel_cache

MOST = 4  # processes, of some 200 MB
CODE = "import sys; from llmpy.backend import cpu; cpu.compile_taken(*sys.argv[1:])"  # of a helper


def taken(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """Yield the names that this process is the first to take."""
    for name in names:
        try:
            (folder / name).touch(exist_ok=False)
        except OSError:  # another took it, or nobody waits any more
            continue
        yield name


@contextlib.contextmanager
def shared(names: Sequence[str], *arguments: str) -> Iterator[Iterator[tuple[int, str]]]:
    """Start helpers with these arguments; give the names to compile here, numbered; wait for the helpers."""
    with tempfile.TemporaryDirectory(prefix="llmpy-compile-") as place:
        command = [sys.executable, "-P", "-c", CODE, place, *arguments, *reversed(names)]
        several = len(names) > 2 and kernel_cache.FOLDER and not kernel_cache.problem and not few()
        helpers: list[subprocess.Popen[bytes]] = []
        quiet = subprocess.DEVNULL
        try:
            with contextlib.suppress(OSError):
                for _ in range(min(cores(), MOST) - 1 if several else 0):
                    helpers.append(subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet))
            yield ((len(os.listdir(place)), name) for name in taken(Path(place), names))
            for helper in helpers:
                helper.wait()
        finally:
            for helper in helpers:
                helper.kill()
                helper.wait()
