"""GELU in its tanh form, and the exponential under it, as functions of one number.

    u = √(2/π)·(x + 0.044715·x³)
    GELU(x)  = ½·x·(1 + tanh u) = x·s           s = 1/(1 + e^(−2u))
    GELU′(x) = s + x·s·(1 − s)·2u′              u′ = √(2/π)·(1 + 3·0.044715·x²)

Written with the logistic s instead of tanh: one exponential, no cancellation for x ≪ 0.
"""

from __future__ import annotations

import numpy as np

from .jit import exact, fork, inline, kernel
from .simd import bits_to_float, f32, float_to_bits, fma, to

LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH = np.float32(0.693359375)  # few bits: n·LN2_HIGH is exact
LN2_LOW = np.float32(-2.12194440e-4)
MAGIC = np.float32(12582912.0)  # 1.5·2²³: adding it rounds to an integer, which its low bits then hold
HIGHEST = np.float32(88.02969)  # ln 2¹²⁷: a power of two whose exponent still fits
LOWEST = np.float32(-87.336544)  # ln of the smallest normal one; below it e^x is 0 here
# e^r ≈ 1 + r + Σ c_i·r^i for |r| ≤ ln2/2: weighted least squares, relative error 5e-9 before rounding.
C2, C3, C4, C5, C6 = (np.float32(c) for c in (0.49999985, 0.16666488, 0.0416699, 0.008371934, 0.0013750102))
ONE, ZERO, INFINITY = np.float32(1), np.float32(0), np.float32(np.inf)

BLOCK = 1 << 14  # elements of one item
SQRT_2_OVER_PI = np.float32(0.7978845608028654)
CUBIC = np.float32(0.044715)


@exact
def exp(x):
    """e^x in float32 for x ≤ HIGHEST, within 2 ulp; 0 below the normal range; NaN stays NaN.

    x = n·ln2 + r;  e^x = 2ⁿ·e^r, and 2ⁿ is made by writing n into the exponent bits.
    """
    t = fma(x, LOG2_E, MAGIC)
    n = t - MAGIC
    r = fma(n, -LN2_LOW, fma(n, -LN2_HIGH, x))
    p = fma(C6, r, C5)
    p = fma(p, r, C4)
    p = fma(p, r, C3)
    p = fma(p, r, C2)
    p = fma(p, r, ONE)
    p = fma(p, r, ONE)
    e = p * bits_to_float((float_to_bits(t) << np.int32(23)) + np.int32(0x3F800000))
    return ZERO if x < LOWEST else e


@exact
def _logistic_divisor(u):
    """1 + e^(−2u), infinity where `exp` does not reach."""
    x = np.float32(-2) * u
    return INFINITY if x > HIGHEST else ONE + exp(x)


@exact
def gelu(x):
    """GELU(x), float32."""
    return x / _logistic_divisor(SQRT_2_OVER_PI * fma(CUBIC * x * x, x, x))


@exact
def gelu_gradient(x):
    """GELU′(x), float32."""
    square = x * x
    s = ONE / _logistic_divisor(SQRT_2_OVER_PI * fma(CUBIC * square, x, x))
    return s + x * s * (ONE - s) * np.float32(2) * SQRT_2_OVER_PI * fma(np.float32(3) * CUBIC, square, ONE)


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
