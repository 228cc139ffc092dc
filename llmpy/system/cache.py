"""Folders for this user's compiled kernels and downloads."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from pathlib import Path

from ..errors import LlmpyError
from .terminal import aside

FIX = "Set LLMPY_CACHE_DIR to a folder of your own"


def user_cache() -> Path:
    """Return $LLMPY_CACHE_DIR, or `llmpy` in the platform's cache folder. It may not exist yet.

    Without a home folder (a container under a foreign user id), return a private temporary folder, with a warning.
    """
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(os.path.expanduser(base), "llmpy")  # leaves ~ if there is no home folder
    return _named("LLMPY_CACHE_DIR") or (folder if possible(folder) else _temporary())


def data_cache() -> Path:
    """Return $LLMPY_DATA, or `data` in the user's cache: downloaded texts and their tokens."""
    return _named("LLMPY_DATA") or user_cache() / "data"


def possible(folder: Path) -> bool:
    """Return whether a folder exists or can be created."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    return there == folder or (folder.parts[0] != "~" and os.access(there, os.W_OK))


def _named(variable: str) -> Path | None:
    try:
        return Path(os.environ[variable]).expanduser() if os.environ.get(variable) else None
    except RuntimeError:
        what = f"{variable}={os.environ[variable]} names a user without a home folder"
        raise LlmpyError("cache.no-folder", what, "Use a full path") from None


@functools.cache
def _temporary() -> Path:
    """Return a temporary folder that only this user can use. Raises LlmpyError if there is none."""
    try:
        folder = Path(tempfile.gettempdir(), f"llmpy-{os.getuid() if os.name == 'posix' else 'cache'}")
        folder.mkdir(mode=0o700, exist_ok=True)
        if os.name == "posix" and (folder.lstat().st_uid, folder.lstat().st_mode) != (os.getuid(), 0o40700):
            raise PermissionError
    except OSError:
        what = "no folder for the cache: this user has no home folder, or cannot write to it"
        raise LlmpyError("cache.no-folder", what, FIX) from None
    aside(f"warning: this user has no writable home folder; caching in {folder}. {FIX}")
    return folder
