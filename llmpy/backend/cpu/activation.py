"""Activations, GELU in its tanh form and SwiGLU, and the exponential that they need.

    GELU(x)  = ½·x·(1 + tanh √(2/π)·(x + 0.044715·x³)) = x·s         s = 1/(1 + 2^z)
    GELU′(x) = s + x·s·(1 − s)·d       d = 2·√(2/π)·(1 + 3·0.044715·x²)
    z = −2·log₂e·√(2/π)·(x + 0.044715·x³)

    SwiGLU(gate, up) = SiLU(gate)·up                 SiLU(x)  = x·s      s = 1/(1 + 2^z)      z = −log₂e·x
    dgate = dout·up·SiLU′(gate),  dup = dout·SiLU(gate)       SiLU′(x) = s·(1 + x·(1 − s))

The logistic s replaces tanh: one exponential, no cancellation for x ≪ 0. Linear layers apply these functions to tiles
of sums; the kernels below apply them to stored values, with the same bits.
"""

from __future__ import annotations

import math

import numpy as np

from .jit import exact, fork, inline, kernel
from .simd import bits_to_float, f32, float_to_bits, fma, to

LOG2_E = np.float32(math.log2(math.e))
LN2_HIGH = np.float32(0.693359375)  # so few bits that n·LN2_HIGH is exact
LN2_LOW = np.float32(-2.12194440e-4)
MAGIC = np.float32(12582912.0)  # 1.5·2²³: adding it rounds to an integer, held in the low bits
LEAST, MOST = np.float32(-126), np.float32(127)  # exponents of normal numbers
LEAST_X = np.float32(-126 * math.log(2))
# 2^f = 1 + Σ c_i·f^i for |f| ≤ ½: minimax in float32, relative error 3e-9.
C1, C2, C3 = np.float32(0.6931472), np.float32(0.24022648), np.float32(0.0555036)
C4, C5, C6 = np.float32(0.009618506), np.float32(0.0013390806), np.float32(0.00015326464)
ONE, ZERO, INFINITY = np.float32(1), np.float32(0), np.float32(np.inf)

BLOCK = 1 << 14  # elements per item
CHUNK = 1024  # elements of a row at a time
FLAT = np.float32(87)  # SiLU is taken as 0 below −FLAT, where it is 1e-36, and as x above FLAT; 2^FLAT is finite
SQRT_2_OVER_PI, CUBIC = math.sqrt(2 / math.pi), 0.044715
Z_1 = np.float32(-2 * math.log2(math.e) * SQRT_2_OVER_PI)
Z_3 = np.float32(-2 * math.log2(math.e) * SQRT_2_OVER_PI * CUBIC)
D_0, D_2 = np.float32(2 * SQRT_2_OVER_PI), np.float32(6 * SQRT_2_OVER_PI * CUBIC)


@exact
def _power(t, f):
    """Return 2^(n + f), where t = MAGIC + n: 2ⁿ is made by writing n into the exponent bits."""
    p = fma(C6, f, C5)
    p = fma(p, f, C4)
    p = fma(p, f, C3)
    p = fma(p, f, C2)
    p = fma(p, f, C1)
    p = fma(p, f, ONE)
    return p * bits_to_float((float_to_bits(t) << np.int32(23)) + np.int32(0x3F800000))


@exact
def exp2(z):
    """Return 2^z in float32 for z ≤ MOST, within 1.1 ulp; 0 for z < LEAST; NaN for NaN."""
    t = z + MAGIC
    return ZERO if z < LEAST else _power(t, z - (t - MAGIC))


@exact
def exp(x):
    """Return e^x in float32 for x ≤ 88, within 1.4 ulp, by compensating the rounding of x·log₂e. Limits as `exp2`."""
    t = fma(x, LOG2_E, MAGIC)
    n = t - MAGIC
    return ZERO if x < LEAST_X else _power(t, fma(n, -LN2_LOW, fma(n, -LN2_HIGH, x)) * LOG2_E)


