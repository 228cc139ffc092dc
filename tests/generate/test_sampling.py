"""Sampling: temperature, top k, top p, min p, repetition penalty, log-probabilities."""

from __future__ import annotations

import numpy as np
import pytest
from support.models import Coins
from support.refused import refused

from llmpy.generate.sampling import Choice, choose, likeliest, logprob

LOGITS = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))


@pytest.mark.parametrize(
    ("coin", "choice", "token"),
    [
        *((coin, Choice(), token) for coin, token in ((0.0, 0), (0.09, 0), (0.11, 1), (0.29, 1), (0.31, 2), (0.61, 3))),
        (0.9999999, Choice(), 3),
        (None, Choice(temperature=0), 3),
        (0.31, Choice(temperature=0.01), 3),
        (0.2, Choice(temperature=100.0), 0),
        (0.0, Choice(top_k=2), 2),
        (0.99, Choice(top_k=1), 3),
        (0.0, Choice(top_k=99), 0),
    ],
)  # fmt: skip
def test_inverse_of_the_cumulative_sum(coin: float | None, choice: Choice, token: int) -> None:
    assert choose(LOGITS, Coins() if coin is None else Coins(coin), choice) == token  # greedy needs no coin


def test_large_logits_do_not_overflow() -> None:
    assert choose(np.array([1e30, -1e30, 1e4], np.float32), Coins(0.5), Choice(1e-3, 0)) == 0


@pytest.mark.parametrize("temperature", [1e-3, 1e-308, 5e-324])
@pytest.mark.parametrize("top_k", [0, 2])
def test_a_tiny_temperature_is_greedy(temperature: float, top_k: int) -> None:
    assert choose(np.array([3, -9, 7, 6.9], np.float32), Coins(0.999), Choice(temperature, top_k)) == 2
    assert choose(np.array([3, 7, 7, -1], np.float32), Coins(0.999), Choice(temperature, top_k)) == 2
    assert choose(np.array([3, 7, 7, -1], np.float32), Coins(0.4), Choice(temperature, top_k)) == 1


def test_a_broken_model_is_an_error() -> None:
    with refused("model.not-finite"):
        choose(np.array([0.0, np.nan], np.float32), Coins(0.5), Choice(1.0, 0))


def chances(choice: Choice, logits: np.ndarray = LOGITS, text: list[int] | None = None) -> dict[int, float]:
    """Return how often each token is chosen by a thousand evenly spaced coins."""
    found: dict[int, float] = {}
    for coin in (np.arange(1000) + 0.5) / 1000:
        token = choose(logits, Coins(coin), choice, text or [])
        found[token] = found.get(token, 0) + 0.001
    return found


def near(want: dict[int, float]) -> object:
    return pytest.approx(want, abs=0.0021)


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    assert chances(Choice(top_p=0.39)) == near({3: 1})
    assert chances(Choice(top_p=0.41)) == near({2: 3 / 7, 3: 4 / 7})
    assert chances(Choice(top_p=0.95)) == near({0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4})
    assert chances(Choice(top_k=2, top_p=0.6)) == near({2: 3 / 7, 3: 4 / 7})  # of the two likeliest 4/7 < 0.6
    # ties go to the first
    assert chances(Choice(top_p=1e-9), np.zeros(4, np.float32)) == near({0: 1})
    assert chances(Choice(top_k=2), np.zeros(4, np.float32)) == near({0: 1 / 2, 1: 1 / 2})


def test_min_p_is_a_share_of_the_likeliest() -> None:
    assert chances(Choice(min_p=0.49)) == near({1: 2 / 9, 2: 3 / 9, 3: 4 / 9})
    assert chances(Choice(min_p=0.51)) == near({2: 3 / 7, 3: 4 / 7})
    assert chances(Choice(min_p=1)) == near({3: 1})


def test_repetition_penalty() -> None:
    logits = np.array([2, -1, 1, 0], np.float32)
    e = np.exp([1, -2, 1, 0])
    assert chances(Choice(repetition_penalty=2), logits, [0, 1, 0]) == near(dict(enumerate(e / e.sum())))
    assert choose(logits, Coins(), Choice(0, repetition_penalty=3), [0, 0]) == 2
    assert choose(logits, Coins(), Choice(0, repetition_penalty=0.5), [2]) == 0  # 2 and 2: the first
    assert logits[0] == 2


def test_likeliest_is_a_stable_sort() -> None:
    logits = np.random.default_rng(0).integers(0, 9, 100).astype(np.float32)
    for k in range(101):
        want = np.sort(np.argsort(-logits, kind="stable")[: k or 100])
        assert np.array_equal(likeliest(logits, k), want)
    many = np.random.default_rng(1).integers(0, 90, 5000).astype(np.float32)  # columns bound the border first
    for k in (1, 2, 50, 155, 156, 157, 1000, 4999, 5000):
        assert np.array_equal(likeliest(many, k), np.sort(np.argsort(-many, kind="stable")[:k]))


@pytest.mark.parametrize("spread", [0.0, 0.3, 3, 9, 60])
@pytest.mark.parametrize("levels", [7, 10**9])
def test_many_tokens_are_chosen_as_by_a_sort_of_all(spread: float, levels: int) -> None:
    rng = np.random.default_rng(2)
    for share in (1e-9, 0.3, 0.9, 0.999, 1 - 1e-12):
        logits = (np.round(rng.normal(0, spread, 5000) * levels) / levels).astype(np.float32)
        scaled = logits.astype(np.float64)
        p = np.exp(scaled - scaled.max())
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= share * p.sum()]] = 0
        total = np.cumsum(p)
        for coin in (0.0, 0.123, 0.5, 0.999, 1 - 2**-24):
            at = min(int(np.searchsorted(total, coin * total[-1], side="right")), int(np.flatnonzero(p)[-1]))
            assert choose(logits, Coins(coin), Choice(top_p=share)) == at


def test_logprob_is_log_softmax() -> None:
    for token, p in enumerate((0.1, 0.2, 0.3, 0.4)):
        assert logprob(LOGITS + 50, token) == pytest.approx(np.log(p), rel=1e-5)
