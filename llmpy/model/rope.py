"""Angles of RoPE (Su et al. 2021), with the wavelengths of Llama 3 if the config asks for them."""

from __future__ import annotations

import math

import numpy as np

from .config import LlamaConfig, RopeScaling

F32 = np.float32  # dev/LOG.md#angles-in-float32


def tables(config: LlamaConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return cos and sin of position · `frequencies`, (length, HS/2) float32.

    Angles are rounded to float32, by up to 2.4e-4 near 8,000, as in the training of these models.
    """
    angles = np.arange(length, dtype=F32)[:, None] * frequencies(config)
    return np.cos(angles.astype(np.float64)).astype(F32), np.sin(angles.astype(np.float64)).astype(F32)


def frequencies(config: LlamaConfig) -> np.ndarray:
    """Return the angle per position of each pair of channels, (HS/2,) float32: θ^(−2i/HS), scaled."""
    HS = config.head_size
    exponents = np.arange(0, HS, 2, dtype=F32) / F32(HS)
    powers = np.float64(F32(config.rope_theta)) ** exponents.astype(np.float64)
    plain = F32(1) / powers.astype(F32)
    return plain if config.rope_scaling is None else _stretched(plain, config.rope_scaling)


def _stretched(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Divide the frequencies of wavelengths above original/low by the factor, keep those below original/high."""
    wavelengths = F32(2 * math.pi) * (1 / plain)
    slow = plain / F32(scaling.factor)
    share = (F32(scaling.original) / wavelengths - F32(scaling.low)) / F32(scaling.high - scaling.low)
    between = (1 - share) * plain / F32(scaling.factor) + share * plain
    long, short = wavelengths > scaling.original / scaling.low, wavelengths < scaling.original / scaling.high
    return np.where(long, slow, np.where(short, plain, between))
