"""The way in: `llmpy`, or `python -m llmpy`.

Of many runs that begin in one folder at once all but one leave here: the folder is claimed by its name on the command
line before options are parsed or NumPy is imported, at a third of the processor time (dev/LOG.md). A signal that comes
while a run is being made ready, be it in the middle of an import, ends it without a trace.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

from .errors import LlmpyError, Stopped
from .run.folder import HELD, RunFolder
from .system.lock import InUse

TYPE_CHECKING = False  # `typing` takes as long to import as all else here
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

LAUNCHERS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")  # then one process claims for all


def main() -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:]
    try:
        if words[:1] == ["train"]:
            come: list[int] = []
            heed(lambda number, _: come.append(number))  # one amid the claim waits for its end
            enter(words)
            heed(leave)
            for number in come:
                leave(number, None)
        from .cli.main import main as run

        return run(words)
    except InUse as fault:
        print("llmpy: error:", fault, file=sys.stderr)
        return fault.code
    except KeyboardInterrupt:  # before `cli` could see to it
        print("llmpy: error: stopped by Ctrl-C", file=sys.stderr)
        return 130
    finally:
        for folder in [*HELD]:
            folder.discard()


def heed(handler: Callable[[int, Any], object]) -> None:
    """Have signals that end a program handled so, but for those that are ignored, as of a job in the background."""
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    for number in (signal.SIGINT, signal.SIGTERM, hangup):
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def enter(words: list[str]) -> None:
    """Claim the folder that `train --out` or `--resume` names, if one is named; `RunFolder.claim` gives it out later.

    Raises InUse. Whatever else is wrong is told later, with all that is.
    """
    named = {"--out": "", "--resume": ""}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        name = "--out" if name == "-o" else name
        if name in named:
            named[name] = value if equals else following
    if not bool(named["--out"]) ^ bool(named["--resume"]):
        return
    if {"--print-config", "--auto-resume", "-y"} & {*words} or any(name in os.environ for name in LAUNCHERS):
        return
    try:
        RunFolder.early(**{name.removeprefix("--"): value or None for name, value in named.items()})
    except InUse:
        raise
    except LlmpyError:
        pass


def leave(number: int, _frame: Any) -> None:
    """End a run that has not begun. No exception, for libraries catch them, and LLVM's callbacks lose them."""
    heed(lambda *_: None)
    for folder in [*HELD]:
        folder.discard()
    stopped = Stopped(number)
    # Not imported here, maybe amid that import: who started a rank sends it no signal before it has left its number.
    tell = getattr(sys.modules.get("llmpy.distributed.launch"), "leave_word", None)
    if tell is None or not tell("stopped", str(number)):
        with contextlib.suppress(OSError):  # the terminal is gone
            os.write(2, f"llmpy: error: {stopped}\n".encode())
    os._exit(stopped.code)


if __name__ == "__main__":
    sys.exit(main())
