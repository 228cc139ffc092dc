"""What is read must be a file: a pipe may wait for ever and a device never end."""

from __future__ import annotations

import stat
from pathlib import Path

from ..errors import LlmpyError


def regular(path: Path) -> Path:
    """`path`, where a file or folder is, or nothing. Raises LlmpyError for anything else, before it is opened."""
    try:
        mode = path.stat().st_mode
    except OSError:  # whoever opens it will say why it cannot
        return path
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise LlmpyError(f"{path} is {kind}, not a file", "save its content to a file and give that")
    return path
