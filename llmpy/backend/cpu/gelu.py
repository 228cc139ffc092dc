"""GELU in its tanh form, and the exponential that it needs, as scalar functions.

    z = −2·log₂e·√(2/π)·(x + 0.044715·x³)
    GELU(x)  = ½·x·(1 + tanh √(2/π)·(x + 0.044715·x³)) = x·s         s = 1/(1 + 2^z)
    GELU′(x) = s + x·s·(1 − s)·d       d = 2·√(2/π)·(1 + 3·0.044715·x²)

The logistic s replaces tanh: one exponential, no cancellation for x ≪ 0.
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


@inline
def _block(worker, item, out, inp):
    part = slice(item * BLOCK, min((item + 1) * BLOCK, inp.shape[0]))
    out, inp = out[part], inp[part]
    for i in range(inp.shape[0]):
        out[i] = to(out, gelu(f32(inp[i])))


@kernel
def gelu_forward(
    threads,  # int
    out,      # (n,) :=
    inp,      # (n,)
):  # fmt: skip
    fork(_block, threads, (inp.shape[0] + BLOCK - 1) // BLOCK, (out, inp))
