"""How Python becomes machine code here: two decorators, one way to run on all cores, one cache.

    @inline    a piece of a kernel: compiled into its callers, never called from Python
    @kernel    an operation: called from Python, releases the GIL, cached on disk
    fork(body, threads, items, (args…))
               inside a kernel: body(worker, item, args…) for every item, on `threads` threads

`fork` hands items out one by one from an atomic counter, so that a core which another process slows
down takes fewer of them, and uses Numba's own thread pool without `prange`: that costs a second of
compile time for each loop, and divides the work beforehand. `worker` is in [0, threads) and names
the scratch memory of whoever runs the item; results must not depend on it.

Numba's disk cache watches neither the other files a kernel is made of nor the globals it froze.
The cache folder is therefore named by a hash of everything: all sources of this package, the
versions of Numba and llvmlite, and the CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# libgomp reads these when it is loaded, which `numba` does when the first kernel runs. Its default is
# to spin at every barrier: with another process on one of two cores that made a step 4 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import llvmlite
import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils, extending
from numba.np.ufunc import parallel as numba_threads

# Sums may be taken in vector order (the same one every time) and products fused into them; nothing is
# assumed about NaN, infinity or signed zeros.
FASTMATH = {"reassoc", "contract"}

intrinsic: Any = extending.intrinsic
config: Any = numba.config


def _user_cache() -> Path:
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("LLMPY_CACHE_DIR") or Path(base, "llmpy")).expanduser()


def _fingerprint() -> str:
    """Hash of all that compiled code depends on."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    cpu = os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()
    features = os.environ.get("NUMBA_CPU_FEATURES") or llvm.get_host_cpu_features().flatten()
    for fact in (numba.__version__, llvmlite.__version__, sys.version, cpu, features):
        digest.update(fact.encode())
    return digest.hexdigest()[:16]


def _cache_folder() -> str | None:
    """A folder that only this user may read: Numba's cache is pickle, which runs what it reads."""
    folder = _user_cache() / "kernels" / _fingerprint()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if hasattr(os, "getuid"):
            status = folder.stat()
            if status.st_uid != os.getuid() or status.st_mode & 0o022:
                return None
    except OSError:
        return None
    return str(folder) if os.access(folder, os.W_OK) else None


CACHE_FOLDER = _cache_folder()


def inline(function: Callable) -> Any:
    """Compile into callers; exact arithmetic unless the caller's own loops say otherwise."""
    return numba.njit(error_model="numpy", fastmath=FASTMATH)(function)


def exact(function: Callable) -> Any:
    """As `inline`, for formulas whose order of operations is their point (exp's range reduction)."""
    return numba.njit(error_model="numpy", fastmath={"contract"})(function)


def kernel(function: Callable) -> Any:
    """An operation callable from Python: no GIL, no bounds checks, cached in `CACHE_FOLDER`."""
    before = config.CACHE_DIR
    config.CACHE_DIR = CACHE_FOLDER or before
    try:
        return numba.njit(cache=CACHE_FOLDER is not None, nogil=True, error_model="numpy", fastmath=FASTMATH)(function)
    finally:
        config.CACHE_DIR = before


def launch_threads(threads: int) -> str:
    """Start Numba's pool, once per process; returns its name: "omp", "tbb" or "workqueue"."""
    if threads > config.NUMBA_NUM_THREADS and not numba_threads._is_initialized:
        config.NUMBA_NUM_THREADS = numba_threads.NUM_THREADS = threads
    numba_threads._launch_threads()
    return str(numba.threading_layer())


I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
POINTER = I8.as_pointer()


