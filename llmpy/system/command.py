"""Commands told to the user, to be pasted as they are."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path


def command(*words: object) -> str:
    """These words after the name of this program, quoted where a shell would take them apart."""
    return " ".join([called(), *(shlex.quote(str(word)) for word in words)])


def install(*what: str) -> str:
    """How to install packages for this Python, whichever other the shell would find."""
    import shutil

    found = shutil.which("python")
    ours = found is not None and os.path.abspath(found) == os.path.abspath(sys.executable)
    return f"{'python' if ours else shlex.quote(sys.executable)} -m pip install {' '.join(map(shlex.quote, what))}"


def called() -> str:
    """`llmpy`, or the path that it was started by where the shell would not find it, or find another, by that name."""
    import shutil  # here: the command line uses this module and must not wait for it

    own = Path(sys.argv[0])
    if own.name == "__main__.py" and own.parent.name == "llmpy":
        return f"{shlex.quote(sys.executable)} -m llmpy"
    if own.stem != "llmpy":  # a program of somebody else's
        return "llmpy"
    found = shutil.which("llmpy")
    try:
        same = found is not None and os.path.samefile(found, own)
    except OSError:  # Windows may leave .exe out
        same = found is not None
    return "llmpy" if same else shlex.quote(str(own))
