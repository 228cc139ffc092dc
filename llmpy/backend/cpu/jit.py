"""Compiling Python to machine code: two decorators, one way to run on all cores, one cache.

    @inline    a piece of a kernel: compiled into its callers, never called from Python
    @kernel    an operation: called from Python, releases the GIL, cached on disk
    fork(body, threads, items, (args…))
               inside a kernel: body(worker, item, args…) for every item, on `threads` threads

`fork` gives each thread (`pool`) its own range of items, the same share in every kernel, so that its data is still in
its caches: the rows of a batch, its part of the weights. Items come one at a time from an atomic counter per range. A
thread that has finished its own range helps with the next one, so a core slowed down by another process does fewer.
Numba's `prange` costs a second of compilation per loop, divides the work in advance and waits for every thread.
`worker` in [0, threads) selects scratch memory; results must not depend on it, nor on the order of items, which
`pool.reverse` reverses.
"""

from __future__ import annotations

import functools
import os
import platform
import threading
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils, extending

from .. import kernel_cache
from . import pool

# Sums may be vectorised (in a fixed order) and products fused; NaN, infinity and signed zeros keep their meaning.
# x86-64 fuses every product that has one use; on Arm LLVM decides loop by loop, by its estimate of latencies. So where
# two loops must give the same bits, the product is written as `simd.fma`, which every CPU with FMA fuses.
FASTMATH = {"reassoc", "contract"}
# Without wrappers for callers other than kernels, which take a tenth of the time of compilation.
INLINED: dict[str, Any] = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}

intrinsic: Any = extending.intrinsic


def inline(function: Callable) -> Any:
    """Compile into callers; arithmetic is exact unless a caller's own loops relax it. A call from Python crashes."""
    return numba.njit(fastmath=FASTMATH, **INLINED)(function)


def exact(function: Callable) -> Any:
    """Compile as `inline`, for formulas that depend on their order of operations (range reduction of exp)."""
    return numba.njit(fastmath={"contract"}, **INLINED)(function)


def _compiled(function: Callable) -> Any:
    """Compile on first call: no GIL, no bounds checks, cached on disk (`kernel_cache`)."""
    compiled: Any = numba.njit(nogil=True, error_model="numpy", fastmath=FASTMATH)(function)
    if kernel_cache.FOLDER is not None and os.path.isfile(function.__code__.co_filename):
        compiled._cache = kernel_cache.KernelCache(function)
    return compiled


Call = tuple[Any, tuple[Any, ...]]  # a compiled kernel and its arguments


class _Notes(threading.local):
    """Records the kernels this thread calls, while enabled; see `graph`."""

    calls: list[Call] | None = None


notes = _Notes()