def _trampoline(context: Any, builder: Any, body: Any, signature: Any, state_type: Any, arg_types: Any) -> Any:
    """void trampoline(args, dims, steps, state): take items from the counter until none is left."""
    compiled = body.dispatcher.get_compile_result(signature)
    context.active_code_library.add_linking_library(compiled.library)
    callee = context.declare_function(builder.module, compiled.fndesc)

    fn_type = ir.FunctionType(ir.VoidType(), [POINTER.as_pointer(), I64.as_pointer(), I64.as_pointer(), POINTER])
    fn = ir.Function(builder.module, fn_type, builder.module.get_unique_name("llmpy_fork"))
    fn.linkage = "internal"
    entry, more, work, done = (fn.append_basic_block(n) for n in ("entry", "more", "work", "done"))
    bd = ir.IRBuilder(entry)
    state = bd.bitcast(fn.args[3], state_type.as_pointer())
    field = [bd.gep(state, [I32(0), I32(i)], inbounds=True) for i in range(5)]
    one = I64(1)
    worker = bd.atomic_rmw("add", field[1], one, "monotonic")
    items = bd.load(field[2])
    args = bd.load(field[4])
    bd.branch(more)
    bd.position_at_end(more)
    item = bd.atomic_rmw("add", field[0], one, "monotonic")
    bd.cbranch(bd.icmp_signed("<", item, items), work, done)
    bd.position_at_end(work)
    values = [bd.extract_value(args, i) for i in range(len(arg_types))]
    status, _ = context.call_conv.call_function(
        bd, callee, compiled.signature.return_type, signature.args, [worker, item, *values]
    )
    with bd.if_then(status.is_error, likely=False):
        bd.atomic_rmw("or", field[3], one, "monotonic")
    bd.branch(more)
    bd.position_at_end(done)
    bd.ret_void()
    return fn


@intrinsic(prefer_literal=False)
def fork(typingctx: Any, body: Any, threads: Any, items: Any, args: Any) -> Any:
    """body(worker, item, *args) for item in range(items), shared by `threads` threads; returns when all are done."""
    arg_types = tuple(args.types)
    signature = types.void(body, types.intp, types.intp, args)

    def codegen(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        _, count, n_items, packed = values
        body_sig = types.void(types.intp, types.intp, *arg_types)
        # counter, workers, items, failed, args
        state_type = ir.LiteralStructType([I64, I64, I64, I64, packed.type])
        fn = _trampoline(context, builder, body, body_sig, state_type, arg_types)
        state = cgutils.alloca_once(builder, state_type)
        for i, value in enumerate((I64(0), I64(0), n_items, I64(0), packed)):
            builder.store(value, builder.gep(state, [I32(0), I32(i)], inbounds=True))
        raw = builder.bitcast(state, POINTER)

        serial = builder.or_(builder.icmp_signed("<=", count, I64(1)), builder.icmp_signed("<=", n_items, I64(1)))
        null = ir.Constant(POINTER.as_pointer(), None)
        nulls = ir.Constant(I64.as_pointer(), None)
        with builder.if_else(serial) as (alone, together):
            with alone:
                builder.call(fn, [null, nulls, nulls, raw])
            with together:
                pool_type = ir.FunctionType(
                    ir.VoidType(),
                    [POINTER, POINTER.as_pointer(), I64.as_pointer(), I64.as_pointer(), POINTER, I64, I64, I32],
                )
                pool = cgutils.get_or_insert_function(builder.module, pool_type, "numba_parallel_for")
                dims = cgutils.alloca_once_value(builder, count)
                steps = cgutils.alloca_once_value(builder, I64(0))
                no_args = cgutils.alloca_once_value(builder, ir.Constant(POINTER, None))
                builder.call(
                    pool,
                    [
                        builder.bitcast(fn, POINTER), no_args, dims, steps, raw, I64(0), I64(0),
                        builder.trunc(count, I32),
                    ],
                )  # fmt: skip
        failed = builder.load(builder.gep(state, [I32(0), I32(3)], inbounds=True))
        with builder.if_then(builder.icmp_signed("!=", failed, I64(0)), likely=False):
            context.call_conv.return_user_exc(builder, RuntimeError, ("a parallel kernel failed",))
        return context.get_dummy_value()

    return signature, codegen


def _mark(name: str, variant: str) -> Path | None:
    return Path(CACHE_FOLDER, f"{name}.{variant}.done") if CACHE_FOLDER else None


def is_cached(name: str, variant: str) -> bool:
    """Whether a kernel has been compiled on this machine for this dtype."""
    mark = _mark(name, variant)
    return mark is not None and mark.exists()


def mark_cached(name: str, variant: str) -> None:
    """Remember that a kernel is in the cache; a full disk only means that it will be compiled again."""
    mark = _mark(name, variant)
    if mark is not None and not mark.exists():
        with contextlib.suppress(OSError):
            mark.touch()
