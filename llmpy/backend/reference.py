"""The seam in plain NumPy: a readable specification, and the reference for testing other backends.

Any dtype. float64 is the standard. complex128 runs forward operations for gradients without cancellation:
f′(x) = Im f(x + ih)/h, exact to machine precision at h = 1e-30, since nothing is subtracted. Every forward
operation must therefore be analytic: no abs, no conjugate, comparisons on real parts only. Backward operations
are analytic formulas over real arrays.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

EPS = 1e-5  # in LayerNorm
GELU_SCALE, GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715


def rows(x: np.ndarray) -> np.ndarray:
    """Return x (…, N) as (BT, N): a view, since arrays are contiguous."""
    return x.reshape(-1, x.shape[-1])


def write(out: np.ndarray, value: np.ndarray, accumulate: bool) -> None:
    """out += value, or out := value."""
    if accumulate:
        out += value
    else:
        out[...] = value


def gelu(x: np.ndarray) -> np.ndarray:
    """GELU(x) = ½·x·(1 + tanh u),  u = √(2/π)·(x + 0.044715·x³)."""
    return 0.5 * x * (1 + np.tanh(GELU_SCALE * (x + GELU_CUBIC * x * x * x)))


def gelu_derivative(x: np.ndarray) -> np.ndarray:
    """GELU′(x) = ½·(1 + tanh u) + ½·x·(1 − tanh² u)·u′,  u′ = √(2/π)·(1 + 3·0.044715·x²)."""
    t = np.tanh(GELU_SCALE * (x + GELU_CUBIC * x * x * x))
    du = GELU_SCALE * (1 + 3 * GELU_CUBIC * x * x)
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * du


def silu(x: np.ndarray) -> np.ndarray:
    """SiLU(x) = x/(1 + e^(−x))."""
    return x / (1 + np.exp(-x))


def silu_derivative(x: np.ndarray) -> np.ndarray:
    """SiLU′(x) = s·(1 + x·(1 − s)),  s = 1/(1 + e^(−x))."""
    s = 1 / (1 + np.exp(-x))
    return s * (1 + x * (1 - s))


def activation(pre: np.ndarray, C: int) -> np.ndarray:
    """Return GELU of pre (BT, C), or SwiGLU of pre (BT, 2C): SiLU(gate)·up."""
    if pre.shape[-1] == C:
        return gelu(pre)
    return silu(pre[..., :C]) * pre[..., C:]


def activation_gradient(dout: np.ndarray, pre: np.ndarray) -> np.ndarray:
    """Return the gradient of pre, given dout of `activation`."""
    C = dout.shape[-1]
    if pre.shape[-1] == C:
        return dout * gelu_derivative(pre)
    gate, up = pre[..., :C], pre[..., C:]
    return np.concatenate([dout * up * silu_derivative(gate), dout * silu(gate)], axis=-1)


def exponentials(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return largest, e = exp(x − largest) and Σe over the last axis of x (…, N); largest and Σe are (…, 1).

    Softmax is e/Σe and log Σ exp(x) is largest + log Σe. Subtracting the largest real part avoids overflow.
    """
    largest = x.real.max(axis=-1, keepdims=True)
    e = np.exp(x - largest)
    return largest, e, e.sum(axis=-1, keepdims=True)


