"""Whether threads can be started at all."""

from __future__ import annotations

import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor

from .terminal import aside


@functools.cache
def few() -> bool:
    """Return whether a limit of processes (`ulimit -u`, pids.max) leaves no thread per core; all work is then serial.

    Warns once. The threads tried are those of kernels and of the tokenizers' library, and a few for files.
    """
    end, count = threading.Event(), 2 * (os.cpu_count() or 1) + 8
    with ThreadPoolExecutor(count) as pool:
        try:
            for _ in range(count):
                pool.submit(end.wait)
        except RuntimeError:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            aside("warning: a limit of processes allows too few threads; using one. Raise it (ulimit -u, pids.max)")
            return True
        finally:
            end.set()
    return False
