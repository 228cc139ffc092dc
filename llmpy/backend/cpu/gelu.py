"""GELU in its tanh form, and the exponential under it, as functions of one number.

    z = −2·log₂e·√(2/π)·(x + 0.044715·x³)
    GELU(x)  = ½·x·(1 + tanh √(2/π)·(x + 0.044715·x³)) = x·s         s = 1/(1 + 2^z)
    GELU′(x) = s + x·s·(1 − s)·d       d = 2·√(2/π)·(1 + 3·0.044715·x²)

Written with the logistic s instead of tanh: one exponential, no cancellation for x ≪ 0.
"""

from __future__ import annotations

import math

import numpy as np

from .jit import exact, fork, inline, kernel
from .simd import bits_to_float, f32, float_to_bits, fma, to

LOG2_E = np.float32(math.log2(math.e))
LN2_HIGH = np.float32(0.693359375)  # few bits: n·LN2_HIGH is exact
LN2_LOW = np.float32(-2.12194440e-4)
MAGIC = np.float32(12582912.0)  # 1.5·2²³: adding it rounds to an integer, which its low bits then hold
LEAST, MOST = np.float32(-126), np.float32(127)  # the exponents of normal numbers
LEAST_X = np.float32(-126 * math.log(2))
# 2^f = 1 + Σ c_i·f^i for |f| ≤ ½: the least maximal relative error that these have as float32, 3e-9.
C1, C2, C3 = np.float32(0.6931472), np.float32(0.24022648), np.float32(0.0555036)
C4, C5, C6 = np.float32(0.009618506), np.float32(0.0013390806), np.float32(0.00015326464)
ONE, ZERO, INFINITY = np.float32(1), np.float32(0), np.float32(np.inf)

BLOCK = 1 << 14  # elements of one item
SQRT_2_OVER_PI, CUBIC = math.sqrt(2 / math.pi), 0.044715
Z_1 = np.float32(-2 * math.log2(math.e) * SQRT_2_OVER_PI)
Z_3 = np.float32(-2 * math.log2(math.e) * SQRT_2_OVER_PI * CUBIC)
D_0, D_2 = np.float32(2 * SQRT_2_OVER_PI), np.float32(6 * SQRT_2_OVER_PI * CUBIC)


@exact
def _power(t, f):
    """2^(n + f), where t = MAGIC + n: 2ⁿ is made by writing n into the exponent bits."""
    p = fma(C6, f, C5)
    p = fma(p, f, C4)
    p = fma(p, f, C3)
    p = fma(p, f, C2)
    p = fma(p, f, C1)
    p = fma(p, f, ONE)
    return p * bits_to_float((float_to_bits(t) << np.int32(23)) + np.int32(0x3F800000))


@exact
def exp2(z):
    """2^z in float32 for z ≤ MOST, within 1.1 ulp; 0 for z < LEAST; NaN stays NaN."""
    t = z + MAGIC
    return ZERO if z < LEAST else _power(t, z - (t - MAGIC))


@exact
def exp(x):
    """e^x in float32 for x ≤ 88, within 1.4 ulp: what x·log₂e loses when it is rounded is kept. Ends as of `exp2`."""
    t = fma(x, LOG2_E, MAGIC)
    n = t - MAGIC
    return ZERO if x < LEAST_X else _power(t, fma(n, -LN2_LOW, fma(n, -LN2_HIGH, x)) * LOG2_E)


@exact
def _logistic_divisor(square, x):
    """1 + 2^z of x and its square, infinity where `exp2` does not reach."""
    z = x * fma(Z_3, square, Z_1)
    return INFINITY if z > MOST else ONE + exp2(z)


@exact
def gelu(x):
    """GELU(x), float32."""
    return x / _logistic_divisor(x * x, x)


@exact
def gelu_gradient(x):
    """GELU′(x), float32."""
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
