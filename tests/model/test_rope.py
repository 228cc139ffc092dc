"""Angles of RoPE: against the formula in float64, and against transformers where it is installed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from llmpy.model.config import LlamaConfig, RopeScaling
from llmpy.model.rope import frequencies, tables

LLAMA3 = RopeScaling(32.0, 1.0, 4.0, 8192)


def shape(HS: int, theta: float, scaling: RopeScaling | None = None) -> LlamaConfig:
    return LlamaConfig(1, 2, 2 * HS, head_size=HS, rope_theta=theta, rope_scaling=scaling)


def test_frequencies_are_powers_of_theta() -> None:
    found = frequencies(shape(64, 1e5))
    assert found.dtype == np.float32
    assert np.allclose(found, 1e5 ** (-np.arange(32) / 32), rtol=1e-6, atol=0)


def test_llama3_stretches_long_wavelengths() -> None:
    plain, stretched = frequencies(shape(64, 5e5)), frequencies(shape(64, 5e5, LLAMA3))
    wavelengths = 2 * math.pi / plain
    kept, long = wavelengths < 8192 / 4, wavelengths > 8192
    assert np.array_equal(stretched[kept], plain[kept])
    assert np.array_equal(stretched[long], plain[long] / 32)
    between = ~kept & ~long
    assert kept.any() and long.any() and between.any()
    assert ((plain / 32 < stretched) & (stretched < plain))[between].all()


def test_tables_are_cos_and_sin_of_the_angles() -> None:
    """To float32's rounding of an angle: half an ulp of the frequency and of the product."""
    length, config = 3000, shape(64, 1e4)
    cos, sin = tables(config, length)
    assert cos.shape == sin.shape == (length, 32) and cos.dtype == sin.dtype == np.float32
    position = np.arange(length)[:, None]
    angles = position * 1e4 ** (-np.arange(32) / 32)
    bound = 1e-7 + 4 * 2.0**-24 * angles
    assert (abs(cos - np.cos(angles)) <= bound).all() and (abs(sin - np.sin(angles)) <= bound).all()


@pytest.mark.parametrize(
    ("HS", "theta", "scaling"),
    [
        (64, 1e5, None),  # SmolLM2-135M
        (64, 1.3e5, None),  # SmolLM2-1.7B
        (64, 1e4, None),  # TinyLlama
        (64, 5e5, LLAMA3),  # Llama-3.2-1B
        (64, 1e6, None),  # Qwen2.5-0.5B
        (128, 1e6, None),  # Qwen3-0.6B
        (128, 5e5, RopeScaling(8.0, 1.0, 4.0, 8192)),  # Llama-3.1-8B
    ],
)
def test_tables_agree_with_transformers(HS: int, theta: float, scaling: RopeScaling | None) -> None:
    torch: Any = pytest.importorskip("torch")
    transformers: Any = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    about: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaling:
        about |= {
            "rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high, "original_max_position_embeddings": scaling.original,
        }  # fmt: skip
    theirs = transformers.LlamaConfig(hidden_size=2 * HS, num_attention_heads=2, head_dim=HS, rope_parameters=about)
    positions = torch.arange(8192)[None]
    want = LlamaRotaryEmbedding(theirs)(torch.zeros(1), positions)
    for got, table in zip(tables(shape(HS, theta, scaling), 8192), want, strict=True):
        assert np.abs(got - table[0, :, : HS // 2].numpy()).max() <= 1e-6
