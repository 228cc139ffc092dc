"""Folders for this user's compiled kernels and downloads, and who else could write there."""

from __future__ import annotations

import os
import stat
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


def exposed(folder: Path) -> str:
    """Return why other users could put files into a folder, or replace it or one of its parents; "" if they cannot.

    The rules are those of OpenSSH for keys. A parent may have the sticky bit, like /tmp. Windows is not checked.
    Raises OSError.
    """
    if sys.platform == "win32":
        return ""
    folder = folder.resolve()
    for place in (folder, *folder.parents):
        status = os.stat(place)
        if status.st_uid not in _owners():
            return f"{place} belongs to another user"
        if not only_mine(status) and (place == folder or not status.st_mode & stat.S_ISVTX):
            return f"{place} is writable by other users"
    return ""


def only_mine(status: os.stat_result) -> bool:
    """Return whether only this user and root can write to a file or folder. Windows is not checked."""
    if sys.platform == "win32":
        return True
    shared = stat.S_IWOTH if _private(status) else stat.S_IWOTH | stat.S_IWGRP
    return status.st_uid in _owners() and not status.st_mode & shared


def _owners() -> set[int]:
    """Return this user and root, who owns / (and is numbered otherwise in some containers)."""
    return {0, os.geteuid(), os.stat("/").st_uid}


def _private(status: os.stat_result) -> bool:
    """Return whether only this user is in a group: many Linux systems give each user one, and umask 002."""
    import grp
    import pwd

    if os.geteuid() == 0 or not status.st_mode & stat.S_IWGRP:
        return False
    try:
        me, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    return group.gr_gid == me.pw_gid and group.gr_name == me.pw_name and set(group.gr_mem) <= {me.pw_name}
