"""Folders for this user's compiled kernels and downloads, and who else could write there."""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import sys
import tempfile
from pathlib import Path

from ..errors import LlmpyError
from .durable import remove, write_whole
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
        base = base if os.path.isabs(base) else "~/.cache"  # as XDG's specification says
    folder = Path(os.path.expanduser(base), "llmpy")  # leaves ~ if there is no home folder
    return _named("LLMPY_CACHE_DIR") or (folder if possible(folder) else _temporary())


def data_cache() -> Path:
    """Return $LLMPY_DATA, or `data` in the user's cache: downloaded texts and their tokens."""
    return _named("LLMPY_DATA") or user_cache() / "data"


def trusted_folder(*names: str) -> tuple[Path | None, str]:
    """Create and return a folder of the user's cache, links resolved, or None and why it cannot be used."""
    try:
        folder = user_cache().joinpath(*names)
        for place in (*reversed(folder.absolute().parents), folder):  # of each, or the umask decides
            place.mkdir(mode=0o755, exist_ok=True)
        folder = folder.resolve()
        why = exposed(folder)
    except OSError as error:
        why = f"cannot create {error.filename}: {error.strerror}"
    except (RuntimeError, LlmpyError) as error:  # no home directory
        why = str(error)
    return (None, why) if why else (folder, "")


def seal(path: Path, about: bytes, data: bytes) -> None:
    """Write a file of a hash, which covers `about` too, and `data`. Raises LlmpyError."""

    def write(new: Path) -> None:
        new.touch(mode=0o644)  # umask may be 002 or 000
        new.write_bytes(hashlib.blake2b(about + data).digest() + data)
        if path.is_dir():  # which a file cannot replace
            remove(path)

    write_whole(path, write)


def unseal(path: Path, about: bytes) -> bytes | None:
    """Return the data of a sealed file; b"" if it is corrupt or others can write to it, None if it cannot be read."""
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # no link, and no waiting for a pipe
    try:
        with open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags)) as file:
            found = file.read() if only_mine(os.fstat(file.fileno())) else b""
    except OSError:
        return None
    size = hashlib.blake2b().digest_size
    return found[size:] if hashlib.blake2b(about + found[size:]).digest() == found[:size] else b""


def exposed(folder: Path) -> str:
    """Return why other users could put files into a folder, or replace it; "" if they cannot. Raises OSError.

    As OpenSSH does for keys, check all parents, which may be sticky, like /tmp. Windows is not checked.
    """
    folder = folder.resolve()
    for place in (folder, *folder.parents):
        if not only_mine(os.stat(place), sticky=place != folder):
            return f"{place} is owned or writable by other users"
    return ""


def only_mine(status: os.stat_result, sticky: bool = False) -> bool:
    """Return whether only this user and root can write to a file or folder; a `sticky` one may be shared."""
    if sys.platform == "win32":
        return True
    shared = status.st_mode & stat.S_IWOTH or status.st_mode & stat.S_IWGRP and not _private(status.st_gid)
    root = os.stat("/").st_uid  # not 0 in some containers
    return status.st_uid in (os.geteuid(), 0, root) and not (shared and not (sticky and status.st_mode & stat.S_ISVTX))


def _private(number: int) -> bool:
    """Return whether this user is alone in a group: Debian gives each user one, and a umask of 002."""
    import grp
    import pwd

    try:
        me, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(number)
    except KeyError:
        return False
    return me.pw_uid != 0 and me.pw_gid == number and group.gr_name == me.pw_name and {*group.gr_mem} <= {me.pw_name}


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
