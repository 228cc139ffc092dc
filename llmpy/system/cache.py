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

    Without a home folder (in a container, under a foreign user id), return a private temporary one, with a warning.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    return _named("LLMPY_CACHE_DIR") or _possible(Path(base, "llmpy")) or _temporary()


def data_cache() -> Path:
    """Return $LLMPY_DATA, or `data` in the user's cache: downloaded texts and their tokens."""
    return _named("LLMPY_DATA") or user_cache() / "data"


def place_hub_cache() -> None:
    """Let the hub's library use our cache if it has no home folder: it would create a folder named ~."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    if not {"HF_HOME", "HF_HUB_CACHE"} & os.environ.keys() and not _possible(Path(base, "huggingface")):
        os.environ["HF_HOME"] = str(user_cache() / "huggingface")


def _named(variable: str) -> Path | None:
    """Return the folder that a variable names, if it is set. Raises LlmpyError for ~ of an unknown user."""
    try:
        return Path(os.environ[variable]).expanduser() if os.environ.get(variable) else None
    except RuntimeError:
        what = f"{variable}={os.environ[variable]} names a user without a home folder"
        raise LlmpyError("cache.no-folder", what, "Use a full path") from None


def _possible(folder: Path) -> Path | None:
    """Return the folder, ~ expanded, if it exists or can be created."""
    try:
        folder = folder.expanduser()
    except RuntimeError:  # no home folder
        return None
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    return folder if there == folder or os.access(there, os.W_OK) else None


@functools.cache
def _temporary() -> Path:
    """Return a temporary folder that only this user can use, and warn. Raises LlmpyError if there is none."""
    try:
        folder = Path(tempfile.gettempdir(), f"llmpy-{os.getuid() if os.name == 'posix' else 'cache'}")
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if os.name == "posix" and (status.st_uid, status.st_mode) != (os.getuid(), 0o40700):
            raise PermissionError
    except OSError:
        what = "there is no folder for the cache: this user has no home folder, or cannot write to it"
        raise LlmpyError("cache.no-folder", what, FIX) from None
    aside(f"warning: this user has no writable home folder; caching in {folder}. {FIX}")
    return folder
