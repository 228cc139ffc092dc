"""The kernels that measure memory compute the sums they are named for."""

from __future__ import annotations

import numpy as np
import pytest

from llmpy.backend import load
from llmpy.backend.cpu import peak


@pytest.mark.parametrize("threads", [1, 2])
def test_the_stream_is_the_triad(threads: int) -> None:
    load("cpu", threads=threads)  # starts the threads
    n = 3 * peak.STREAM_BLOCK + 5
    b, c = np.random.default_rng(0).standard_normal((2, n), np.float32)
    a = np.full(n, np.nan, np.float32)
    peak.triad(threads, a, b, c, np.float32(0.5))
    np.testing.assert_allclose(a, b + np.float32(0.5) * c, rtol=1e-6, atol=1e-6)
    assert peak.measure_bandwidth(threads, a, b, c, seconds=0.0) > 0


def test_reading_is_the_sum() -> None:
    load("cpu", threads=2)
    a = np.random.default_rng(0).standard_normal(peak.READ_BLOCK + 7, np.float32)
    sink = np.full(2, np.nan, np.float32)
    peak.read(2, sink, a)
    np.testing.assert_allclose(sink, [a[: peak.READ_BLOCK].sum(), a[peak.READ_BLOCK :].sum()], rtol=1e-3, atol=1e-3)
    assert peak.measure_reading(2, sink, a, seconds=0.0) > 0
