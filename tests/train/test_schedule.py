"""The learning rates of llm.c, to float32 precision, and the horizon of a run bounded by time."""

from __future__ import annotations

import math

import pytest
from support.golden import RATE_STEPS, RATES

from llmpy.options.train import KINDS
from llmpy.train.schedule import horizon, learning_rate


@pytest.mark.parametrize("kind", KINDS)
def test_golden_values_of_llm_c(kind: str) -> None:
    rates = [learning_rate(s, 100, 10, 6e-4, 0.1, kind) for s in RATE_STEPS]
    # Not 1e-7: 1 − √r near r = 1 loses digits in llm.c's float32.
    assert rates == pytest.approx(RATES[kind], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (5, 10), (10, 10), (3, 0)])
def test_every_step_of_a_short_run_has_a_rate(kind: str, total: int, warmup: int) -> None:
    rates = [learning_rate(s, total, warmup, 1.0, 0.1, kind) for s in range(total + 2)]
    assert all(0 < r <= 1 and math.isfinite(r) for r in rates if r != 1.1)
    assert min(rates) >= 0.09


def test_beyond_the_end_the_rate_stays_at_its_end() -> None:
    assert learning_rate(150, 100, 10, 1.0, 0.1) == pytest.approx(0.1)


def test_horizon_by_steps() -> None:
    assert horizon(3, 1e9, 1.0, 100, None) == 100
    assert horizon(100, 0.0, 1.0, 100, None) == 101  # there is always a next step


def test_horizon_by_time_follows_the_measured_speed() -> None:
    assert horizon(0, 0.0, 0.5, None, 60.0) == 120
    assert horizon(60, 30.0, 0.5, None, 60.0) == 120
    assert horizon(60, 30.0, 1.0, None, 60.0) == 90  # slower than predicted
    assert horizon(90, 61.0, 0.5, None, 60.0) == 91


def test_whichever_bound_comes_first() -> None:
    assert horizon(0, 0.0, 0.5, 50, 60.0) == 50
    assert horizon(0, 0.0, 0.5, 500, 60.0) == 120


def test_a_run_by_the_clock_ends_at_the_final_rate() -> None:
    elapsed, rates, step = 0.0, [], 0
    while elapsed < 60:
        total = horizon(step, elapsed, 0.7, None, 60.0)
        rates.append(learning_rate(step, total, min(50, total // 10), 1.0, 0.1))
        elapsed, step = elapsed + 0.7, step + 1
    assert max(rates) == pytest.approx(1.0, rel=0.01)
    assert rates[-1] == pytest.approx(0.1, rel=0.02)
