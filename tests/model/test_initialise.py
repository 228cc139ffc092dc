"""Initialisation from scratch, against sums printed by llm.c."""

import numpy as np
import pytest
from support import golden

from llmpy.model.arena import Arena, Tensor
from llmpy.model.config import ModelConfig
from llmpy.model.gpt2 import params_table
from llmpy.model.initialise import initialise
from llmpy.rng import MT19937


def arena(config, dtype=np.float32):
    params = Arena(params_table(config), np.empty, dtype)
    params.buffer.fill(np.nan)
    return params


@pytest.mark.parametrize("dial", ["d6", pytest.param("d12", marks=pytest.mark.long)])
def test_golden(dial, monkeypatch):
    generators = []

    def keep(seed):
        generators.append(MT19937(seed))
        return generators[-1]

    monkeypatch.setattr("llmpy.model.initialise.MT19937", keep)
    config = ModelConfig.from_dial(dial)
    params = arena(config)
    initialise(params, config)
    for name, (a, b, c, total, squares) in golden.INIT[dial].items():
        flat = getattr(params, name).reshape(-1)
        np.testing.assert_allclose(flat[:3], [a, b, c], rtol=3e-7, err_msg=name)
        # a sum cancels: allow each value its last bit
        assert flat.sum(dtype=np.float64) == pytest.approx(total, abs=1e-5 * squares**0.5), name
        assert float(np.square(flat, dtype=np.float64).sum()) == pytest.approx(squares, rel=1e-6), name
    assert [g.uint32(1)[0] for g in generators] == [golden.INIT_WORDS[dial]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_every_element_is_written(dtype):
    config = ModelConfig(layers=2, heads=2, channels=8, context=5, vocab_size=130)
    params = arena(config, dtype)
    initialise(params, config, seed=1)
    assert np.isfinite(params.buffer).all()
    assert params.wte.shape == (256, 8)
    assert np.count_nonzero(params.wte[:130]) == 130 * 8
    assert not params.wte[130:].any()
    assert (params.ln_1_w == 1).all()
    assert (params.ln_f_w == 1).all()
    for name in ("ln_1_b", "attn_qkv_b", "attn_proj_b", "ln_2_b", "mlp_fc_b", "mlp_proj_b", "ln_f_b"):
        assert not getattr(params, name).any(), name
    ratio = np.abs(params.mlp_proj_w).std() / np.abs(params.mlp_fc_w).std()
    assert ratio == pytest.approx(0.5, rel=0.2)  # 1/√(2L)


def test_seed_matters_and_repeats():
    config = ModelConfig(layers=1, heads=1, channels=4, context=4, vocab_size=8)
    buffers = []
    for seed in (1, 1, 2):
        params = arena(config)
        initialise(params, config, seed)
        buffers.append(params.buffer)
    assert np.array_equal(buffers[0], buffers[1])
    assert not np.array_equal(buffers[0], buffers[2])


def test_a_table_with_an_unknown_init_is_refused():
    config = ModelConfig(layers=1, heads=1, channels=4, context=4, vocab_size=8)
    params = Arena([Tensor("odd", (3,), "gamma")], np.empty, np.float32)
    with pytest.raises(ValueError, match="odd.*gamma"):
        initialise(params, config)
