"""The seam in plain NumPy: a readable specification, and the reference for testing other backends.

Any dtype. float64 is the standard. complex128 runs forward operations for gradients without cancellation:
f′(x) = Im f(x + ih)/h, exact to machine precision at h = 1e-30, since nothing is subtracted. Every forward
operation must therefore be analytic: no abs, no conjugate, comparisons on real parts only. Backward operations
are analytic formulas over real arrays.
"""

from __future__ import annotations

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


def exponentials(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return largest, e = exp(x − largest) and Σe over the last axis of x (…, N); largest and Σe are (…, 1).

    Softmax is e/Σe and log Σ exp(x) is largest + log Σe. Subtracting the largest real part avoids overflow.
    """
    largest = x.real.max(axis=-1, keepdims=True)
    e = np.exp(x - largest)
    return largest, e, e.sum(axis=-1, keepdims=True)


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
        self,
        out: np.ndarray,
        tokens: np.ndarray,
        wte: np.ndarray,
        wpe: np.ndarray | None,
        positions: np.ndarray | None = None,
    ) -> None:
        at = np.arange(tokens.shape[1]) if positions is None else positions
        rows(out)[...] = rows(wte[tokens] if wpe is None else wte[tokens] + wpe[at])

    def embedding_backward(
        self,
        dwte: np.ndarray,
        dwpe: np.ndarray | None,
        dout: np.ndarray,
        tokens: np.ndarray,
        accumulate: bool,
        positions: np.ndarray | None = None,
    ) -> None:
        dout = dout.reshape(*tokens.shape, -1)
        np.add.at(dwte, tokens, dout)  # unlike dwte[tokens] += dout, adds once per occurrence
        if dwpe is not None:
            if not accumulate:
                dwpe[...] = 0
            at = np.arange(tokens.shape[1]) if positions is None else positions
            np.add.at(dwpe, np.broadcast_to(at, tokens.shape), dout)

    # LayerNorm: n = (inp − mean)·rstd,  out = n·weight + bias

    def layernorm_forward(
        self,
        out: np.ndarray,
        mean: np.ndarray,
        rstd: np.ndarray,
        inp: np.ndarray,
        weight: np.ndarray,
        bias: np.ndarray,
    ) -> None:
        x = rows(inp)
        mu = x.mean(axis=1, keepdims=True)
        # A product, not abs or np.var: those conjugate, and a complex step would see no derivative.
        r = 1 / np.sqrt(((x - mu) * (x - mu)).mean(axis=1, keepdims=True) + EPS)
        rows(out)[...] = (x - mu) * r * weight + bias
        mean.reshape(-1)[...] = mu[:, 0]
        rstd.reshape(-1)[...] = r[:, 0]

    def residual_layernorm_forward(
        self,
        resid: np.ndarray,
        out: np.ndarray,
        mean: np.ndarray,
        rstd: np.ndarray,
        inp1: np.ndarray,
        inp2: np.ndarray,
        weight: np.ndarray,
        bias: np.ndarray,
    ) -> None:
        rows(resid)[...] = rows(inp1) + rows(inp2)
        self.layernorm_forward(out, mean, rstd, resid, weight, bias)

    def layernorm_backward(
        self,
        dinp: np.ndarray,
        dweight: np.ndarray,
        dbias: np.ndarray,
        dout: np.ndarray,
        inp: np.ndarray,
        mean: np.ndarray,
        rstd: np.ndarray,
        weight: np.ndarray,
        accumulate: bool,
    ) -> None:
        # dinp = rstd·(dn − Σdn/C − n·Σ(dn·n)/C)
        dy, r = rows(dout), rstd.reshape(-1, 1)
        n = (rows(inp) - mean.reshape(-1, 1)) * r
        dn = dy * weight
        through_rstd = n * (dn * n).mean(axis=1, keepdims=True)
        rows(dinp)[...] += r * (dn - dn.mean(axis=1, keepdims=True) - through_rstd)
        write(dweight, (dy * n).sum(axis=0), accumulate)
        if dbias is not None:
            write(dbias, dy.sum(axis=0), accumulate)

    # Linear: out = inp·weightᵀ + bias, or GELU of that

    def gelu_forward(self, out: np.ndarray, inp: np.ndarray) -> None:
        out[...] = gelu(inp)

    def linear_forward(
        self,
        out: np.ndarray,
        inp: np.ndarray,
        weight: np.ndarray,
        bias: np.ndarray | None,
        pre_gelu: np.ndarray | None = None,
    ) -> None:
        y = rows(inp) @ weight.T
        if bias is not None:
            y = y + bias
        if pre_gelu is not None:
            rows(pre_gelu)[...] = y
            y = gelu(y)
        rows(out)[...] = y

    def linear_backward(
        self,
        dinp: np.ndarray,
        dweight: np.ndarray,
        dbias: np.ndarray | None,
        dout: np.ndarray,
        inp: np.ndarray,
        weight: np.ndarray,
        pre_gelu: np.ndarray | None,
        accumulate: bool,
    ) -> None:
        dy = rows(dout)
        dx = dy @ weight
        if pre_gelu is not None:
            dx = dx * gelu_derivative(rows(pre_gelu))
        rows(dinp)[...] = dx
        write(dweight, dy.T @ rows(inp), accumulate)
        if dbias is not None:
            write(dbias, dy.sum(axis=0), accumulate)

    # Attention: s = q·kᵀ/√HS up to the diagonal,  p = exp(s − stats),  out = p·v

    def attention_forward(
        self, out: np.ndarray, stats: np.ndarray, qkv: np.ndarray, positions: np.ndarray | None = None
    ) -> None:
        q, k, v, o = split_heads(qkv, out, stats)
        largest, e, total = exponentials(causal_scores(q, k, positions))
        o[...] = (e / total) @ v
        stats[...] = (largest + np.log(total)).reshape(stats.shape)

    def attention_backward(
        self,
        dqkv: np.ndarray,
        dout: np.ndarray,
        qkv: np.ndarray,
        out: np.ndarray,
        stats: np.ndarray,
        positions: np.ndarray | None = None,
    ) -> None:
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

    def packed_size(self, OC: int, C: int) -> int:
        return OC * C

    def pack(self, packed: np.ndarray, weight: np.ndarray) -> None:
        packed[...] = weight.reshape(-1)

    def packed_linear_forward(
        self,
        out: np.ndarray,
        inp: np.ndarray,
        packed: np.ndarray,
        bias: np.ndarray | None,
        pre_gelu: np.ndarray | None = None,
    ) -> None:
        self.linear_forward(out, inp, packed.reshape(out.shape[-1], inp.shape[-1]), bias, pre_gelu)

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
        self,
        losses: np.ndarray,
        dinp: np.ndarray | None,
        dwte: np.ndarray | None,
        inp: np.ndarray,
        wte: np.ndarray,
        targets: np.ndarray,
        vocab_size: int,
        scale: float,
        accumulate: bool,
    ) -> None:
        V, x, target = vocab_size, rows(inp), targets.reshape(-1)
        logits = x @ wte[:V].T
        largest, e, total = exponentials(logits)
        counted = np.flatnonzero(target >= 0)
        loss = losses.reshape(-1)
        loss[...] = 0
        # Not (largest + log Σe) − logit: a large logit would swallow the logarithm.
        loss[counted] = (np.log(total) - (logits - largest))[counted, target[counted]]
        if dinp is None or dwte is None:
            return
        dlogits = e / total
        dlogits[counted, target[counted]] -= 1
        dlogits *= scale
        dlogits[target < 0] = 0
        rows(dinp)[...] = dlogits @ wte[:V]
        write(dwte[:V], dlogits.T @ x, accumulate)
        if not accumulate:
            dwte[V:] = 0

    def adamw(
        self,
        param: np.ndarray,
        grad: np.ndarray,
        m: np.ndarray,
        v: np.ndarray,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        grad_scale: float,
        step: int,
        stored: np.ndarray | None = None,
    ) -> None:
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
