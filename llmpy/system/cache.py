"""Folders for this user's compiled kernels and downloads."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def user_cache() -> Path:
    """Return $LLMPY_CACHE_DIR, or `llmpy` in the platform's cache folder. It may not exist yet."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("LLMPY_CACHE_DIR") or Path(base, "llmpy")).expanduser()


def data_cache() -> Path:
    """Return $LLMPY_DATA, or `data` in the user's cache: downloaded texts and their tokens."""
    return Path(os.environ.get("LLMPY_DATA") or user_cache() / "data").expanduser()
