"""AdamW over flat arrays.     t counts updates from 1

    g  = grad_scale·grad
    m := m + (1−β1)·(g − m)            v := v + (1−β2)·(g² − v)
    p := p − lr·( m/(1−β1ᵗ) / (√(v/(1−β2ᵗ)) + eps) + weight_decay·p )

Memory-bound: four streams in, three out. The bfloat16 copy of the weights is written while they are in L1.
Source: Loshchilov and Hutter 2019.
"""

from __future__ import annotations

import numpy as np

from .jit import fork, inline, kernel
from .simd import to

BLOCK = 1 << 14  # elements per item: 64 kB of each array


@inline
def _update(worker, item, param, stored, grad, m, v, lr, rest1, rest2, eps, decay, scale, correct1, correct2):
    part = slice(item * BLOCK, min((item + 1) * BLOCK, param.shape[0]))
    param, grad, m, v = param[part], grad[part], m[part], v[part]
    for i in range(param.shape[0]):
        g = grad[i] * scale
        mi = m[i] + rest1 * (g - m[i])
        vi = v[i] + rest2 * (g * g - v[i])
        m[i] = mi
        v[i] = vi
        param[i] -= lr * (mi * correct1 / (np.sqrt(vi * correct2) + eps) + decay * param[i])
    if stored.size > 0:
        stored = stored[part]
        for i in range(param.shape[0]):
            stored[i] = to(stored, param[i])


@kernel
def adamw(
    threads,   # int
    param,     # (n,) f32 updated
    stored,    # (n,) := param as products read it, or (0,) for none
    grad,      # (n,)
    m,         # (n,) f32 updated
    v,         # (n,) f32 updated
    lr,        # f32, like all below
    rest1,     # 1 − β1
    rest2,     # 1 − β2
    eps,
    decay,
    scale,     # of the gradient: clipping
    correct1,  # 1/(1 − β1ᵗ)
    correct2,  # 1/(1 − β2ᵗ)
):  # fmt: skip
    items = (param.shape[0] + BLOCK - 1) // BLOCK
    fork(
        _update, threads, items,
        (param, stored, grad, m, v, lr, rest1, rest2, eps, decay, scale, correct1, correct2),
    )  # fmt: skip