def rms_normalise(x: np.ndarray, weight: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Return n·weight (…, N) and rstd (…) of x (…, N): n = x·rstd, rstd = 1/√(Σx²/N + eps)."""
    r = 1 / np.sqrt((x * x).mean(axis=-1) + eps)
    return x * r[..., None] * weight, r


def rms_gradient(
    dout: np.ndarray, x: np.ndarray, rstd: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return dx = rstd·(dn − n·Σ(dn·n)/N), where dn = dout·weight, and dout·n, both (…, N)."""
    r = rstd[..., None]
    n, dn = x * r, dout * weight
    return r * (dn - n * (dn * n).mean(axis=-1, keepdims=True)), dout * n


def by_heads(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return x (…, W) as a view (BT, heads, HS); weight (HS,)."""
    return x.reshape(-1, x.shape[-1] // weight.size, weight.size)


def query_and_key_parts(
    x: np.ndarray, rstd: np.ndarray, q_weight: np.ndarray, k_weight: np.ndarray
) -> tuple[tuple[slice, np.ndarray], tuple[slice, np.ndarray]]:
    """Return the heads of queries and of keys in x (BT, NH + 2·NKV, HS), rstd (BT, NH + NKV), and their weights."""
    end = rstd.shape[1]
    NH = 2 * end - x.shape[1]
    return (slice(NH), q_weight), (slice(NH, end), k_weight)


def heads(x: np.ndarray, B: int, NKV: int, HS: int) -> np.ndarray:
    """Return x (BT, NH·HS) as a view (B, NKV, NH/NKV, T, HS): the heads that share a key/value head are a group."""
    return x.reshape(B, len(x) // B, NKV, -1, HS).transpose(0, 2, 3, 1, 4)


def split_heads(qkv: np.ndarray, out: np.ndarray, stats: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return q and `out` (B, NKV, NH/NKV, T, HS), k and v (B, NKV, 1, T, HS): views of qkv (BT, W), out (BT, NH·HS)."""
    qkv, out, (B, NH, _) = rows(qkv), rows(out), stats.shape
    HS = out.shape[1] // NH
    NKV = (qkv.shape[1] // HS - NH) // 2
    q, k, v, out = (heads(x, B, NKV, HS) for x in (*np.split(qkv, [NH * HS, (NH + NKV) * HS], axis=1), out))
    return q, k, v, out


def causal_scores(q: np.ndarray, k: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
    """Return q·kᵀ/√HS as (B, NKV, NH/NKV, T, T), −∞ for keys later than the query or before its document."""
    T, HS = q.shape[3:]
    seen = np.tri(T, dtype=bool)
    if positions is not None:
        t = np.arange(T)
        seen = seen & (t >= t[:, None] - positions[..., None])[:, None, None]
    return np.where(seen, q @ k.swapaxes(3, 4) / math.sqrt(HS), -np.inf)


class Reference:
    """Every operation of the seam; see `backend/__init__.py` for contracts and shapes."""

    name = "reference"
    quantises = False

    def __init__(self, dtype: Any = np.float64) -> None:
        self.dtype = self.wide = np.dtype(dtype)
        self.lock = threading.RLock()

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.empty(shape, dtype)

    def zeros(self, shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.zeros(shape, dtype)

    def to_host(self, x: np.ndarray) -> np.ndarray:
        return x

    def zero(self, x: np.ndarray) -> None:
        x[...] = 0

    def narrow(self, out: np.ndarray, x: np.ndarray) -> None:
        out[...] = x

    # Embedding: out[b, t] = wte[tokens[b, t]] + wpe[positions[b, t]]

    def embedding_forward(
        self, out: np.ndarray, tokens: np.ndarray, wte: np.ndarray, wpe: np.ndarray | None, positions: np.ndarray | None
        = None,
    ) -> None:  # fmt: skip
        at = np.arange(tokens.shape[1]) if positions is None else positions
        rows(out)[...] = rows(wte[tokens] if wpe is None else wte[tokens] + wpe[at])

    def embedding_backward(
        self, dwte: np.ndarray, dwpe: np.ndarray | None, dout: np.ndarray, tokens: np.ndarray, accumulate: bool,
        positions: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        dout = dout.reshape(*tokens.shape, -1)
        np.add.at(dwte, tokens, dout)  # unlike dwte[tokens] += dout, adds once per occurrence
        if dwpe is not None:
            if not accumulate:
                dwpe[...] = 0
            at = np.arange(tokens.shape[1]) if positions is None else positions
            np.add.at(dwpe, np.broadcast_to(at, tokens.shape), dout)

    # LayerNorm: n = (inp − mean)·rstd,  out = n·weight + bias

    def layernorm_forward(
        self, out: np.ndarray, mean: np.ndarray, rstd: np.ndarray, inp: np.ndarray, weight: np.ndarray, bias: np.ndarray
    ) -> None:
        x = rows(inp)
        mu = x.mean(axis=1, keepdims=True)
        # A product, not abs or np.var: those conjugate, and a complex step would see no derivative.
        r = 1 / np.sqrt(((x - mu) * (x - mu)).mean(axis=1, keepdims=True) + EPS)
        rows(out)[...] = (x - mu) * r * weight + bias
        mean.reshape(-1)[...] = mu[:, 0]
        rstd.reshape(-1)[...] = r[:, 0]

    def residual_layernorm_forward(
        self, resid: np.ndarray, out: np.ndarray, mean: np.ndarray, rstd: np.ndarray, inp1: np.ndarray, inp2:
        np.ndarray, weight: np.ndarray, bias: np.ndarray,
    ) -> None:  # fmt: skip
        rows(resid)[...] = rows(inp1) + rows(inp2)
        self.layernorm_forward(out, mean, rstd, resid, weight, bias)

    def layernorm_backward(
        self, dinp: np.ndarray, dweight: np.ndarray | None, dbias: np.ndarray | None, dout: np.ndarray, inp: np.ndarray,
        mean: np.ndarray, rstd: np.ndarray, weight: np.ndarray, accumulate: bool,
    ) -> None:  # fmt: skip
        # dinp = rstd·(dn − Σdn/C − n·Σ(dn·n)/C)
        dy, r = rows(dout), rstd.reshape(-1, 1)
        n = (rows(inp) - mean.reshape(-1, 1)) * r
        dn = dy * weight
        through_rstd = n * (dn * n).mean(axis=1, keepdims=True)
        rows(dinp)[...] += r * (dn - dn.mean(axis=1, keepdims=True) - through_rstd)
        if dweight is not None and dbias is not None:
            write(dweight, (dy * n).sum(axis=0), accumulate)
            write(dbias, dy.sum(axis=0), accumulate)

    # RMSNorm: n = inp·rstd,  out = n·weight

    def rmsnorm_forward(
        self, out: np.ndarray, rstd: np.ndarray, inp: np.ndarray, weight: np.ndarray, eps: float
    ) -> None:
        rows(out)[...], rstd.reshape(-1)[...] = rms_normalise(rows(inp), weight, eps)

    def residual_rmsnorm_forward(
        self, resid: np.ndarray, out: np.ndarray, rstd: np.ndarray, inp1: np.ndarray, inp2: np.ndarray, weight:
        np.ndarray, eps: float,
    ) -> None:  # fmt: skip
        rows(resid)[...] = rows(inp1) + rows(inp2)
        self.rmsnorm_forward(out, rstd, resid, weight, eps)

    def rmsnorm_backward(
        self, dinp: np.ndarray, dweight: np.ndarray | None, dout: np.ndarray, inp: np.ndarray, rstd: np.ndarray, weight:
        np.ndarray, accumulate: bool,
    ) -> None:  # fmt: skip
        dx, dn_n = rms_gradient(rows(dout), rows(inp), rstd.reshape(-1), weight)
        rows(dinp)[...] += dx
        if dweight is not None:
            write(dweight, dn_n.sum(axis=0), accumulate)

    # The same for each head of queries (the first NH) and of keys (the next NKV) in inp (BT, (NH + 2·NKV)·HS)

    def head_rmsnorm_forward(
        self, out: np.ndarray, rstd: np.ndarray, inp: np.ndarray, q_weight: np.ndarray, k_weight: np.ndarray, eps: float
    ) -> None:
        rows(out)[...] = rows(inp)
        x, y, r = by_heads(inp, q_weight), by_heads(out, q_weight), rows(rstd)
        for part, weight in query_and_key_parts(x, r, q_weight, k_weight):
            y[:, part], r[:, part] = rms_normalise(x[:, part], weight, eps)

    def head_rmsnorm_backward(
        self, dinp: np.ndarray, dq_weight: np.ndarray | None, dk_weight: np.ndarray | None, dout: np.ndarray, inp:
        np.ndarray, rstd: np.ndarray, q_weight: np.ndarray, k_weight: np.ndarray, accumulate: bool,
    ) -> None:  # fmt: skip
        rows(dinp)[...] = rows(dout)
        x, dx, r = by_heads(inp, q_weight), by_heads(dinp, q_weight), rows(rstd)
        parts = query_and_key_parts(x, r, q_weight, k_weight)
        for (part, weight), dweight in zip(parts, (dq_weight, dk_weight), strict=True):
            dx[:, part], dn_n = rms_gradient(dx[:, part], x[:, part], r[:, part], weight)
            if dweight is not None:
                write(dweight, dn_n.sum(axis=(0, 1)), accumulate)

    # RoPE: the pair (x₁, x₂) of channels i and i + HS/2 turns by the position's angle

    def rope(
        self, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, positions: np.ndarray, heads: int, inverse: bool
    ) -> None:
        half = cos.shape[1]
        pairs = rows(x)[:, : heads * 2 * half].reshape(-1, heads, 2, half)  # a copy
        c, s = cos[positions.reshape(-1), None], sin[positions.reshape(-1), None] * (-1 if inverse else 1)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        turned = np.stack([first * c - second * s, second * c + first * s], axis=2)
        rows(x)[:, : heads * 2 * half] = turned.reshape(-1, heads * 2 * half)

    # Linear: out = inp·weightᵀ + bias, or GELU of that
    # Linear: out = inp·weightᵀ + bias, or GELU or SwiGLU of that

    def activation_forward(self, out: np.ndarray, pre: np.ndarray) -> None:
        out[...] = activation(pre, out.shape[-1])

    def activation_backward(self, dpre: np.ndarray, dout: np.ndarray, pre: np.ndarray) -> None:
        dpre[...] = activation_gradient(dout, pre)

    def linear_forward(
        self, out: np.ndarray, inp: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, pre: np.ndarray | None =
        None,
    ) -> None:  # fmt: skip
        y = rows(inp) @ weight.T
        if bias is not None:
            y = y + bias
        if pre is not None:
            rows(pre)[...] = y
            y = activation(y, out.shape[-1])
        rows(out)[...] = y

    def linear_backward(
        self, dinp: np.ndarray, dweight: np.ndarray | None, dbias: np.ndarray | None, dout: np.ndarray, inp: np.ndarray
        | None, weight: np.ndarray, pre: np.ndarray | None, accumulate: bool,
    ) -> None:  # fmt: skip
        dy = rows(dout)
        dx = dy @ weight
        if pre is not None:
            dx = activation_gradient(dx, rows(pre))
        rows(dinp)[...] = dx
        if dweight is None or inp is None:
            return
        write(dweight, dy.T @ rows(inp), accumulate)
        if dbias is not None:
            write(dbias, dy.sum(axis=0), accumulate)

    # Columns: how LoRA's products join those of the layer

    def add_columns(self, out: np.ndarray, x: np.ndarray, first: int, scale: float) -> None:
        rows(out)[:, first : first + x.shape[-1]] += scale * rows(x)

    def take_columns(self, out: np.ndarray, x: np.ndarray, first: int, scale: float) -> None:
        rows(out)[...] = scale * rows(x)[:, first : first + out.shape[-1]]

    # Attention: s = q·kᵀ/√HS up to the diagonal,  p = exp(s − stats),  out = p·v

    def attention_forward(
        self, out: np.ndarray, stats: np.ndarray, qkv: np.ndarray, positions: np.ndarray | None = None
    ) -> None:
        q, k, v, o = split_heads(qkv, out, stats)
        largest, e, total = exponentials(causal_scores(q, k, positions))
        o[...] = (e / total) @ v
        stats[...] = (largest + np.log(total)).reshape(stats.shape)

    def attention_backward(
        self, dqkv: np.ndarray, dout: np.ndarray, qkv: np.ndarray, out: np.ndarray, stats: np.ndarray, positions:
        np.ndarray | None = None,
    ) -> None:  # fmt: skip
        # dv = pᵀ·do,  dp = do·vᵀ,  ds = p∘(dp − Σ p∘dp) where Σ p∘dp = Σ do∘o,
        # dq = ds·k/√HS,  dk = dsᵀ·q/√HS;  dk and dv sum over the heads of a group
        q, k, v, o = split_heads(qkv, out, stats)
        dq, dk, dv, do = split_heads(dqkv, dout, stats)
        p = np.exp(causal_scores(q, k, positions) - stats.reshape(*q.shape[:4], 1))
        ds = p * (do @ v.swapaxes(3, 4) - (do * o).sum(axis=4, keepdims=True)) / math.sqrt(q.shape[4])
        dq[...] = ds @ k
        dk[...] = (ds.swapaxes(3, 4) @ q).sum(axis=2, keepdims=True)
        dv[...] = (p.swapaxes(3, 4) @ do).sum(axis=2, keepdims=True)

    # Decoding: one position at a time; a packed weight is the weight itself

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        run()
        return run

    def reversed(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def packed_size(self, OC: int, C: int) -> int:
        return OC * C

    def pack(self, packed: np.ndarray, weight: np.ndarray) -> None:
        packed[...] = weight.reshape(-1)

    def packed_linear_forward(
        self, out: np.ndarray, inp: np.ndarray, packed: np.ndarray, bias: np.ndarray | None, pre: np.ndarray | None =
        None,
    ) -> None:  # fmt: skip
        self.linear_forward(out, inp, packed.reshape(-1, inp.shape[-1]), bias, pre)

    def cache_fill(self, cache: np.ndarray, qkv: np.ndarray) -> None:
        B, NKV, _, _, HS = cache.shape
        pairs = rows(qkv)[:, -2 * NKV * HS :].reshape(B, -1, 2, NKV, HS)
        cache[:, :, :, : pairs.shape[1]] = pairs.transpose(0, 3, 2, 1, 4)

    def attention_decode(
        self, out: np.ndarray, cache: np.ndarray, qkv: np.ndarray, slots: np.ndarray, positions: np.ndarray
    ) -> None:
        NKV, HS = cache.shape[1], cache.shape[4]
        for line, row, slot, t in zip(rows(out), rows(qkv), slots, positions, strict=True):
            q, k, v = np.split(row.reshape(-1, HS), [-2 * NKV, -NKV])
            cache[slot, :, 0, t], cache[slot, :, 1, t] = k, v
            keys, values = cache[slot, :, 0, : t + 1], cache[slot, :, 1, : t + 1]
            q = q.reshape(NKV, -1, HS)
            _, e, total = exponentials(q @ keys.swapaxes(1, 2) / math.sqrt(HS))
            line[...] = ((e / total) @ values).reshape(-1)

    # Classifier: logits = inp·wteᵀ,  loss = −log softmax(logits)[target],  dlogits = scale·(p − onehot)

    def classifier(
        self, losses: np.ndarray, dinp: np.ndarray | None, dwte: np.ndarray | None, inp: np.ndarray, wte: np.ndarray,
        targets: np.ndarray, vocab_size: int, scale: float, accumulate: bool,
    ) -> None:  # fmt: skip
        V, x, target = vocab_size, rows(inp), targets.reshape(-1)
        logits = x @ wte[:V].T
        largest, e, total = exponentials(logits)
        counted = np.flatnonzero(target >= 0)
        loss = losses.reshape(-1)
        loss[...] = 0
        # Not (largest + log Σe) − logit: a large logit would swallow the logarithm.
        loss[counted] = (np.log(total) - (logits - largest))[counted, target[counted]]
        if dinp is None:
            return
        dlogits = e / total
        dlogits[counted, target[counted]] -= 1
        dlogits *= scale
        dlogits[target < 0] = 0
        rows(dinp)[...] = dlogits @ wte[:V]
        if dwte is not None:
            write(dwte[:V], dlogits.T @ x, accumulate)
            if not accumulate:
                dwte[V:] = 0

    def adamw(
        self, param: np.ndarray, grad: np.ndarray, m: np.ndarray, v: np.ndarray, lr: float, beta1: float, beta2: float,
        eps: float, weight_decay: float, grad_scale: float, step: int, stored: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        g = grad_scale * grad
        m[...] = beta1 * m + (1 - beta1) * g
        v[...] = beta2 * v + (1 - beta2) * g * g
        m_hat = m / (1 - beta1**step)
        v_hat = v / (1 - beta2**step)
        param -= lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * param)
        if stored is not None:
            stored[...] = param

    def global_norm(self, grad: np.ndarray) -> float:
        return math.sqrt(np.square(grad, dtype=np.float64).sum())

    def digest(self, x: np.ndarray) -> int:
        return int.from_bytes(hashlib.blake2b(x.reshape(-1).view(np.uint8).data, digest_size=8).digest(), "little")
