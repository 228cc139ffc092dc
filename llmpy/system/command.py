"""Commands for messages, ready to paste into a shell."""

from __future__ import annotations

import shlex


def command(*words: object) -> str:
    """Return `llmpy` and these words, quoted for a shell."""
    return shlex.join(["llmpy", *map(str, words)])


def install(*packages: str) -> str:
    """Return the command that installs packages, quoted for a shell."""
    return shlex.join(["pip", "install", *packages])
