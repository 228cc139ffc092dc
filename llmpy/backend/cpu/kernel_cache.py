"""The kernel cache on disk: one file per kernel and types of arguments, verified before it is loaded.

    kernels/<fingerprint>/NAME-<key>.kernel    32 bytes of BLAKE2b, then the pickle of Numba's compiled kernel
    kernels/<fingerprint>/NAME.DTYPE.done      NAME has been compiled for DTYPE

A pickle can run code, and corrupt machine code can do anything. Numba's own cache is unverified, and two processes can
mix up its index. Here a kernel is one file, renamed into place; the hash covers it and what it is a compilation of. A
file that fails the check is compiled again. An error means no cache, and one warning.

The folder's name is a hash of all that compiled code depends on: the sources next to this file, Numba, and the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
from numba.core import caching, codegen, compiler, serialize

from ...errors import LlmpyError
from ...system import durable
from ...system.cache import exposed, only_mine, user_cache
from ...system.terminal import aside

config: Any = numba.config
HASH = 32  # bytes
ELSEWHERE = "Set LLMPY_CACHE_DIR to a folder that only you can write to"


def target() -> tuple[str, str]:
    """Return name and features ("+avx2,-avx512f,…") of the CPU that Numba compiles for: the host, or NUMBA_*."""
    features = config.CPU_FEATURES if config.CPU_FEATURES is not None else codegen.get_host_cpu_features()
    return config.CPU_NAME or llvm.get_host_cpu_name(), features


def _fingerprint() -> str:
    """Return a hash of everything that compiled code depends on, and of this copy's path."""
    folder = Path(__file__).parent
    digest = hashlib.sha256(str(folder).encode())
    for source in sorted(folder.glob("*.py")):
        digest.update(source.read_bytes())
    settings = (f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("NUMBA_"))
    for fact in (numba.__version__, llvmlite.__version__, sys.version, *target(), *settings):
        digest.update(fact.encode())
    return digest.hexdigest()[:16]


def find() -> tuple[Path | None, str]:
    """Create and return the folder, links resolved, or None and why there is no cache: every start then recompiles."""
    try:
        top = user_cache()
        top.mkdir(mode=0o755, parents=True, exist_ok=True)
        folder = top / "kernels" / _fingerprint()
        for place in (folder.parent, folder):
            place.mkdir(mode=0o700, exist_ok=True)
        folder = folder.resolve()
        why = exposed(folder)
    except OSError as error:
        why = f"cannot create {error.filename}: {error.strerror}"
    except (RuntimeError, LlmpyError) as error:  # no home directory
        why = str(error)
    return (None, why) if why else (folder, "")


FOLDER, problem = find()


def _give_up(why: str) -> None:
    """Use no cache from now on."""
    global problem
    problem = why
    aside(f"warning: no kernel cache, so every start compiles: {why}. {ELSEWHERE}")


@functools.cache
def _source(path: str) -> bytes:
    return Path(path).read_bytes()


class KernelCache(caching.NullCache):
    """The files of one function, as Numba's dispatcher uses a cache."""

    def __init__(self, function: Callable) -> None:
        self._function = function

    def _place(self, signature: Any, code: Any) -> tuple[Path, Any]:
        """Return the file for these types and this CPU, and a hash to continue with its contents."""
        made, name = self._function.__code__, self._function.__name__
        about = hashlib.blake2b(_source(made.co_filename), digest_size=HASH)
        about.update(repr((name, made.co_firstlineno, signature, code.magic_tuple())).encode())
        return Path(FOLDER or "", f"{name}-{about.hexdigest()[:16]}.kernel"), about

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return a compiled kernel, or None if its file is missing or fails the check."""
        target_context.refresh()
        if problem:
            return None
        try:
            path, digest = self._place(sig, target_context.codegen())
            data = _read(path)
            digest.update(data[HASH:])
            if data[:HASH] == digest.digest():
                return compiler.CompileResult._rebuild(target_context, *serialize.loads(data[HASH:]))
            with contextlib.suppress(OSError):
                durable.remove(path)
            aside(f"{path} is corrupt or not yours: compiling {self._function.__name__} again")
        except FileNotFoundError:
            pass
        except Exception as error:  # Numba's internals have changed
            _give_up(f"{type(error).__name__}: {error}")
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Write a kernel that has just been compiled."""
        if problem or data.library.has_dynamic_globals:
            return
        try:
            path, digest = self._place(sig, data.codegen)
            payload = serialize.dumps(data._reduce())
            digest.update(payload)
            durable.write_whole(path, lambda temporary: _write(temporary, digest.digest() + payload))
        except LlmpyError as error:
            _give_up(error.message)
        except Exception as error:
            _give_up(f"{type(error).__name__}: {error}")


def _read(path: Path) -> bytes:
    """Return a file's bytes, none if it is a link or somebody else can write to it. Raises FileNotFoundError."""
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # not blocking: in case it is a pipe
    try:
        with open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags)) as file:
            return file.read() if only_mine(os.fstat(file.fileno())) else b""
    except FileNotFoundError:
        raise
    except OSError:
        return b""


def _write(path: Path, data: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(data)


_compiled: set[tuple[str, str]] = set()  # by this process


def is_cached(name: str, variant: str) -> bool:
    """Return whether a kernel has been compiled by this process, or on this machine, for this dtype."""
    return (name, variant) in _compiled or (FOLDER is not None and (FOLDER / f"{name}.{variant}.done").exists())


def mark_cached(name: str, variant: str) -> None:
    """Record that a kernel is in the cache. If that fails, it is merely announced again."""
    _compiled.add((name, variant))
    if FOLDER is not None and not problem:
        with contextlib.suppress(OSError):
            (FOLDER / f"{name}.{variant}.done").touch(mode=0o600)
