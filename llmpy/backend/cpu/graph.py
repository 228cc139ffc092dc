"""Record calls of kernels once and repeat them without Python between them, as CUDA graphs do on GPUs.

    with recording() as calls:     records every kernel that this thread calls, with its arguments
        …
    replay = Graph(calls)          replay() makes the same calls, on the same arrays

Python takes some 4 µs from one kernel to the next: negligible in training, but a tenth of the time of a decoded token,
which is a hundred memory-bound kernels.

A kernel's machine code is a function of words of at most 8 bytes: seven or more for an array, one for a number. Each
call becomes a line of words and the address of a small function that passes them on, compiled per list of types.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.compiler_lock import global_compiler_lock

from .jit import I32, I64, Call, intrinsic, kernel, notes

STEP = ir.FunctionType(I32, [I64.as_pointer()])  # passes a line of words to a kernel; 0 on success
_steps: dict[tuple[Any, ...], tuple[int, Any]] = {}  # by kernel and types: address, and owners of its memory
_numbers = itertools.count()  # numbers STEPs, for unique names


@contextlib.contextmanager
def recording() -> Iterator[list[Call]]:
    """Collect the kernels that this thread calls meanwhile; replayed calls are not allowed."""
    if notes.calls is not None:
        raise RuntimeError("calls are already being recorded")
    notes.calls = []
    try:
        yield notes.calls
    finally:
        notes.calls = None


def words_of(x: Any) -> list[int]:
    """Return an argument as Numba passes it: an array that Python owns (no owner, no parent), or an integer."""
    if isinstance(x, np.ndarray):
        return [0, 0, x.size, x.itemsize, x.ctypes.data, *x.shape, *x.strides]
    return [int(x)]


def step_of(compiled: Any, args: Sequence[Any]) -> int:
    """Return the address of the STEP that calls a kernel, compiled for arguments of these types: arrays, integers."""
    kinds = tuple(compiled.typeof_pyval(x) for x in args)
    if (compiled, kinds) in _steps:
        return _steps[compiled, kinds][0]
    with global_compiler_lock:
        if (compiled, kinds) not in _steps:  # another thread may have been first
            compiled.compile(kinds)  # cached, unless the call converted its arguments
            code = compiled.overloads[kinds]
            simple = all(isinstance(kind, types.Array | types.Integer) for kind in kinds)
            if not simple or code.signature.return_type != types.none:
                raise TypeError(f"{compiled.__name__} cannot be replayed: {code.signature}")
            _steps[compiled, kinds] = _compile_step(f"llmpy_step_{next(_numbers)}", code)
        return _steps[compiled, kinds][0]


def _compile_step(name: str, code: Any) -> tuple[int, Any]:
    """Return the address of the STEP of a compiled kernel, and the owners of their memory."""
    function = code.target_context.call_conv.get_function_type(code.fndesc.restype, code.fndesc.argtypes)
    library = code.library.codegen.create_library(name)
    module = library.create_ir_module(name)
    step = ir.Function(module, STEP, name)
    bd = ir.IRBuilder(step.append_basic_block())
    result, error, *parameters = function.args
    passed = [bd.alloca(kind.pointee) for kind in (result, error)]
    for i, kind in enumerate(parameters):
        passed.append(bd.load(bd.bitcast(bd.gep(step.args[0], [I64(i)]), kind.as_pointer())))
    address = code.library.get_pointer_to_function(code.fndesc.llvm_func_name)
    bd.ret(bd.call(bd.inttoptr(I64(address), function.as_pointer()), passed))
    library.add_ir_module(module)
    library.finalize()
    return library.get_pointer_to_function(name), (library, code)


@intrinsic
def _take(typingctx: Any, step: Any, words: Any) -> Any:
    """Call the STEP at one address with the words at another; return its result."""

    def codegen(context: Any, bd: Any, sig: Any, args: Any) -> Any:
        step, words = args
        return bd.call(bd.inttoptr(step, STEP.as_pointer()), [bd.inttoptr(words, I64.as_pointer())])

    return types.int32(types.int64, types.int64), codegen


@kernel
def replay(
    steps,  # (calls,) i64, addresses of STEPs
    words,  # (calls,) i64, addresses of their arguments
):  # fmt: skip
    for i in range(steps.size):
        if _take(steps[i], words[i]) != 0:
            raise RuntimeError("a parallel kernel failed")


class Graph:
    """Calls of kernels, ready to repeat; keeps their arrays alive."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = list(calls)
        self._lines = [np.array([w for x in args for w in words_of(x)], np.int64) for _, args in calls]
        self._steps = np.array([step_of(compiled, args) for compiled, args in calls], np.int64)
        self._words = np.array([line.ctypes.data for line in self._lines], np.int64)

    def __call__(self) -> None:
        """Make the calls."""
        if notes.calls is not None:
            raise RuntimeError("a replay cannot be recorded")
        replay(self._steps, self._words)