def kernel(function: Callable) -> Any:
    """Make an operation callable from Python, `_compiled`; it keeps the helpers awake."""
    compiled = _compiled(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if notes.calls is not None:
            notes.calls.append((compiled, args))
        try:
            pool.begin()
            return compiled(*args)
        finally:
            pool.end()

    return call


I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
POINTER = I8.as_pointer()
JOB_TYPE = ir.FunctionType(ir.VoidType(), [POINTER, I64])  # state, worker
WAITS_BEFORE_YIELD = 2000  # pauses, some 40 µs: usually longer than a helper needs

llvm.add_symbol("llmpy_board", pool.BOARD)
llvm.add_symbol("llmpy_yield", pool.yield_address())


def _board(bd: Any, where: int) -> Any:
    """Return a pointer to one number on the board."""
    name, kind = "llmpy_board", ir.ArrayType(I64, pool.SIZE)
    board = bd.module.globals.get(name) or ir.GlobalVariable(bd.module, kind, name)
    return bd.gep(board, [I32(0), I32(where)], inbounds=True)


def _read(bd: Any, where: int) -> Any:
    return bd.load_atomic(_board(bd, where), "seq_cst", 8)


def _write(bd: Any, where: int, value: Any) -> None:
    bd.store_atomic(value, _board(bd, where), "seq_cst", 8)


def _pause(bd: Any) -> None:
    """Hint to the core that this is a spin loop."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        bd.call(
            cgutils.get_or_insert_function(bd.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause"), []
        )
    elif machine in ("arm64", "aarch64"):
        hint = ir.FunctionType(ir.VoidType(), [I32])
        bd.call(cgutils.get_or_insert_function(bd.module, hint, "llvm.aarch64.hint"), [I32(1)])


def _start_of(bd: Any, worker: Any, items: Any, workers: Any) -> Any:
    """Return the first item of a worker's range, where its neighbour's ends."""
    return bd.sdiv(bd.mul(worker, items), workers)


def _give_way(bd: Any) -> None:
    """Let another thread run on this core."""
    bd.call(cgutils.get_or_insert_function(bd.module, ir.FunctionType(I32, []), "llmpy_yield"), [])


def _job(context: Any, builder: Any, body: Any, signature: Any, state_type: Any, arg_types: Any) -> Any:
    """Build void job(state, worker): take the items of the worker's own range, then of the others'."""
    compiled = body.dispatcher.get_compile_result(signature)
    context.active_code_library.add_linking_library(compiled.library)
    callee = context.declare_function(builder.module, compiled.fndesc)

    fn = ir.Function(builder.module, JOB_TYPE, builder.module.get_unique_name("llmpy_job"))
    fn.linkage = "internal"
    entry, ranges, more, work, enough, done = (
        fn.append_basic_block(n) for n in ("entry", "ranges", "more", "work", "enough", "done")
    )
    bd = ir.IRBuilder(entry)
    state, worker = bd.bitcast(fn.args[0], state_type.as_pointer()), fn.args[1]
    places = [bd.gep(state, [I32(0), I32(i)], inbounds=True) for i in range(6)]
    one, failed = I64(1), places.pop(3)
    counters, workers, count, mirrored, packed = map(bd.load, places)
    values = [bd.extract_value(packed, i) for i in range(len(arg_types))]
    mirrored = bd.icmp_signed("!=", mirrored, I64(0))
    bd.cbranch(bd.icmp_signed("<", worker, workers), ranges, done)
    bd.position_at_end(ranges)
    turn = bd.phi(I64)
    turn.add_incoming(I64(0), entry)
    owner = bd.srem(bd.add(worker, turn), workers)
    counter = bd.gep(counters, [bd.mul(owner, I64(pool.LINE))], inbounds=True)
    end = _start_of(bd, bd.add(owner, one), count, workers)
    bd.branch(more)
    bd.position_at_end(more)
    item = bd.atomic_rmw("add", counter, one, "monotonic")
    bd.cbranch(bd.icmp_signed("<", item, end), work, enough)
    bd.position_at_end(work)
    item = bd.select(mirrored, bd.sub(bd.sub(count, one), item), item)
    status, _ = context.call_conv.call_function(
        bd, callee, compiled.signature.return_type, signature.args, [worker, item, *values]
    )
    with bd.if_then(status.is_error, likely=False):
        bd.atomic_rmw("or", failed, one, "monotonic")
    bd.branch(more)
    bd.position_at_end(enough)
    following = bd.add(turn, one)
    turn.add_incoming(following, enough)
    bd.cbranch(bd.icmp_signed("<", following, workers), ranges, done)
    bd.position_at_end(done)
    bd.ret_void()
    return fn


def _run_with_helpers(bd: Any, fn: Any, state: Any) -> None:
    """Announce the job, work on it, close it, and wait for the helpers inside."""
    _write(bd, pool.STATE, bd.ptrtoint(state, I64))
    _write(bd, pool.JOB, bd.ptrtoint(fn, I64))
    bd.atomic_rmw("add", _board(bd, pool.GENERATION), I64(1), "seq_cst")
    bd.call(fn, [state, I64(0)])
    _write(bd, pool.JOB, I64(0))
    before, wait, slow, end = bd.block, *(bd.append_basic_block(n) for n in ("wait", "slow", "end"))
    bd.branch(wait)
    bd.position_at_end(wait)
    waited = bd.phi(I64)
    waited.add_incoming(I64(0), before)
    active = _read(bd, pool.ACTIVE)
    more = bd.add(waited, I64(1))
    again = bd.append_basic_block("again")
    bd.cbranch(bd.icmp_signed("==", active, I64(0)), end, again)
    bd.position_at_end(again)
    _pause(bd)
    waited.add_incoming(more, again)
    bd.cbranch(bd.icmp_signed("<", more, I64(WAITS_BEFORE_YIELD)), wait, slow)
    bd.position_at_end(slow)
    _give_way(bd)
    waited.add_incoming(more, slow)
    bd.branch(wait)
    bd.position_at_end(end)
    _write(bd, pool.LOCK, I64(0))


@intrinsic(prefer_literal=False)
def fork(typingctx: Any, body: Any, threads: Any, items: Any, args: Any) -> Any:
    """Run body(worker, item, *args) for item in range(items) on up to `threads` ≤ `pool.MOST` threads."""
    arg_types = tuple(args.types)
    signature = types.void(body, types.intp, types.intp, args)

    def codegen(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        _, limit, n_items, packed = values
        body_sig = types.void(types.intp, types.intp, *arg_types)
        # counters of the ranges, workers, items, failed, whether items are reversed (for all threads), arguments
        state_type = ir.LiteralStructType([I64.as_pointer(), I64, I64, I64, I64, packed.type])
        mirrored = _read(builder, pool.REVERSED)
        fn = _job(context, builder, body, body_sig, state_type, arg_types)
        state, own_counter = cgutils.alloca_once(builder, state_type), cgutils.alloca_once(builder, I64)
        raw = builder.bitcast(state, POINTER)

        def fill(counters: Any, workers: Any) -> None:
            for i, value in enumerate((counters, workers, n_items, I64(0), mirrored, packed)):
                builder.store(value, builder.gep(state, [I32(0), I32(i)], inbounds=True))

        def without_helpers() -> None:
            builder.store(I64(0), own_counter)
            fill(own_counter, I64(1))
            builder.call(fn, [raw, I64(0)])

        several = builder.and_(builder.icmp_signed(">", limit, I64(1)), builder.icmp_signed(">", n_items, I64(1)))
        with builder.if_else(several) as (shared, alone):
            with shared:
                # If another thread of this program is running a job, run this one without helpers.
                taken = builder.atomic_rmw("xchg", _board(builder, pool.LOCK), I64(1), "seq_cst")
                with builder.if_else(builder.icmp_signed("==", taken, I64(0))) as (free, busy):
                    with free:
                        counters = _board(builder, pool.COUNTERS)
                        with cgutils.for_range(builder, limit, intp=I64) as loop:
                            counter = builder.gep(counters, [builder.mul(loop.index, I64(pool.LINE))], inbounds=True)
                            builder.store(_start_of(builder, loop.index, n_items, limit), counter)
                        fill(counters, limit)
                        _run_with_helpers(builder, fn, raw)
                    with busy:
                        without_helpers()
            with alone:
                without_helpers()
        failed = builder.load(builder.gep(state, [I32(0), I32(3)], inbounds=True))
        with builder.if_then(builder.icmp_signed("!=", failed, I64(0)), likely=False):
            context.call_conv.return_user_exc(builder, RuntimeError, ("a parallel kernel failed",))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _look(typingctx: Any, seen: Any, worker: Any) -> Any:
    """Join a job newer than generation `seen` as `worker`, if there is one; return the current generation."""

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        generation = _read(bd, pool.GENERATION)
        with bd.if_else(bd.icmp_signed("==", generation, args[0])) as (old, new):
            with old:
                _pause(bd)
            with new:
                # Enter first, then read the job; its owner closes it first, then reads how many are inside.
                bd.atomic_rmw("add", _board(bd, pool.ACTIVE), I64(1), "seq_cst")
                job = _read(bd, pool.JOB)
                with bd.if_then(bd.icmp_signed("!=", job, I64(0))):
                    state = bd.inttoptr(_read(bd, pool.STATE), POINTER)
                    bd.call(bd.inttoptr(job, JOB_TYPE.as_pointer()), [state, args[1]])
                bd.atomic_rmw("sub", _board(bd, pool.ACTIVE), I64(1), "seq_cst")
        return generation

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _stay_awake(typingctx: Any) -> Any:
    """Let another thread run on this core, then return whether a kernel is running."""

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        _give_way(bd)
        return bd.icmp_signed("!=", _read(bd, pool.KERNEL), I64(0))

    return types.boolean(), codegen


@_compiled
def help_out(worker, spins):
    """Join job after job as a helper, until `spins` looks have found none and no kernel runs.

    This is not a kernel: a kernel would wake the helper that calls it.
    """
    seen, idle = 0, 0
    while idle < spins or _stay_awake():
        idle = 0 if idle >= spins else idle + 1
        now = _look(seen, worker)
        if now != seen:
            idle = 0
        seen = now


def hire(threads: int) -> None:
    """Start the helpers that kernels on `threads` threads need."""
    if threads > 1:
        # Compile here: helpers busy compiling would miss the first kernels. A call would join another thread's job.
        help_out.compile((types.int64, types.int64))
        pool.hire(threads, help_out)
