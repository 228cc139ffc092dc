"""Commands for messages, ready to paste into a shell."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def command(*words: object) -> str:
    """Return `llmpy` and these words, quoted for a shell."""
    return shlex.join(["llmpy", *map(str, words)])


def command_here(*words: object) -> str:
    """Return `command`, with the path that this program was started by if the shell finds no llmpy."""
    program = Path(sys.argv[0])
    named = program.stem == "llmpy" and shutil.which("llmpy") is None
    return shlex.join([str(program) if named else "llmpy", *map(str, words)])


def install(*packages: str) -> str:
    """Return the command that installs packages, quoted for a shell."""
    return shlex.join(["pip", "install", *packages])
