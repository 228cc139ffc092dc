"""exp and 2^z against float64, in units in the last place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest

from llmpy.backend.cpu import activation


def over(function: Callable[[Any], Any]) -> Callable[[np.ndarray], np.ndarray]:
    @numba.njit
    def each(x: np.ndarray) -> np.ndarray:
        y = np.empty_like(x)
        for i in range(x.size):
            y[i] = function(x[i])
        return y

    return each


@pytest.fixture(scope="module")
def exp() -> Callable[[np.ndarray], np.ndarray]:
    return over(activation.exp)


@pytest.fixture(scope="module")
def exp2() -> Callable[[np.ndarray], np.ndarray]:
    return over(activation.exp2)


def ulps(got: np.ndarray, want: np.ndarray) -> float:
    return float((abs(got - want) / np.spacing(want.astype(np.float32))).max())


@pytest.mark.parametrize("around", [1.0, 30.0, 126.0])
def test_two_to(exp2: Callable[[np.ndarray], np.ndarray], around: float) -> None:
    z = np.linspace(-around, around, 1_000_003).astype(np.float32)
    assert ulps(exp2(z), np.exp2(z.astype(np.float64))) < 1.1


@pytest.mark.parametrize("around", [1.0, 30.0, 87.3])
def test_e_to(exp: Callable[[np.ndarray], np.ndarray], around: float) -> None:
    x = np.linspace(-around, around, 1_000_003).astype(np.float32)
    assert ulps(exp(x), np.exp(x.astype(np.float64))) < 1.4


def test_whole_powers_are_exact(exp2: Callable[[np.ndarray], np.ndarray]) -> None:
    z = np.arange(-126, 128, dtype=np.float32)
    assert np.array_equal(exp2(z), np.ldexp(np.float32(1), z.astype(int)))


def test_ends(exp: Callable[[np.ndarray], np.ndarray], exp2: Callable[[np.ndarray], np.ndarray]) -> None:
    below = np.array([-126.001, -1000, -3e38, -np.inf], np.float32)
    for function in exp, exp2:
        assert not function(below).any()
        assert np.array_equal(function(np.array([0, -0.0], np.float32)), [1, 1])
        assert np.isnan(function(np.array([np.nan], np.float32))).all()
