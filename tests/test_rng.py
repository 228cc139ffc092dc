"""Random numbers against golden values of llm.c, checked with its own headers."""

import numpy as np
import pytest
from support import golden
from support.refused import refused

from llmpy.rng import CHUNK, MT19937, Xorshift64Star


def normal(rng, n, std=1.0, mean=0.0):
    out = np.empty(n, np.float32)
    rng.fill_normal(out, mean, std)
    return out


def test_raw_stream():
    rng = MT19937(42)
    first = rng.uint32(len(golden.WORDS))
    assert first.dtype == np.uint32
    assert tuple(first) == golden.WORDS


def test_raw_stream_does_not_depend_on_chunks():
    whole, parts = MT19937(7), MT19937(7)
    assert np.array_equal(whole.uint32(2000), np.concatenate([parts.uint32(n) for n in (1, 0, 623, 2, 1000, 374)]))


def test_uniform_is_the_low_24_bits():
    words, floats = MT19937(3).uint32(1000), MT19937(3).uniform(1000)
    assert floats.dtype == np.float32
    assert np.array_equal(floats.astype(np.float64) * 2**24, words & 0xFFFFFF)


@pytest.mark.parametrize(("n", "std"), golden.NORMAL)
def test_normal_golden(n, std):
    values = normal(MT19937(42), n, std)
    assert values.dtype == np.float32
    # one unit in the last place: NumPy's vector log and cos are not glibc's
    np.testing.assert_allclose(values, golden.NORMAL[n, std], rtol=3e-7)


def test_normal_in_chunks_equals_blocks_of_sixteen():
    n = CHUNK + 16
    one, many = MT19937(5), MT19937(5)
    values = normal(one, n)
    assert np.array_equal(values, np.concatenate([normal(many, 16) for _ in range(n // 16)]))
    assert one.uint32(1) == many.uint32(1)
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02


def test_tail_is_redrawn_after_a_whole_chunk():
    n = CHUNK + 5
    values, rng = normal(MT19937(5), n), MT19937(5)
    assert np.array_equal(values[: n - 16], normal(rng, CHUNK)[: n - 16])
    rng.uniform(5)  # drawn and discarded
    assert np.array_equal(values[-16:], normal(rng, 16))


def test_mean_moves():
    np.testing.assert_allclose(normal(MT19937(1), 20, 2.0, 3.0), 3 + 2 * normal(MT19937(1), 20), rtol=1e-5, atol=1e-6)


def test_permutation_golden():
    a = np.arange(10, dtype=np.int32)
    MT19937(42).permutation(a)
    assert tuple(a) == golden.PERMUTATION


def test_permutation_draws_one_word_less_than_elements():
    for n in (0, 1, 2, 100):
        rng, other = MT19937(9), MT19937(9)
        rng.permutation(np.arange(n))
        other.uint32(max(0, n - 1))
        assert rng.uint32(1) == other.uint32(1)


def test_state_continues_the_stream():
    rng = MT19937(42)
    assert rng.state.pos == 624  # just seeded
    rng.uint32(700)
    state = rng.state
    expected = rng.uint32(700)
    assert state.pos == 76  # a copy: the generator has moved on
    other = MT19937(0)
    other.state = state
    assert np.array_equal(other.uint32(700), expected)


def test_xorshift_golden():
    rng = Xorshift64Star(1337)
    floats = [rng.uniform() for _ in golden.COINS]
    np.testing.assert_allclose(floats, golden.COINS, rtol=1e-8)
    assert rng.state == golden.COINS_STATE


@pytest.mark.parametrize(("generator", "seed"), [(Xorshift64Star, 0), (Xorshift64Star, 2**64), (MT19937, 2**32)])
def test_seeds_that_do_not_fit_are_refused(generator, seed):
    with refused("option.out-of-range", seed):
        generator(seed)
    assert MT19937(2**32 - 1).uint32(1).size == 1
