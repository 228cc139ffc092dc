"""metrics.jsonl → curves: growing, truncated and hostile files; thinning, averages, tokens and time."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.laptop import Laptop

from llmpy.options.train import TrainOptions
from llmpy.train.assemble import train
from llmpy.watch.curves import Curves, latest, smoothed, thinned


def line(step: int, **more: Any) -> str:
    return json.dumps({"step": step, "loss": 10 / (step + 1), "lr": 1e-3, "grad_norm": 0.5, **more}) + "\n"


def step_line(step: int, ms: Any = 500.0, tokens: int = 1000) -> str:
    return line(step, ms=ms, tokens_per_s=tokens / ms * 1000 if type(ms) is float else 1.0)


def curves_of(text: str) -> Curves:
    return Curves(io.BytesIO(text.encode("utf-8", "surrogateescape")))


def steps_of(text: str, name: str = "loss") -> list[int]:
    return [int(step) for step in curves_of(text).points(name)[0]]


def test_repeated_steps_replace_earlier_ones() -> None:
    text = line(1) + '{"step": 1, "val_loss": 3.0}\n' + line(2) + line(3) + line(4)
    assert steps_of(text) == [1, 2, 3, 4]
    text += line(2, loss=7.0) + line(5) + line(3) + line(6)
    steps, loss = curves_of(text).points("loss")
    assert (steps.tolist(), loss[1]) == ([1, 2, 3, 6], 7.0)  # the first step after resuming may appear twice
    assert steps_of(text, "val_loss") == [1]


HOSTILE = [
    "", "garbage", "{", "[1, 2]", "3", '"text"', "null", '{"loss": 3}', '{"step": "5", "loss": 1}', '{"step": -1}',
    '{"step": 1e3, "loss": 1}', '{"step": true, "loss": 1}', '{"step": 9007199254740993, "loss": 1}', "[" * 100_000,
    '{"a":' * 100_000 + "}", '{"step": 3, "loss": "<b>"}', '{"step": 3, "loss": [1]}', '{"step": 3, "loss": null}',
    '{"step": 3, "loss": ' + "9" * 5000 + "}", '{"step": 3, "loss": ' + "9" * 400 + "}", '{"step": 3, "loss": 1e308}',
    '{"step": 3, "loss": NaN, "grad_norm": Infinity}', '{"step": 3, "loss": -Infinity}', '{"step": 3, "eta_s": "soon"}',
    "\0\0\0\0", '{"step": 3, "loss": "\udcff\udcfe"}', "1, 2], [3", "{}], [{}", "{}, 3, {}", "x" * (1 << 23),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_lines_change_nothing(number: int) -> None:
    text = line(1) + line(2) + HOSTILE[number] + "\n" + line(4, val_loss=2.5, eta_s=61.5) + line(5)[:20]
    assert curves_of(text).points("loss").tolist() == [[1, 2, 4], [5, 10 / 3, 2]]
    newest = latest(io.BytesIO(text.encode("utf-8", "surrogateescape")))
    assert newest == {"step": 4, "loss": 2, "lr": 1e-3, "grad_norm": 0.5, "val_loss": 2.5, "eta_s": 61.5}


def test_thinned_keeps_every_extreme() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=30_000)
    values[12_345], values[23_456] = 50, -50
    kept = thinned(values, 500)
    assert 400 < len(kept) <= 502
    assert (np.diff(kept) > 0).all()
    assert {0, 12_345, 23_456, 29_999} <= set(kept.tolist())
    assert thinned(values[:500], 500).tolist() == list(range(500))


def test_an_average_is_centered() -> None:
    values = np.random.default_rng(3).normal(size=50)
    for radius in (0, 1, 7, 1000):
        expected = [values[i - r : i + r + 1].mean() for i in range(50) for r in [min(i, 49 - i, radius)]]
        assert smoothed(values, radius) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert smoothed(values, 9)[[0, -1]] == pytest.approx(values[[0, -1]])  # it starts and ends where the curve does


@pytest.mark.parametrize("value", [0.1, -7.0, 1e-30, 1e30])
def test_a_constant_stays_exactly_constant(value: float) -> None:
    drawn = curves_of("".join(line(s, loss=value) for s in range(5000))).line("run", "loss", "steps", None, 1000)
    assert drawn is not None and drawn.average is not None
    assert set(drawn.y.tolist()) == set(drawn.average[1].tolist()) == {float(np.float32(value))}
    assert len(drawn.x) <= 1002 and len(drawn.average[0]) <= 1000


def test_shares_are_drawn_in_percent() -> None:
    share = curves_of(line(1, share_of_peak=0.5) + line(300)).line("run", "share_of_peak", "steps", None, 100)
    assert share is not None and (share.x.tolist(), share.y.tolist(), share.average) == ([1], [50], None)


def clocks(text: str, *steps: float) -> list[tuple[float, float]]:
    """Return tokens and seconds up to these steps."""
    curves = curves_of(text)
    return [(curves.along("tokens", at), curves.along("time", at)) for at in np.array(steps)]


def test_clocks_add_up_over_restarts_with_other_batches() -> None:
    kept = '{"step": 0, "val_loss": 9}\n' + "".join(step_line(s, 300.0, 512) for s in range(1, 5))
    lost = '{"step": 4, "val_loss": 8}\n' + "".join(step_line(s, 300.0, 512) for s in range(5, 9))
    assert clocks(kept + lost, 0, 1, 8) == [(0, 0), (512, pytest.approx(0.3)), (8 * 512, pytest.approx(2.4))]
    again = "".join(step_line(s, 700.0, 2048) for s in range(5, 7)) + '{"step": 6, "val_loss": 7}\n'
    assert clocks(kept + again, 4, 6) == [(2048, pytest.approx(1.2)), (6144, pytest.approx(2.6))]
    twice = step_line(5, 100.0, 256) + step_line(6, 50.0, 1) + step_line(6, 100.0, 256)  # the last one counts
    assert clocks(kept + again + twice, 6) == [(2048 + 512, pytest.approx(1.4))]


def test_clocks_of_odd_lines() -> None:
    nonsense: tuple[Any, ...] = ("5", math.nan, math.inf, 1e300, [1], None)
    text = step_line(1) + "".join(step_line(2, ms=ms) for ms in nonsense) + line(3) + step_line(4)
    assert clocks(text, 1, 4) == [(1000, 0.5), (4000, 2)]  # a missing line counts as the one after it
    assert clocks(step_line(1001) + step_line(1002), 1000, 1002) == [(0, 0), (2000, 1)]


def test_the_tokens_of_a_resumed_run(tmp_path: Path) -> None:
    """Train 5 steps of 2 x 16, then 3 of 2 batches of 4 x 16."""
    (tmp_path / "my.txt").write_text("the cat sat on the mat and the dog ran to the sea\n" * 200, "utf-8")
    run = tmp_path / "run"
    first = TrainOptions(
        data=(tmp_path / "my.txt",), model="d1", vocab_size=300, out=run, batch_size=2, sequence_length=16, steps=5,
        eval_batches=1, sample_tokens=1,
    )  # fmt: skip
    assert train(first, Laptop()) == 0
    then = TrainOptions.gather({"resume": run, "steps": 8, "batch_size": 4, "total_batch": 128})
    assert train(then, Laptop()) == 0
    text = (run / "metrics.jsonl").read_text("utf-8")
    took = [row["ms"] for row in map(json.loads, text.splitlines()) if "ms" in row]
    at = clocks(text, 0, 1, 5, 6, 8)
    assert [tokens for tokens, _ in at] == [0, 32, 160, 288, 544]
    assert at[-1][1] == pytest.approx(sum(took) / 1000, rel=1e-12)
