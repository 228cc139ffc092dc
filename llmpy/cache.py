"""Where this user's caches are: compiled kernels, downloaded models."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def user_cache() -> Path:
    """`$LLMPY_CACHE_DIR`, or `llmpy` in the system's own folder for caches. Nothing is made."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("LLMPY_CACHE_DIR") or Path(base, "llmpy")).expanduser()
