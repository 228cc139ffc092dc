"""The CPU backend: the seam's operations, each one call of a compiled kernel, and the scratch they need."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ...errors import LlmpyError
from . import adamw as adamw_
from . import attention, cross_entropy, embedding, global_norm, jit, layernorm, linear, peak, simd

ALIGNMENT = 64  # bytes: a cache line, and the widest vector
NONE_1 = np.empty(0, np.float32)  # "no array", for kernels that have one signature
NONE_2 = np.empty((0, 0), np.float32)
CLASSIFIER_ROWS = 512  # rows whose logits exist at one time


def default_threads() -> int:
    """Cores that this process may use: physical ones, within its affinity and its container's share."""
    cores = psutil.cpu_count(logical=False) or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no container limit that can be read
    return max(1, cores)


class CPU:
    """float32 on `threads` threads (default: all cores of this process)."""

    name = "cpu"
    dtype = np.dtype(np.float32)

    def __init__(self, threads: int | None = None) -> None:
        self.threads = default_threads() if threads is None else threads
        if not 1 <= self.threads <= 1024:
            raise LlmpyError(f"{self.threads} threads", "use --threads between 1 and 1024")
        self.isa = simd.HOST.name
        self.threading_layer = jit.launch_threads(self.threads)
        self._gemm_scratch = self.empty((self.threads, linear.SCRATCH), np.float32)
        self._attention_scratch = self.empty((self.threads, 0), np.float32)
        self._partial = self.empty(0, np.float32)
        self._packed = self.empty(0, np.float32)
        self._logits = self.empty(0, np.float32)

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
        """Uninitialised memory that begins on a cache line."""
        dtype = np.dtype(dtype)
        count = int(np.prod(shape))
        raw = np.empty(count * dtype.itemsize + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + count * dtype.itemsize].view(dtype).reshape(shape)

    def to_host(self, x: np.ndarray) -> np.ndarray:
        """x itself."""
        return x

    def zero(self, x: np.ndarray) -> None:
        """x := 0."""
        x.fill(0)

    def _partials(self, count: int) -> np.ndarray:
        """Room for partial sums; grows when a larger shape first comes along."""
        if self._partial.size < count:
            self._partial = self.empty(count, np.float32)
        return self._partial

    def _packed_inputs(self, rows: int, columns: int) -> np.ndarray:
        """Room for the panels that `linear_backward` shares; grows when a larger shape first comes along."""
        size = min(rows, simd.KC) * (columns + simd.LANES)
        if self._packed.size < size:
            self._packed = self.empty(size, np.float32)
        return self._packed

    def _attention(self, T: int, HS: int) -> np.ndarray:
        size = attention.scratch_size(T, HS)
        if self._attention_scratch.shape[1] < size:
            self._attention_scratch = self.empty((self.threads, size), np.float32)
        return self._attention_scratch

    def embedding_forward(self, out: Any, tokens: Any, wte: Any, wpe: Any) -> None:
        """See `backend.Ops`, as for all that follow."""
        embedding.embedding_forward(self.threads, _rows(out), tokens, wte, wpe)

    def embedding_backward(self, dwte: Any, dwpe: Any, dout: Any, tokens: Any, accumulate: bool) -> None:
        embedding.embedding_backward(self.threads, dwte, dwpe, _rows(dout), tokens, accumulate)

    def layernorm_forward(self, out: Any, mean: Any, rstd: Any, inp: Any, weight: Any, bias: Any) -> None:
        layernorm.layernorm_forward(
            self.threads, _rows(out), mean.reshape(-1), rstd.reshape(-1), _rows(inp), weight, bias
        )

    def residual_layernorm_forward(
        self, resid: Any, out: Any, mean: Any, rstd: Any, inp1: Any, inp2: Any, weight: Any, bias: Any
    ) -> None:
        layernorm.residual_layernorm_forward(
            self.threads, _rows(resid), _rows(out), mean.reshape(-1), rstd.reshape(-1), _rows(inp1), _rows(inp2),
            weight, bias,
        )  # fmt: skip

    def layernorm_backward(
        self, dinp: Any, dweight: Any, dbias: Any, dout: Any, inp: Any, mean: Any, rstd: Any, weight: Any,
        accumulate: bool,
    ) -> None:  # fmt: skip
        inp = _rows(inp)
        BT, C = inp.shape
        partial = self._partials(-(-BT // layernorm.BLOCK) * 2 * C)
        layernorm.layernorm_backward(
            self.threads, _rows(dinp), dweight, dbias, _rows(dout), inp, mean.reshape(-1), rstd.reshape(-1), weight,
            accumulate, partial,
        )  # fmt: skip

    def linear_forward(self, out: Any, inp: Any, weight: Any, bias: Any, pre_gelu: Any = None) -> None:
        linear.linear_forward(
            self.threads,
            _rows(out),
            NONE_2 if pre_gelu is None else _rows(pre_gelu),
            _rows(inp),
            weight,
            NONE_1 if bias is None else bias,
            self._gemm_scratch,
        )

    def linear_backward(
        self, dinp: Any, dweight: Any, dbias: Any, dout: Any, inp: Any, weight: Any, pre_gelu: Any, accumulate: bool
    ) -> None:
        linear.linear_backward(
            self.threads,
            _rows(dinp),
            dweight,
            NONE_1 if dbias is None else dbias,
            _rows(dout),
            _rows(inp),
            weight,
            NONE_2 if pre_gelu is None else _rows(pre_gelu),
            accumulate,
            self._gemm_scratch,
            self._packed_inputs(*_rows(inp).shape),
        )

    def attention_forward(self, out: Any, stats: Any, qkv: Any) -> None:
        out = _rows(out)
        scratch = self._attention(stats.shape[2], out.shape[1] // stats.shape[1])
        attention.attention_forward(self.threads, out, stats, _rows(qkv), scratch)

    def attention_backward(self, dqkv: Any, dout: Any, qkv: Any, out: Any, stats: Any) -> None:
        out = _rows(out)
        scratch = self._attention(stats.shape[2], out.shape[1] // stats.shape[1])
        attention.attention_backward(self.threads, _rows(dqkv), _rows(dout), _rows(qkv), out, stats, scratch)

    def classifier(
        self, losses: Any, dinp: Any, dwte: Any, inp: Any, wte: Any, targets: Any, vocab_size: int, scale: float,
        accumulate: bool,
    ) -> None:  # fmt: skip
        inp, losses, targets = _rows(inp), losses.reshape(-1), targets.reshape(-1)
        rows, Vp = inp.shape[0], wte.shape[0]
        gradient = dinp is not None
        chunk = min(rows, CLASSIFIER_ROWS)
        if self._logits.size < chunk * Vp:
            self._logits = self.empty(chunk * Vp, np.float32)
        for first in range(0, rows, chunk):
            part = slice(first, min(rows, first + chunk))
            logits = self._logits[: (part.stop - first) * Vp].reshape(-1, Vp)
            self.linear_forward(logits, inp[part], wte, None)
            cross_entropy.softmax_cross_entropy(
                self.threads, losses[part], logits, targets[part], vocab_size, np.float32(scale), gradient
            )
            if gradient:
                self.linear_backward(
                    _rows(dinp)[part], dwte, None, logits, inp[part], wte, None, accumulate or first > 0
                )

    def adamw(
        self, param: Any, grad: Any, m: Any, v: Any, lr: float, beta1: float, beta2: float, eps: float,
        weight_decay: float, grad_scale: float, step: int,
    ) -> None:  # fmt: skip
        f32 = np.float32
        adamw_.adamw(
            self.threads, param, grad, m, v, f32(lr), f32(beta1), f32(beta2), f32(eps), f32(weight_decay),
            f32(grad_scale), f32(1 / (1 - beta1**step)), f32(1 / (1 - beta2**step)),
        )  # fmt: skip

    def global_norm(self, grad: Any) -> float:
        partial = self._partials(-(-grad.size // global_norm.BLOCK))
        return float(global_norm.global_norm(self.threads, grad, partial))

    def measure_peak(self, seconds: float = 0.2) -> float:
        """GFLOP/s of float32 fused multiply-adds on all threads of this backend, measured now."""
        return peak.measure(self.threads, self._partials(16 * self.threads), seconds)

    def version_info(self) -> dict[str, str]:
        """What a run's record should say about the code that computed it."""
        import llvmlite
        import numba

        return {
            "backend": self.name,
            "isa": self.isa,
            "threads": str(self.threads),
            "threading_layer": self.threading_layer,
            "numba": numba.__version__,
            "llvmlite": llvmlite.__version__,
            "numpy": np.__version__,
        }

    def warm_up(self, say: Callable[[str], None]) -> None:
        """Compile or load every kernel, by running each on the smallest arrays; says what has to be compiled."""
        calls = _smallest_calls(self)
        missing = [name for name, _ in calls if not jit.is_cached(name)]
        if missing:
            say(f"compiling {len(missing)} kernels for this machine ({self.isa}); later starts find them on disk")
        done = 0
        for name, call in calls:
            if name in missing:
                done += 1
                say(f"  {done}/{len(missing)} {name}")
            call()


def _rows(x: np.ndarray) -> np.ndarray:
    """(…, C) → (rows, C)."""
    return x.reshape(-1, x.shape[-1])


def _smallest_calls(ops: CPU) -> list[tuple[str, Callable[[], object]]]:
    def a(*shape: int) -> np.ndarray:
        return np.ones(shape, np.float32)

    tokens = np.zeros((1, 1), np.int32)
    return [
        ("linear_forward", lambda: ops.linear_forward(a(1, 1), a(1, 1), a(1, 1), None)),
        (
            "linear_backward",
            lambda: ops.linear_backward(a(1, 1), a(1, 1), a(1), a(1, 1), a(1, 1), a(1, 1), None, False),
        ),
        ("attention_forward", lambda: ops.attention_forward(a(1, 1), a(1, 1, 1), a(1, 3))),
        ("attention_backward", lambda: ops.attention_backward(a(1, 3), a(1, 1), a(1, 3), a(1, 1), a(1, 1, 1))),
        ("embedding_forward", lambda: ops.embedding_forward(a(1, 1), tokens, a(1, 1), a(1, 1))),
        ("embedding_backward", lambda: ops.embedding_backward(a(1, 1), a(1, 1), a(1, 1), tokens, False)),
        ("layernorm_forward", lambda: ops.layernorm_forward(a(1, 1), a(1), a(1), a(1, 1), a(1), a(1))),
        (
            "residual_layernorm_forward",
            lambda: ops.residual_layernorm_forward(a(1, 1), a(1, 1), a(1), a(1), a(1, 1), a(1, 1), a(1), a(1)),
        ),
        (
            "layernorm_backward",
            lambda: ops.layernorm_backward(a(1, 1), a(1), a(1), a(1, 1), a(1, 1), a(1), a(1), a(1), False),
        ),
        (
            "softmax_cross_entropy",
            lambda: ops.classifier(a(1), None, None, a(1, 1), a(1, 1), tokens, 1, 0.0, False),
        ),
        ("adamw", lambda: ops.adamw(a(1), a(1), a(1), a(1), 0.0, 0.9, 0.99, 1e-8, 0.0, 1.0, 1)),
        ("global_norm", lambda: ops.global_norm(a(1))),
        ("multiply_adds", lambda: ops.measure_peak(0.0)),
    ]
