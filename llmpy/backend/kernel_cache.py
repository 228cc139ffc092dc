"""The kernel cache on disk: one file per kernel and types of its arguments, verified before it is loaded.

NAME-<key>.kernel is a hash, then a pickle of Numba's (`system.cache.seal`). A file that fails the check is compiled
again. Numba's own cache is unverified: corrupt pickles and machine code can do anything. Two processes can also mix up
its index; here there is none.

The folder's name is a hash of all that compiled code depends on: the sources of the kernels and this file, Numba, CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
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
from numba.core import caching, codegen, compiler, registry, serialize

from ..system.cache import seal, trusted_folder, unseal
from ..system.terminal import aside

config: Any = numba.config
ELSEWHERE = "Set LLMPY_CACHE_DIR to a folder that only you can write to"


def _widen_vectors() -> None:
    """Let LLVM give loops vectors of 512 bits on Intel's CPUs, as on AMD's.

    It keeps to 256 there, since older ones slowed down for wider vectors; products have these anyway, and attention is
    a third faster with them (dev/LOG.md#vectors-of-512-bits). Numba fixes the features when it first compiles.
    """
    host = codegen.get_host_cpu_features()
    if config.CPU_FEATURES is None and "+avx512f" in host:
        config.CPU_FEATURES = host + ",-prefer-256-bit"
        fixed = registry.cpu_target.target_context.codegen()._tm_features
        if fixed != config.CPU_FEATURES:
            config.CPU_FEATURES = fixed
            aside(
                "warning: Numba has compiled before the backend of llmpy was loaded. Results may differ in their last "
                "bits from other runs. Load a model before other code compiles"
            )


_widen_vectors()


@functools.cache
def _may_use_tiles() -> bool:
    """Ask Linux for AMX's registers. A process must, before it uses them; some sandboxes refuse."""
    ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18
    return sys.platform == "linux" and ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0


def target() -> tuple[str, str]:
    """Return name and features ("+avx2,-avx512f,…") of the CPU that Numba compiles for: the host, or NUMBA_*."""
    features = config.CPU_FEATURES if config.CPU_FEATURES is not None else codegen.get_host_cpu_features()
    if "+amx-tile" in features and not _may_use_tiles():
        features = features.replace("+amx-tile", "-amx-tile")
    return config.CPU_NAME or llvm.get_host_cpu_name(), features


def _fingerprint() -> str:
    """Return a hash of everything that compiled code depends on, and of this copy's path."""
    folder = Path(__file__).with_name("cpu")
    digest = hashlib.sha256(str(folder).encode())
    for source in (*sorted(folder.glob("*.py")), Path(__file__)):
        digest.update(source.read_bytes())
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("NUMBA_")]
    with contextlib.suppress(OSError):
        settings.append(Path(".numba_config.yaml").read_text("utf-8", "replace"))
    for fact in (numba.__version__, llvmlite.__version__, sys.version, *target(), *settings):
        digest.update(fact.encode())
    return digest.hexdigest()[:16]


FOLDER, problem = trusted_folder("kernels", _fingerprint())


def _give_up(error: Exception) -> None:
    """Write nothing from now on: the cache cannot be written, or Numba's internals have changed."""
    global problem
    if not problem:
        problem = getattr(error, "message", repr(error))
        aside(f"warning: no kernel cache, so every start compiles: {problem}. {ELSEWHERE}")


@functools.cache
def _source(path: str) -> bytes:
    return Path(path).read_bytes()


class KernelCache(caching.NullCache):
    """The files of one function, as Numba's dispatcher uses a cache."""

    def __init__(self, function: Callable) -> None:
        self._function, self._name = function, function.__name__

    def _place(self, signature: Any, code: Any) -> tuple[Path, bytes]:
        """Return the file for these types and this CPU, and what it is a compilation of."""
        made = self._function.__code__
        about = repr((self._name, made.co_firstlineno, signature, code.magic_tuple())).encode()
        about += _source(made.co_filename)
        return Path(FOLDER or "", f"{self._name}-{hashlib.blake2b(about, digest_size=8).hexdigest()}.kernel"), about

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return a compiled kernel, or None if its file is missing or fails the check."""
        target_context.refresh()
        try:
            path, about = self._place(sig, target_context.codegen())
            if data := unseal(path, about):
                return compiler.CompileResult._rebuild(target_context, *serialize.loads(data))
            if data is not None:
                aside(f"{path} is corrupt or not yours: compiling {self._name} again")
        except Exception as error:
            _give_up(error)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Write a kernel that has just been compiled."""
        if problem or data.library.has_dynamic_globals:
            return
        try:
            seal(*self._place(sig, data.codegen), serialize.dumps(data._reduce()))
        except Exception as error:
            _give_up(error)


_compiled: set[tuple[str, str]] = set()  # by this process


def is_cached(name: str, variant: str) -> bool:
    """Return whether a kernel has been compiled by this process, or on this machine, for this dtype."""
    return (name, variant) in _compiled or (FOLDER is not None and (FOLDER / f"{name}.{variant}.done").exists())


def mark_cached(name: str, variant: str) -> None:
    """Record that a kernel is in the cache. If that fails, it is merely announced again."""
    _compiled.add((name, variant))
    if FOLDER is not None and not problem:
        with contextlib.suppress(OSError):
            (FOLDER / f"{name}.{variant}.done").touch()
