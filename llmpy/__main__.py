"""The entry point of `llmpy` and `python -m llmpy`."""

import os
import sys
from typing import Any

from .errors import Stopped
from .system.interrupts import on_signal


def main() -> int:
    """Run the command line; return the exit code."""
    # OpenBLAS raises SIGINT if it cannot start its threads, which llmpy does not need.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with on_signal(end):  # libraries being imported may swallow an exception
        from .cli.main import main as run
    return run()


def end(number: int, _frame: Any) -> None:
    """Exit at once: nothing has been done yet."""
    os.write(2, f"llmpy: error: {Stopped(number)}\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
