"""The detector against golden vectors of llm.c, and its state."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from support.golden import Z_SCORES

from llmpy.train.outliers import WINDOW, OutlierDetector, UpdateGuard


def test_golden_vectors() -> None:
    detector = OutlierDetector()
    z = [detector.update(float(i % 7)) for i in range(130)]
    assert all(map(math.isnan, z[:WINDOW]))
    assert [*z[WINDOW:], detector.update(100.0)] == pytest.approx(Z_SCORES, rel=1e-10)


def test_a_spike_stands_out_of_noise_and_nothing_out_of_a_constant() -> None:
    rng = np.random.default_rng(0)
    noise, flat = OutlierDetector(), OutlierDetector()
    z = [noise.update(x) for x in rng.uniform(0, 1, 1000)][WINDOW:]
    assert max(map(abs, z)) < 3
    assert noise.update(10.0) > 5
    assert [flat.update(2.0) for _ in range(200)][WINDOW:] == [0.0] * (200 - WINDOW)


def test_steps_without_a_target_are_not_judged() -> None:
    guards = UpdateGuard({"loss": 3.0, "norm": 3.0}), UpdateGuard({"loss": 3.0, "norm": 3.0})
    for x in np.random.default_rng(0).uniform(1, 2, 200).tolist():
        judged = [guard.judge(x, x) for guard in guards]
        assert str(judged[0]) == str(judged[1])
        z, skipped = guards[0].judge(None, 0.0)
        assert math.isnan(z["loss"]) and math.isnan(z["norm"]) and not skipped
    assert guards[0].judge(None, math.nan)[1] and guards[0].bad_steps == 1


def test_its_state_is_restored_bitwise() -> None:
    values = np.random.default_rng(1).normal(3, 1, 400).tolist()
    for cut in (0, 5, WINDOW, 200):
        whole, first, second = OutlierDetector(), OutlierDetector(), OutlierDetector()
        expected = [whole.update(x) for x in values]
        found = [first.update(x) for x in values[:cut]]
        second.state = json.loads(json.dumps(first.state))
        found += [second.update(x) for x in values[cut:]]
        assert np.array_equal(found, expected, equal_nan=True)