@exact
def _logistic_divisor(square, x):
    """Return 1 + 2^z of x and its square; infinity beyond the range of `exp2`."""
    z = x * fma(Z_3, square, Z_1)
    return INFINITY if z > MOST else ONE + exp2(z)


@exact
def gelu(x):
    """Return GELU(x), float32."""
    return x / _logistic_divisor(x * x, x)


@exact
def gelu_gradient(x):
    """Return GELU′(x), float32."""
    square = x * x
    s = ONE / _logistic_divisor(square, x)
    return fma(x * (s * (ONE - s)), fma(D_2, square, D_0), s)


@exact
def _silu_divisor(x):
    """Return 1 + 2^z of x ≥ −FLAT."""
    return ONE + exp2(x * -LOG2_E)


@exact
def swiglu(gate, up):
    """Return SiLU(gate)·up, float32."""
    return (ZERO if gate < -FLAT else gate / _silu_divisor(gate)) * up


@exact
def swiglu_gradient(dout, gate, up):
    """Return the gradients of gate and up, float32."""
    s = ONE / _silu_divisor(gate)
    slope = s * fma(gate, ONE - s, ONE)
    slope = ONE if gate > FLAT else slope  # ∞·0 would be NaN
    slope = ZERO if gate < -FLAT else slope
    return dout * up * slope, dout * (ZERO if gate < -FLAT else gate * s)


@inline
def _forward_rows(worker, item, out, pre, block):
    C = out.shape[1]
    for i in range(item * block, min((item + 1) * block, out.shape[0])):
        line, x = out[i], pre[i, :C]
        if pre.shape[1] == C:
            for j in range(C):
                line[j] = to(line, gelu(f32(x[j])))
        else:
            up = pre[i, C:]
            for j in range(C):
                line[j] = to(line, swiglu(f32(x[j]), f32(up[j])))


@inline
def activate(threads, out, pre):
    """Fork `activation_forward`."""
    block = max(1, BLOCK // out.shape[1])
    fork(_forward_rows, threads, (out.shape[0] + block - 1) // block, (out, pre, block))


@kernel
def activation_forward(
    threads,  # int
    out,      # (BT, C) :=
    pre,      # (BT, C): GELU, or (BT, 2C): SwiGLU
):  # fmt: skip
    activate(threads, out, pre)


@inline
def _backward_rows(worker, item, dpre, dout, pre, block, scratch):
    C = dout.shape[1]
    for i in range(item * block, min((item + 1) * block, dout.shape[0])):
        for first in range(0, C, CHUNK):
            part = slice(first, min(first + CHUNK, C))
            given, x, dx = dout[i, part], pre[i, part], dpre[i, part]
            n, d = given.shape[0], scratch[worker]
            for j in range(n):  # a copy: dpre may be dout, and an overlap would prevent vectors
                d[j] = f32(given[j])
            if pre.shape[1] == C:
                for j in range(n):
                    dx[j] = to(dx, d[j] * gelu_gradient(f32(x[j])))
            else:
                up, dup = pre[i, C:][part], dpre[i, C:][part]
                for j in range(n):
                    dgate, through = swiglu_gradient(d[j], f32(x[j]), f32(up[j]))
                    dx[j], dup[j] = to(dx, dgate), to(dup, through)


@kernel
def activation_backward(
    threads,  # int
    dpre,     # (BT, C) or (BT, 2C) :=, as pre; GELU: may be dout
    dout,     # (BT, C)
    pre,      # (BT, C): GELU, or (BT, 2C): SwiGLU
    scratch,  # (threads, ≥ CHUNK) f32
):  # fmt: skip
    block = max(1, BLOCK // dout.shape[1])
    fork(_backward_rows, threads, (dout.shape[0] + block - 1) // block, (dpre, dout, pre, block, scratch))
