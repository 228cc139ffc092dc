"""The CPU backend: each operation of the seam calls one compiled kernel; scratch memory belongs to this class."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ...errors import LlmpyError
from ...system.resources import cores
from .. import kernel_cache
from . import (
    activation,
    apart,
    attention,
    columns,
    cross_entropy,
    decode,
    embedding,
    global_norm,
    graph,
    int8,
    jit,
    layernorm,
    linear,
    peak,
    pool,
    rmsnorm,
    rotary,
    simd,
)
from . import adamw as adamw_
from . import digest as digest_
from . import narrow as narrow_

ALIGNMENT = 64  # bytes: a cache line, and the widest vector
# Kernels that only some kinds of models call; `warm_up` compiles those of one (`ModelConfig.kinds`).
KINDS = {
    "gpt2": {"layernorm_forward", "residual_layernorm_forward", "layernorm_backward"},
    "llama": {
        "rmsnorm_forward", "residual_rmsnorm_forward", "rmsnorm_backward", "head_rmsnorm_forward",
        "head_rmsnorm_backward", "rope",
    },
    "lora": {"add_columns", "take_columns", "activation_backward"},
    "int8": {"quantise", "int8_linear_forward"},
}  # fmt: skip
REPLACED = {"linear_forward", "pack", "packed_linear_forward"}  # by those of "int8"
# Stand for absent arrays: kernels have one signature.
NO_BIAS, NO_GRADIENT = np.empty(0, np.float32), np.empty((0, 0), np.float32)
NO_POSITIONS = np.empty((0, 0), np.int32)
CLASSIFIER_ROWS = 512  # rows of logits in memory at a time
# Kernels of decoding: some of training, and some that only decoding compiles.
DECODING_ALONE = {"pack", "packed_linear_forward", "attention_decode", "replay"} | KINDS["int8"]
DECODING = DECODING_ALONE | {
    "linear_forward", "attention_forward", "embedding_forward", "layernorm_forward", "residual_layernorm_forward",
    "rmsnorm_forward", "residual_rmsnorm_forward", "head_rmsnorm_forward", "rope", "add_columns", "activation_forward",
    "narrow",
}  # fmt: skip
# Kernels of one decoded token, prepared at start: Ctrl-C must not interrupt LLVM.
REPLAYED = {
    "layernorm_forward", "residual_layernorm_forward", "linear_forward", "packed_linear_forward", "attention_decode",
    "rmsnorm_forward", "residual_rmsnorm_forward", "head_rmsnorm_forward", "rope", "add_columns", "activation_forward",
    "int8_linear_forward",
}  # fmt: skip
FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


def native_dtype() -> str:
    """Return the dtype that "auto" selects: bfloat16 if the CPU multiplies it natively, else float32."""
    return "bfloat16" if simd.HOST.bf16 else "float32"


class CPU:
    """float32 or mixed precision (`dtype` "bfloat16") on `threads` threads (default: all cores of this process).

    "int8": as "auto", and models for generation have int8 weights (`quantises`).
    """

    name = "cpu"
    wide = FLOAT32

    def __init__(self, threads: int | None = None, dtype: str = "float32") -> None:
        self.quantises = dtype == "int8"
        if dtype in ("auto", "int8"):
            dtype = native_dtype()
        if dtype not in ("float32", "bfloat16"):
            raise LlmpyError("option.invalid", f"unknown dtype {dtype!r}", "Use float32, bfloat16, int8 or auto")
        self.dtype = BFLOAT16 if dtype == "bfloat16" else FLOAT32
        self.threads = cores() if threads is None else threads
        if not 1 <= self.threads <= pool.MOST:
            message = f"--threads {self.threads} is out of range"
            raise LlmpyError("option.out-of-range", message, f"Use a number from 1 to {pool.MOST}")
        self.isa = simd.HOST.name
        self.lock = threading.RLock()
        pool.machines.add(self)
        jit.hire(self.threads)
        self._none_1, self._none_2 = _bits(np.empty(0, self.dtype)), _bits(np.empty((0, 0), self.dtype))
        self._gemm_scratch = self.empty((self.threads, linear.SCRATCH), FLOAT32)
        self._attention_scratch = self.empty((self.threads, 0), FLOAT32)
        self._partial = self.empty(0, FLOAT32)
        self._packed = self.empty(0, FLOAT32)
        self._sums = self.empty(0, FLOAT32)
        self._logits = self.empty(0, self.dtype)
        self._int8_rows = self.empty(0, np.uint8)
        self._decode_scratch = self.empty((self.threads, max(decode.LINEAR_SCRATCH, int8.SCRATCH)), FLOAT32)

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return uninitialised memory aligned to a cache line."""
        return _aligned(np.empty, shape, dtype)

    def zeros(self, shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return zeros aligned to a cache line; large arrays take no memory until they are used."""
        return _aligned(np.zeros, shape, dtype)

    def to_host(self, x: np.ndarray) -> np.ndarray:
        """Return x."""
        return x

    def zero(self, x: np.ndarray) -> None:
        """x := 0."""
        x.fill(0)

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        """See `backend.Ops`. The repeat runs without Python between kernels."""
        with graph.recording() as calls:
            run()
        return graph.Graph(calls)

    @contextlib.contextmanager
    def reversed(self) -> Iterator[None]:
        """See `backend.Ops`."""
        pool.reverse(True)
        try:
            yield
        finally:
            pool.reverse(False)

    def _partials(self, count: int) -> np.ndarray:
        """Return scratch for partial sums, grown for larger shapes."""
        if self._partial.size < count:
            self._partial = self.empty(count, FLOAT32)
        return self._partial

    def _packed_inputs(self, rows: int, columns: int) -> np.ndarray:
        """Return scratch for the panels shared within `linear_backward`, grown for larger shapes."""
        size = max(min(rows, simd.KC), simd.MOST_BLOCK) * (columns + simd.LANES)
        if self._packed.size < size:
            self._packed = self.empty(size, FLOAT32)
        return self._packed

    def _attention(self, out: Any, stats: Any, qkv: Any) -> np.ndarray:
        NH, T = stats.shape[1:]
        HS = out.shape[-1] // NH
        size = attention.scratch_size(T, HS, 2 * NH // (qkv.shape[-1] // HS - NH))
        if self._attention_scratch.shape[1] < size:
            self._attention_scratch = self.empty((self.threads, size), FLOAT32)
        return self._attention_scratch

    def narrow(self, out: Any, x: Any) -> None:
        """See `backend.Ops`, as for all operations below."""
        if out is not x:
            narrow_.narrow(self.threads, _bits(out).reshape(-1), x.reshape(-1))

    def embedding_forward(self, out: Any, tokens: Any, wte: Any, wpe: Any, positions: Any = None) -> None:
        tables = _bits(wte), self._none_2 if wpe is None else _bits(wpe)
        embedding.embedding_forward(self.threads, _rows(out), tokens, *tables, _or_none(positions, NO_POSITIONS))

    def embedding_backward(
        self, dwte: Any, dwpe: Any, dout: Any, tokens: Any, accumulate: bool, positions: Any = None
    ) -> None:
        inputs = _rows(dout), tokens, accumulate, _or_none(positions, NO_POSITIONS)
        embedding.embedding_backward(self.threads, dwte, NO_GRADIENT if dwpe is None else dwpe, *inputs)

    def layernorm_forward(self, out: Any, mean: Any, rstd: Any, inp: Any, weight: Any, bias: Any) -> None:
        statistics = mean.reshape(-1), rstd.reshape(-1)
        layernorm.layernorm_forward(self.threads, _rows(out), *statistics, _rows(inp), weight, bias)

    def residual_layernorm_forward(
        self, resid: Any, out: Any, mean: Any, rstd: Any, inp1: Any, inp2: Any, weight: Any, bias: Any
    ) -> None:
        outputs = _rows(resid), _rows(out), mean.reshape(-1), rstd.reshape(-1)
        layernorm.residual_layernorm_forward(self.threads, *outputs, _rows(inp1), _rows(inp2), weight, bias)

    def layernorm_backward(
        self, dinp: Any, dweight: Any, dbias: Any, dout: Any, inp: Any, mean: Any, rstd: Any, weight: Any,
        accumulate: bool,
    ) -> None:  # fmt: skip
        inp = _rows(inp)
        BT, C = inp.shape
        partial = self._partials(-(-BT // layernorm.BLOCK) * 2 * C)
        outputs = _rows(dinp), _or_none(dweight), _or_none(dbias)
        inputs = _rows(dout), inp, mean.reshape(-1), rstd.reshape(-1), weight
        layernorm.layernorm_backward(self.threads, *outputs, *inputs, accumulate, partial)

    def rmsnorm_forward(self, out: Any, rstd: Any, inp: Any, weight: Any, eps: float) -> None:
        rmsnorm.rmsnorm_forward(self.threads, _rows(out), rstd.reshape(-1), _rows(inp), weight, _one(eps))

    def residual_rmsnorm_forward(
        self, resid: Any, out: Any, rstd: Any, inp1: Any, inp2: Any, weight: Any, eps: float
    ) -> None:
        outputs = _rows(resid), _rows(out), rstd.reshape(-1)
        rmsnorm.residual_rmsnorm_forward(self.threads, *outputs, _rows(inp1), _rows(inp2), weight, _one(eps))

    def rmsnorm_backward(
        self, dinp: Any, dweight: Any, dout: Any, inp: Any, rstd: Any, weight: Any, accumulate: bool
    ) -> None:
        inp = _rows(inp)
        BT, C = inp.shape
        partial = self._partials(-(-BT // rmsnorm.BLOCK) * C)
        inputs = _rows(dout), inp, rstd.reshape(-1), weight
        rmsnorm.rmsnorm_backward(self.threads, _rows(dinp), _or_none(dweight), *inputs, accumulate, partial)

    def head_rmsnorm_forward(self, out: Any, rstd: Any, inp: Any, q_weight: Any, k_weight: Any, eps: float) -> None:
        inputs = _rows(inp), q_weight, k_weight, _one(eps)
        rmsnorm.head_rmsnorm_forward(self.threads, _rows(out), _rows(rstd), *inputs)

    def head_rmsnorm_backward(
        self, dinp: Any, dq_weight: Any, dk_weight: Any, dout: Any, inp: Any, rstd: Any, q_weight: Any, k_weight: Any,
        accumulate: bool,
    ) -> None:  # fmt: skip
        inp = _rows(inp)
        scratch = self._partials((self.threads + 2 * -(-inp.shape[0] // rmsnorm.BLOCK)) * q_weight.size)
        outputs = _rows(dinp), _or_none(dq_weight), _or_none(dk_weight)
        inputs = _rows(dout), inp, _rows(rstd), q_weight, k_weight
        rmsnorm.head_rmsnorm_backward(self.threads, *outputs, *inputs, accumulate, scratch)

    def rope(self, x: Any, cos: Any, sin: Any, positions: Any, heads: int, inverse: bool) -> None:
        rotary.rope(self.threads, _rows(x), cos, sin, positions.reshape(-1), heads, -1 if inverse else 1)

    def activation_forward(self, out: Any, pre: Any) -> None:
        activation.activation_forward(self.threads, _rows(out), _rows(pre))

    def activation_backward(self, dpre: Any, dout: Any, pre: Any) -> None:
        activation.activation_backward(self.threads, _rows(dpre), _rows(dout), _rows(pre), self._gemm_scratch)

    def linear_forward(self, out: Any, inp: Any, weight: Any, bias: Any, pre: Any = None) -> None:
        pre = self._none_2 if pre is None else _rows(pre)
        out, inp, bias = _rows(out), _rows(inp), NO_BIAS if bias is None else bias
        if weight.dtype == np.uint8:
            size = inp.shape[0] * int8.blocks_of(inp.shape[1]) * int8.ROW_BYTES
            if self._int8_rows.size < size:
                self._int8_rows = self.empty(size, np.uint8)
            scratch = self._int8_rows, self._decode_scratch
            int8.int8_linear_forward(self.threads, out, pre, inp, weight, bias, *scratch)
            return
        linear.linear_forward(self.threads, out, pre, inp, _bits(weight), bias, self._gemm_scratch)

    def linear_backward(
        self, dinp: Any, dweight: Any, dbias: Any, dout: Any, inp: Any, weight: Any, pre: Any, accumulate: bool
    ) -> None:
        frozen = dweight is None
        outputs = _rows(dinp), NO_GRADIENT if frozen else dweight, NO_BIAS if dbias is None else dbias
        dout, weight, none = _rows(dout), _bits(weight), self._none_2
        inputs = dout, none if frozen else _rows(inp), weight, none if pre is None else _rows(pre)
        rows, (OC, C) = len(dout), weight.shape
        sums = linear.shared_sums(rows, OC, C)
        if self._sums.size < sums:
            self._sums = self.empty(sums, FLOAT32)
        packed = NO_BIAS if frozen else self._packed_inputs(rows, C)
        linear.linear_backward(self.threads, *outputs, *inputs, accumulate, self._gemm_scratch, packed, self._sums)

    def add_columns(self, out: Any, x: Any, first: int, scale: float) -> None:
        columns.add_columns(self.threads, _rows(out), _rows(x), first, _one(scale))

    def take_columns(self, out: Any, x: Any, first: int, scale: float) -> None:
        columns.take_columns(self.threads, _rows(out), _rows(x), first, _one(scale))

    def attention_forward(self, out: Any, stats: Any, qkv: Any, positions: Any = None) -> None:
        inputs = _rows(qkv), _or_none(positions, NO_POSITIONS), self._attention(out, stats, qkv)
        attention.attention_forward(self.threads, _rows(out), stats, *inputs)

    def attention_backward(self, dqkv: Any, dout: Any, qkv: Any, out: Any, stats: Any, positions: Any = None) -> None:
        rows = _rows(dqkv), _rows(dout), _rows(qkv), _rows(out)
        scratch = self._attention(out, stats, qkv)
        attention.attention_backward(self.threads, *rows, stats, _or_none(positions, NO_POSITIONS), scratch)

    def packed_size(self, OC: int, C: int) -> int:
        per = 4 // self.dtype.itemsize
        return decode.packed_words(OC, C, per) * per

    def pack(self, packed: Any, weight: Any) -> None:
        decode.pack(self.threads, _bits(packed), _bits(weight))

    def packed_linear_forward(self, out: Any, inp: Any, packed: Any, bias: Any, pre: Any = None) -> None:
        pre = self._none_2 if pre is None else _rows(pre)
        inputs = _rows(inp), _bits(packed), NO_BIAS if bias is None else bias
        decode.packed_linear_forward(self.threads, _rows(out), pre, *inputs, self._decode_scratch)

    def quantised_shape(self, OC: int, C: int) -> tuple[int, int]:
        return int8.shape(OC, C)

    def quantise(self, packed: Any, weight: Any) -> None:
        int8.quantise(self.threads, packed, weight, self._decode_scratch)

    def cache_fill(self, cache: Any, qkv: Any) -> None:
        B, NKV, _, _, HS = cache.shape
        rows = _rows(qkv)
        pairs = rows[:, rows.shape[1] - 2 * NKV * HS :].reshape(B, -1, 2, NKV, HS)
        _bits(cache)[:, :, :, : pairs.shape[1]] = pairs.transpose(0, 3, 2, 1, 4)

    def attention_decode(self, out: Any, cache: Any, qkv: Any, slots: Any, positions: Any) -> None:
        _, NKV, _, _, HS = cache.shape
        size = decode.attention_scratch(HS, out.shape[-1] // HS // NKV)
        if self._decode_scratch.shape[1] < size:
            self._decode_scratch = self.empty((self.threads, size), FLOAT32)
        rows = _rows(out), _bits(cache), _rows(qkv), slots, positions
        decode.attention_decode(self.threads, *rows, self._decode_scratch)

    def classifier(
        self, losses: Any, dinp: Any, dwte: Any, inp: Any, wte: Any, targets: Any, vocab_size: int, scale: float,
        accumulate: bool,
    ) -> None:  # fmt: skip
        inp, losses, targets = inp.reshape(-1, inp.shape[-1]), losses.reshape(-1), targets.reshape(-1)
        rows, Vp = inp.shape[0], wte.shape[0]
        gradient = dinp is not None
        chunk = min(rows, CLASSIFIER_ROWS)
        if self._logits.size < chunk * Vp:
            self._logits = self.empty(chunk * Vp, self.dtype)
        for first in range(0, rows, chunk):
            part = slice(first, min(rows, first + chunk))
            logits = self._logits[: (part.stop - first) * Vp].reshape(-1, Vp)
            self.linear_forward(logits, inp[part], wte, None)
            cross_entropy.softmax_cross_entropy(
                self.threads, losses[part], _bits(logits), targets[part], vocab_size, np.float32(scale), gradient
            )
            if gradient:
                dpart = dinp.reshape(inp.shape)[part]
                self.linear_backward(dpart, dwte, None, logits, inp[part], wte, None, accumulate or first > 0)

    def adamw(
        self, param: Any, grad: Any, m: Any, v: Any, lr: float, beta1: float, beta2: float, eps: float,
        weight_decay: float, grad_scale: float, step: int, stored: Any = None,
    ) -> None:  # fmt: skip
        f32 = np.float32
        adamw_.adamw(
            self.threads, param, self._none_1 if stored is None else _bits(stored), grad, m, v, f32(lr), f32(1 - beta1),
            f32(1 - beta2), f32(eps), f32(weight_decay), f32(grad_scale), f32(1 / (1 - beta1**step)),
            f32(1 / (1 - beta2**step)),
        )  # fmt: skip

    def global_norm(self, grad: Any) -> float:
        partial = self._partials(-(-grad.size // global_norm.BLOCK))
        return float(global_norm.global_norm(self.threads, grad, partial))

    def digest(self, x: Any) -> int:
        raw = x.reshape(-1).view(np.uint8)
        partial = np.empty(-(-(raw.size // 8) // digest_.BLOCK), np.uint64)
        return int(digest_.digest(self.threads, raw, partial))

    def measure_peak(self, seconds: float = 0.2) -> float:
        """Measure GFLOP/s of multiply-adds in this backend's dtype on all its threads."""
        return peak.measure(self.threads, self._none_1, self._partials(16 * self.threads), seconds)

    def measure_bandwidth(self) -> float:
        """Measure GB/s of a stream far larger than the caches on all threads; see `peak`."""
        a, b, c = (self.empty(peak.STREAM, FLOAT32) for _ in range(3))
        return peak.measure_bandwidth(self.threads, a, b, c)

    def measure_reading(self, x: Any) -> float:
        """Measure GB/s of reading x (n,), far larger than the caches, on all threads."""
        a = x.view(np.uint8)[: x.nbytes // 4 * 4].view(FLOAT32)
        return peak.measure_reading(self.threads, self._partials(-(-a.size // peak.READ_BLOCK)), a)

    def version_info(self) -> dict[str, str]:
        """Return versions and settings of the code that computes, for the run's record."""
        import llvmlite
        import numba

        return {
            "backend": self.name, "dtype": "int8" if self.quantises else str(self.dtype),
            "isa": self.isa, "threads": str(self.threads),
            "numba": numba.__version__, "llvmlite": llvmlite.__version__, "numpy": np.__version__,
        }  # fmt: skip

    def _calls(self, decoding: bool | None, kinds: Sequence[str]) -> list[tuple[str, Callable[[], object]]]:
        calls = smallest_calls(self, self._kinds(kinds))
        if decoding is None:
            return calls
        return [(name, call) for name, call in calls if (name in DECODING if decoding else name not in DECODING_ALONE)]

    def _kinds(self, kinds: Sequence[str]) -> tuple[str, ...]:
        return (*kinds, "int8") if self.quantises else tuple(kinds)

    def compiled(self, kinds: Sequence[str] = ("gpt2",), decoding: bool | None = False) -> bool:
        """Return whether the kernels of training, of `decoding` or (None) of both are in the cache."""
        return all(kernel_cache.is_cached(name, str(self.dtype)) for name, _ in self._calls(decoding, kinds))

    def warm_up(
        self, log: Callable[[str], None], decoding: bool | None = False, kinds: Sequence[str] = ("gpt2",)
    ) -> None:
        """Compile or load those kernels by calling each on minimal arrays; log misses."""
        calls = self._calls(decoding, kinds)
        missing = [name for name, _ in calls if not kernel_cache.is_cached(name, str(self.dtype))]
        if missing:
            why = kernel_cache.problem
            again = f"every run, because {why}. {kernel_cache.ELSEWHERE}" if why else "first run on this machine only"
            log(f"compiling {len(missing)} kernels for {self.isa}, {self.dtype} ({again})")
            todo, by_name = [name for name in missing if name != "replay"], dict(calls)  # which calls the others
            with apart.shared(todo, str(self.dtype), ",".join(self._kinds(kinds))) as mine:
                for number, name in mine:
                    log(f"  {number}/{len(missing)} {name}")
                    by_name[name]()
        for name, call in calls:
            call()
            kernel_cache.mark_cached(name, str(self.dtype))


def compile_taken(place: str, dtype: str, kinds: str, *names: str) -> None:
    """Compile the kernels that no other process has taken; see `apart`."""
    calls = dict(smallest_calls(CPU(1, dtype), kinds.split(",")))
    for name in apart.taken(Path(place), names):
        calls[name]()
        kernel_cache.mark_cached(name, dtype)


def _aligned(allocate: Callable[..., np.ndarray], shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = allocate(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _bits(x: np.ndarray) -> np.ndarray:
    """Return bfloat16 as uint16, as kernels take it; other dtypes unchanged."""
    return x.view(np.uint16) if x.dtype == BFLOAT16 else x


def _rows(x: np.ndarray) -> np.ndarray:
    """Return (…, C) as (rows, C), by way of `_bits`."""
    return _bits(x if x.ndim == 2 else x.reshape(-1, x.shape[-1]))


def _or_none(x: np.ndarray | None, none: np.ndarray = NO_BIAS) -> np.ndarray:
    """Return x, or the array that stands for an absent one."""
    return none if x is None else x


def _one(x: float) -> np.ndarray:
    """Return x as an array, as kernels that may be replayed take it."""
    return np.full(1, x, FLOAT32)


def smallest_calls(ops: CPU, kinds: Sequence[str]) -> list[tuple[str, Callable[[], object]]]:
    """Return name and call on minimal arrays of each kernel that models of these kinds need.

    Those that take longest to compile are at both ends, with those that share their functions (`apart.shared`).
    """

    def w(*shape: int) -> np.ndarray:
        return np.ones(shape, ops.wide)

    def a(*shape: int) -> np.ndarray:
        return np.ones(shape, ops.dtype)

    tokens = np.zeros((1, 1), np.int32)
    norm = w(1), w(1)
    calls: list[tuple[str, Callable[[], object]]] = [
        ("linear_forward", lambda: ops.linear_forward(a(1, 1), a(1, 1), a(1, 1), None)),
        (
            "linear_backward",
            lambda: ops.linear_backward(a(1, 1), w(1, 1), w(1), a(1, 1), a(1, 1), a(1, 1), None, False),
        ),
        ("activation_forward", lambda: ops.activation_forward(a(1, 1), a(1, 1))),
        ("activation_backward", lambda: ops.activation_backward(a(1, 1), a(1, 1), a(1, 1))),
        ("add_columns", lambda: ops.add_columns(a(1, 1), a(1, 1), 0, 1.0)),
        ("take_columns", lambda: ops.take_columns(a(1, 1), a(1, 1), 0, 1.0)),
        ("embedding_forward", lambda: ops.embedding_forward(w(1, 1), tokens, a(1, 1), a(1, 1))),
        ("embedding_backward", lambda: ops.embedding_backward(w(1, 1), w(1, 1), w(1, 1), tokens, False)),
        ("layernorm_forward", lambda: ops.layernorm_forward(a(1, 1), *norm, w(1, 1), w(1), w(1))),
        (
            "residual_layernorm_forward",
            lambda: ops.residual_layernorm_forward(w(1, 1), a(1, 1), *norm, w(1, 1), a(1, 1), w(1), w(1)),
        ),
        (
            "layernorm_backward",
            lambda: ops.layernorm_backward(w(1, 1), w(1), w(1), a(1, 1), w(1, 1), *norm, w(1), False),
        ),
        ("softmax_cross_entropy", lambda: ops.classifier(w(1), None, None, a(1, 1), a(1, 1), tokens, 1, 0.0, False)),
        ("adamw", lambda: ops.adamw(w(1), w(1), w(1), w(1), 0.0, 0.9, 0.99, 1e-8, 0.0, 1.0, 1, a(1))),
        ("global_norm", lambda: ops.global_norm(w(1))),
        ("digest", lambda: ops.digest(w(1))),
        ("multiply_adds", lambda: ops.measure_peak(0.0)),
        ("rmsnorm_forward", lambda: ops.rmsnorm_forward(a(1, 1), w(1), w(1, 1), w(1), 1.0)),
        (
            "residual_rmsnorm_forward",
            lambda: ops.residual_rmsnorm_forward(w(1, 1), a(1, 1), w(1), w(1, 1), a(1, 1), w(1), 1.0),
        ),
        ("rmsnorm_backward", lambda: ops.rmsnorm_backward(w(1, 1), w(1), a(1, 1), w(1, 1), w(1), w(1), False)),
        ("head_rmsnorm_forward", lambda: ops.head_rmsnorm_forward(a(1, 3), w(1, 2), a(1, 3), w(1), w(1), 1.0)),
        (
            "head_rmsnorm_backward",
            lambda: ops.head_rmsnorm_backward(a(1, 3), w(1), w(1), a(1, 3), a(1, 3), w(1, 2), w(1), w(1), False),
        ),
        ("rope", lambda: ops.rope(a(1, 2), w(1, 1), w(1, 1), tokens, 1, False)),
    ]
    cache, row, packed = a(1, 1, 2, 1, 1), np.zeros(1, np.int32), np.zeros(ops.quantised_shape(1, 1), np.uint8)
    calls += [
        ("pack", lambda: ops.pack(a(ops.packed_size(1, 1)), a(1, 1))),
        ("packed_linear_forward", lambda: ops.packed_linear_forward(a(1, 1), a(1, 1), a(ops.packed_size(1, 1)), None)),
        ("attention_decode", lambda: ops.attention_decode(a(1, 1), cache, a(1, 3), row, row)),
        ("quantise", lambda: ops.quantise(packed, w(1, 1))),
        ("int8_linear_forward", lambda: ops.linear_forward(a(1, 1), a(1, 1), packed, None)),
    ]
    others = set().union(*KINDS.values()).difference(*(KINDS[kind] for kind in kinds))
    if "int8" in kinds:
        others |= REPLACED - ({"linear_forward"} if "lora" in kinds else set())  # adapters are not quantised
    calls = [(name, call) for name, call in calls if name not in others]
    replayed = [call for name, call in calls if name in REPLAYED]
    calls.append(("replay", lambda: ops.capture(lambda: [call() for call in replayed])()))
    if ops.dtype != ops.wide:
        calls.append(("narrow", lambda: ops.narrow(a(1), w(1))))
    return [
        *calls,
        ("attention_backward", lambda: ops.attention_backward(a(1, 3), a(1, 1), a(1, 3), a(1, 1), w(1, 1, 1))),
        ("attention_forward", lambda: ops.attention_forward(a(1, 1), w(1, 1, 1), a(1, 3))),
    ]
