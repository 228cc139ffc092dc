"""The outlier detector against llm.c's numbers and against NumPy."""

import math

import numpy as np
import pytest

from llmpy.golden import Z_SCORES
from llmpy.outliers import WINDOW, OutlierDetector


def test_golden() -> None:
    detector = OutlierDetector()
    scores = [detector.update(x) for x in [float(i % 7) for i in range(130)] + [100.0]]
    assert all(math.isnan(z) for z in scores[:128])
    assert scores[128:] == pytest.approx(Z_SCORES, rel=1e-10)


def test_a_window_that_slides() -> None:
    values = np.random.default_rng(0).uniform(size=1000)
    detector = OutlierDetector()
    scores = [detector.update(float(x)) for x in values]
    for i in range(WINDOW, 1000):
        window = values[i + 1 - WINDOW : i + 1]
        assert scores[i] == pytest.approx((values[i] - window.mean()) / window.std(), abs=1e-9)
    assert max(abs(z) for z in scores[WINDOW:]) <= 3
    assert detector.update(20.0) > 5


def test_equal_values_and_values_that_are_none() -> None:
    detector = OutlierDetector()
    scores = [detector.update(0.5) for _ in range(WINDOW + 1)]
    assert scores[-1] == 0
    before = list(detector.values)
    assert math.isnan(detector.update(math.nan))
    assert math.isnan(detector.update(math.inf))
    assert detector.values == before
