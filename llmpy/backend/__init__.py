"""THE SEAM: every operation that a model may call. `load("cpu")` returns a backend that implements them.

Outputs come first. Each follows one of two contracts, stated where it is declared: `:=` overwrites, `+=` adds.
Parameter gradients (dweight, dbias, dwte, dwpe) are `:=` if `accumulate` is False (the first micro-step), else `+=`.

Dimensions: B batch, T time, C channels, NH heads of size HS, NKV key/value heads, W = (NH + 2·NKV)·HS columns of qkv
(queries, keys, values), V vocabulary, Vp padded vocabulary, OC output channels; BT = B·T rows. Any leading shape of
product BT may replace BT. Arrays are C-contiguous; tokens and targets are int32.

Floats have two types. `wide`: parameters, their gradients and moments, biases, the residual stream (resid, inp1, inp
of norms, dinp of their backward), statistics, cos, sin, losses. `dtype`: all operands and results of products (weight,
wte, wpe; the other inp, out, dout, dinp; inp2, pre, qkv, and x of columns and RoPE). On the CPU `wide` is float32 and
`dtype` float32 or bfloat16; in the reference both are float64, float32 or complex128.

Operations trust their caller, because compiled kernels check no bounds: `data.shards` checks token ids, and shapes
are checked where arenas are made (`gpt2`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from ..errors import LlmpyError

Array = Any  # a NumPy array, or the array type of a device backend


class Ops(Protocol):
    """The operations of GPT-2 and Llama; sources: Vaswani et al. 2017, Radford et al. 2019, llm.c, transformers."""

    name: str
    dtype: Any
    wide: Any
    # Scratch memory, and that of a model, serves one thread at a time: the one that holds this re-entrant lock.
    lock: Any
    quantises: bool  # whether models for generation hold int8 matrices, see `Machine.quantise`

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> Array:
        """Return uninitialised memory of this backend, aligned for its vectors."""

    def zeros(self, shape: int | tuple[int, ...], dtype: Any) -> Array:
        """Return zeros. Pages are mapped on first touch, by the thread that touches them."""

    def to_host(self, x: Array) -> Any:
        """Return the values as a NumPy array, without a copy if the backend lives in host memory."""

    def zero(self, x: Array) -> None:
        """x := 0."""

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        """Run `run`, and return a function that repeats its operations on the same arrays with their current contents.

        Other side effects of `run` are not repeated. `adamw`, `global_norm` and `digest` cannot be captured.
        """

    def narrow(self, out: Array, x: Array) -> None:
        """out (dtype) := x (wide), rounded to nearest even; a no-op if out is x."""

    def embedding_forward(
        self, out: Array, tokens: Array, wte: Array, wpe: Array | None, positions: Array | None = None
    ) -> None:
        """out (B, T, C) := wte[token] + wpe[position].  tokens and positions (B, T), wte (Vp, C), wpe (≥T, C).

        positions None: t. wpe None adds nothing.
        """

    def embedding_backward(
        self, dwte: Array, dwpe: Array | None, dout: Array, tokens: Array, accumulate: bool, positions: Array | None =
        None,
    ) -> None:  # fmt: skip
        """dwte (Vp, C) += dout rows by token;  dwpe (≥T, C) by position; with `:=`, rows of no position become 0.

        dwte is always `+=`: the head shares it and writes first.
        """

    def layernorm_forward(self, out: Array, mean: Array, rstd: Array, inp: Array, weight: Array, bias: Array) -> None:
        """out (BT, C), mean (BT,), rstd (BT,) := LayerNorm(inp (BT, C)); eps 1e-5, biased variance."""

    def residual_layernorm_forward(
        self, resid: Array, out: Array, mean: Array, rstd: Array, inp1: Array, inp2: Array, weight: Array, bias: Array
    ) -> None:
        """resid (BT, C) := inp1 + inp2;  out, mean, rstd := LayerNorm(resid)."""

    def layernorm_backward(
        self, dinp: Array, dweight: Array | None, dbias: Array | None, dout: Array, inp: Array, mean: Array, rstd:
        Array, weight: Array, accumulate: bool,
    ) -> None:  # fmt: skip
        """dinp (BT, C) += (joins the residual stream);  dweight (C,), dbias (C,) by `accumulate`; both None: frozen."""

    def rmsnorm_forward(self, out: Array, rstd: Array, inp: Array, weight: Array, eps: float) -> None:
        """out (BT, C), rstd (BT,) := RMSNorm(inp (BT, C)) = inp·rstd·weight, rstd = 1/√(Σ_C inp²/C + eps)."""

    def residual_rmsnorm_forward(
        self, resid: Array, out: Array, rstd: Array, inp1: Array, inp2: Array, weight: Array, eps: float
    ) -> None:
        """resid (BT, C) := inp1 + inp2;  out, rstd := RMSNorm(resid)."""

    def rmsnorm_backward(
        self, dinp: Array, dweight: Array | None, dout: Array, inp: Array, rstd: Array, weight: Array, accumulate: bool
    ) -> None:
        """dinp (BT, C) += (joins the residual stream);  dweight (C,) by `accumulate`; None: frozen."""

    def head_rmsnorm_forward(
        self, out: Array, rstd: Array, inp: Array, q_weight: Array, k_weight: Array, eps: float
    ) -> None:
        """out (BT, W), rstd (BT, NH + NKV) := RMSNorm of each head of queries and keys; values are copied.

        inp (BT, W = (NH + 2·NKV)·HS): queries, keys, values; q_weight, k_weight (HS,).
        """

    def head_rmsnorm_backward(
        self, dinp: Array, dq_weight: Array | None, dk_weight: Array | None, dout: Array, inp: Array, rstd: Array,
        q_weight: Array, k_weight: Array, accumulate: bool,
    ) -> None:  # fmt: skip
        """dinp (BT, W) := gradient, may be dout;  dq_weight, dk_weight (HS,) by `accumulate`; both None: frozen."""

    def rope(self, x: Array, cos: Array, sin: Array, positions: Array, heads: int, inverse: bool) -> None:
        """Rotate the first `heads` heads of x (BT, W) in place by the angles of positions (BT,) int32, < S.

        cos, sin (S, HS/2); channels i and i + HS/2 of a head are a pair. Inverse: by −angle, the gradient.
        """

    def activation_forward(self, out: Array, pre: Array) -> None:
        """out (BT, C) := GELU(pre), the tanh form, of pre (BT, C);  or SwiGLU(pre) = SiLU(gate) ∘ up of pre (BT, 2C).

        gate is the first C columns of pre, up the last.  Bitwise as `linear_forward` with the same pre.
        """

    def activation_backward(self, dpre: Array, dout: Array, pre: Array) -> None:
        """dpre (as pre) := gradient of pre, given dout (BT, C) of `activation_forward`.

        GELU: dout ∘ GELU′(pre); dpre may be dout.  SwiGLU: [dout ∘ up ∘ SiLU′(gate), dout ∘ SiLU(gate)].
        """

    def linear_forward(
        self, out: Array, inp: Array, weight: Array, bias: Array | None, pre: Array | None = None
    ) -> None:
        """out (BT, OC) := inp (BT, C) · weight (OC, C)ᵀ + bias (OC,).

        With `pre`, pre := that product and out := the activation of pre as stored, as in `activation_forward`:
        pre (BT, OC), GELU;  or pre (BT, 2·OC), weight (2·OC, C), bias (2·OC,), SwiGLU.
        """

    def linear_backward(
        self, dinp: Array, dweight: Array | None, dbias: Array | None, dout: Array, inp: Array | None, weight: Array,
        pre: Array | None, accumulate: bool,
    ) -> None:  # fmt: skip
        """dinp (BT, C) := dout (BT, OC) · weight (OC, C);  dweight += doutᵀ · inp;  dbias += Σ_rows dout.

        With `pre`, inp was an activation of it, and dinp is the gradient of pre, as in `activation_backward`:
        pre (BT, C), GELU: dinp := (dout · weight) ∘ GELU′(pre);  or pre (BT, 2C), SwiGLU: dinp (BT, 2C).
        dweight and dbias by `accumulate`.  dweight None (frozen weights): dinp only; dbias and inp may be None.
        """

    def add_columns(self, out: Array, x: Array, first: int, scale: float) -> None:
        """out[:, first : first + N] += scale · x, out (BT, M ≥ first + N), x (BT, N); float32 inside, rounded once."""

    def take_columns(self, out: Array, x: Array, first: int, scale: float) -> None:
        """out (BT, N) := scale · x[:, first : first + N], x (BT, M ≥ first + N); float32 inside, rounded once."""

    def attention_forward(self, out: Array, stats: Array, qkv: Array, positions: Array | None = None) -> None:
        """out (B, T, NH·HS), stats (B, NH, T) := causal self-attention of qkv (B, T, W), scale 1/√HS.

        stats is the log-sum-exp of each row of scaled scores. Its shape gives NH, and W then NKV, a divisor of NH:
        head h reads key/value head h // (NH/NKV). positions (B, T) int32 separates documents in a row: position of
        each token in its document, which starts within the row. Token t attends to t − positions[b, t] … t. None: one
        document.
        """

    def attention_backward(
        self, dqkv: Array, dout: Array, qkv: Array, out: Array, stats: Array, positions: Array | None = None
    ) -> None:
        """dqkv (B, T, W) := gradient; probabilities are recomputed from stats.

        The gradients of a key/value head sum over its query heads, in a fixed order.
        """

    def packed_size(self, OC: int, C: int) -> int:
        """Return the number of elements (dtype) of a packed weight (OC, C)."""

    def pack(self, packed: Array, weight: Array) -> None:
        """packed (packed_size,) dtype := weight (OC, C), in the layout that is fastest for few rows."""

    def packed_linear_forward(
        self, out: Array, inp: Array, packed: Array, bias: Array | None, pre: Array | None = None
    ) -> None:
        """`linear_forward`, bitwise identical, of a weight packed by `pack`; memory-bound for few rows."""

    def cache_fill(self, cache: Array, qkv: Array) -> None:
        """cache (B, NKV, 2, S, HS), keys and values by head: positions 0 … T−1 := qkv (B, T, W), T ≤ S."""

    def attention_decode(self, out: Array, cache: Array, qkv: Array, slots: Array, positions: Array) -> None:
        """out (B, NH·HS) := causal self-attention of one query per sequence, bitwise as `attention_forward`.

        qkv (B, W) is position t = positions[b] < S of the sequence in cache[slots[b]]; slots and positions (B,) are
        int32, slots distinct. cache (≥B, NKV, 2, S, HS): position t := the key and value of qkv. The query then
        attends to positions 0 … t, which must be written.
        """

    def classifier(
        self, losses: Array, dinp: Array | None, dwte: Array | None, inp: Array, wte: Array, targets: Array, vocab_size:
        int, scale: float, accumulate: bool,
    ) -> None:  # fmt: skip
        """Head, softmax and cross-entropy, and their gradients, in chunks of rows.

        losses (BT,) := −log softmax(inp (BT, C) · wte (Vp, C)ᵀ)[target] over the first V columns, unscaled.
        With dlogits = scale·(softmax − onehot):  dinp (BT, C) := dlogits · wte,  dwte (Vp, C) by `accumulate`; rows
        beyond V get zero gradient.  A target of −1 masks its row: loss 0, gradient 0.  dwte None: dinp only; both None:
        losses only.
        """

    def adamw(
        self, param: Array, grad: Array, m: Array, v: Array, lr: float, beta1: float, beta2: float, eps: float,
        weight_decay: float, grad_scale: float, step: int, stored: Array | None = None,
    ) -> None:  # fmt: skip
        """One AdamW update of flat (n,) wide arrays; step counts from 1.  stored (n,) dtype := param.

        g = grad_scale·grad;  m := β1·m + (1−β1)·g;  v := β2·v + (1−β2)·g²;
        param −= lr·(m/(1−β1^step) / (√(v/(1−β2^step)) + eps) + weight_decay·param).
        """

    def global_norm(self, grad: Array) -> float:
        """√Σ grad² of a flat (n,) array, summed in the same order on every call."""

    def digest(self, x: Array) -> int:
        """Return a 64-bit hash of the bits of x."""

    def reversed(self) -> AbstractContextManager[None]:
        """Within: threads take their work in reverse order. The results of all operations are bitwise identical."""


def load(name: str = "cpu", **options: Any) -> Ops:
    """Return a backend: "cpu" (Numba; options `threads`, `dtype`) or "reference" (NumPy; option `dtype`)."""
    if name == "cpu":
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "Environment variable")  # Numba's, for invalid values
                from numba import config

                from .cpu import CPU

                if config.DISABLE_JIT or config.DEBUG_JIT:  # type: ignore[attr-defined]
                    raise NotImplementedError
                return CPU(**options)
        except Exception as error:
            found = " ".join(f"{name}={value}" for name, value in os.environ.items() if name.startswith("NUMBA_"))
            found += " .numba_config.yaml" * os.path.exists(".numba_config.yaml")
            if not found or isinstance(error, LlmpyError):
                raise
            hint = "Unset these environment variables, or remove this file, which Numba reads"
            raise LlmpyError("environment.numba", f"kernels cannot be compiled with {found}", hint) from error
    if name == "reference":
        from .reference import Reference

        return Reference(**options)
    raise LlmpyError("option.invalid", f"unknown backend {name!r}", "Use cpu or reference")
