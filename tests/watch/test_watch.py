"""`llmpy watch` below the page: files that grow, are cut or are hostile become curves; who may ask what."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from support.browser import started
from support.laptop import Laptop

from llmpy.errors import LlmpyError
from llmpy.options.train import TrainOptions
from llmpy.train.trainer import train
from llmpy.watch import curves
from llmpy.watch.curves import CHUNK, LEVEL, Curve, Metrics, smoothed, survey, width_of
from llmpy.watch.runs import Runs, board
from llmpy.watch.server import PORTS, Server, page, policy


def line(step: int, **more: Any) -> str:
    return json.dumps({"step": step, "loss": 10 / (step + 1), "lr": 1e-3, "grad_norm": 0.5, **more}) + "\n"


def run_folder(path: Path, steps: int = 5) -> Path:
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(map(line, range(1, steps + 1))))
    return path


def steps_of(metrics: Metrics, name: str = "loss") -> list[int]:
    metrics.read()
    return list(metrics.curves.curves[name].steps)


# ---- curves


def test_a_file_that_grows_is_read_on(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    assert steps_of(metrics) == []
    with metrics.path.open("w", buffering=1) as file:
        file.write(line(1) + line(2))
        assert steps_of(metrics) == [1, 2]
        before = metrics.version
        assert steps_of(metrics) == [1, 2]
        assert metrics.version == before
        whole = line(3)
        file.write(whole[:20])  # a line in the middle of being written
        file.flush()
        assert steps_of(metrics) == [1, 2]
        assert metrics.share == 1
        file.write(whole[20:])
        assert steps_of(metrics) == [1, 2, 3]
        assert metrics.version != before


def test_a_file_that_was_cut_and_grew_again(tmp_path: Path) -> None:
    """What --resume does, also if it is already longer than before when it is looked at next."""
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    path.write_text("".join(map(line, range(1, 11))))
    assert steps_of(metrics) == list(range(1, 11))
    kept = "".join(map(line, range(1, 5)))
    with path.open("r+") as file:  # the same file, as os.truncate leaves it
        file.truncate(len(kept))
    assert steps_of(metrics) == [1, 2, 3, 4]
    path.write_text("".join(map(line, range(1, 11))))
    assert steps_of(metrics) == list(range(1, 11))
    path.write_text(kept + "".join(line(step, ms=step) for step in range(5, 31)))
    metrics.read()
    assert steps_of(metrics) == list(range(1, 31))
    path.unlink()
    assert steps_of(metrics) == []
    path.write_text(line(7))
    assert steps_of(metrics) == [7]


def test_steps_that_come_again_replace_those_before(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    first = line(1) + '{"step": 1, "val_loss": 3.0}\n' + line(2) + line(3, norm_z=9.0) + line(4, skipped="why")
    path.write_text(first)
    assert steps_of(metrics) == [1, 2, 3, 4]
    assert metrics.curves.outliers == [(3, 0.5, 9.0)]
    assert metrics.curves.marks == [(4, "skipped: why")]
    path.write_text(first + line(2, loss=7.0) + line(5) + line(3) + line(6))
    assert steps_of(metrics) == [1, 2, 2, 3, 6]  # the one at which it goes on may be there twice
    assert steps_of(metrics, "val_loss") == [1]
    assert metrics.curves.outliers == []
    assert metrics.curves.marks == []


HOSTILE = [
    "", "garbage", "{", "[1, 2]", "3", '"text"', "null", '{"loss": 3}', '{"step": "5", "loss": 1}', '{"step": -1}',
    '{"step": 1e3, "loss": 1}', '{"step": true, "loss": 1}', '{"step": 9007199254740993, "loss": 1}', "[" * 100_000,
    '{"a":' * 100_000, '{"step": 3, "loss": "<b>"}', '{"step": 3, "loss": [1]}', '{"step": 3, "loss": null}',
    '{"step": 3, "loss": ' + "9" * 5000 + "}", '{"step": 3, "loss": ' + "9" * 400 + "}", '{"step": 3, "loss": 1e308}',
    '{"step": 3, "loss": NaN, "grad_norm": Infinity, "norm_z": Infinity}', '{"step": 3, "loss": -Infinity}',
    '{"step": 3, "norm_z": 99}', '{"step": 3, "norm_z": 99, "grad_norm": {}}', '{"step": 3, "eta_s": "soon"}',
    "\0\0\0\0", "\udcff\udcfe", '{"step": 3, "skipped": {"x": ["<script>"]}}', "1, 2], [3", "x" * (2 * CHUNK),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_lines_change_nothing(tmp_path: Path, number: int) -> None:
    run = run_folder(tmp_path / "run", 2)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(HOSTILE[number].encode("utf-8", "surrogateescape") + b"\n" + line(4).encode())
    told = board(Runs([run]))
    json.dumps(told, allow_nan=False)
    picture = told["runs"][0]["picture"]
    assert picture["curves"]["loss"]["step"] == [1, 2, 4]
    assert picture["curves"]["loss"]["mean"] == [5.0, 3.33333, 2.0]


def test_numbers_that_are_not_finite_are_marked(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", 1)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 2, "loss": NaN, "lr": 0.1}\n{"step": 3, "skipped": "the loss is nan", "lr": 0.1}\n' + line(4)
        )
    picture = board(Runs([run]))["runs"][0]["picture"]
    assert picture["marks"] == [(2, "loss nan"), (3, "skipped: the loss is nan")]
    assert picture["curves"]["loss"]["step"] == [1, 4]
    assert picture["curves"]["lr"]["step"] == [1, 2, 3, 4]


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{" * 10_000)
    if hasattr(os, "mkfifo"):
        os.mkfifo(run / "metrics.jsonl")
        (run / "samples.txt").symlink_to("/dev/zero")
    told = board(Runs([run]))["runs"][0]
    assert told["picture"]["curves"] == {}
    assert told["samples"] == []


def curve_of(steps: np.ndarray, values: np.ndarray) -> Curve:
    curve = Curve()
    curve.extend(steps, values)
    return curve


def test_thinned_keeps_every_extreme_and_mean() -> None:
    rng = np.random.default_rng(1)
    steps, values = np.cumsum(rng.integers(1, 4, 30_000)), rng.normal(size=30_000).astype(np.float32)
    values[12_345] = 50
    middle, mean, least, largest = curve_of(steps, values).thinned(points=500)
    assert 250 <= len(mean) <= 500
    assert largest.max() == 50
    width = 1 << (int(steps[-1] - steps[0]) // 499).bit_length()
    for i, group in enumerate(np.unique(steps // width)):
        inside = values[steps // width == group].astype(float)
        assert mean[i] == pytest.approx(inside.mean(), rel=1e-12)
        assert (least[i], largest[i]) == (inside.min(), inside.max())
        assert middle[i] // width == group
    few = curve_of(steps[:500], values[:500]).thinned(points=500)
    assert np.array_equal(few, [steps[:500], values[:500]])


def test_full_buckets_are_kept_and_the_result_is_as_from_scratch() -> None:
    rng = np.random.default_rng(2)
    steps, values = np.arange(20_000), rng.normal(size=20_000).astype(np.float32)
    growing, place = Curve(), 0
    while place < len(steps):
        end = place + int(rng.integers(1, 900))
        growing.extend(steps[place:end], values[place:end])
        place = end
        assert np.array_equal(growing.thinned(points=300), curve_of(steps[:end], values[:end]).thinned(points=300))
    growing.cut(11_111)
    assert np.array_equal(growing.thinned(points=300), curve_of(steps[:11_112], values[:11_112]).thinned(points=300))


def test_a_part_is_shown_in_more_detail() -> None:
    curve = curve_of(np.arange(100_000), np.arange(100_000, dtype=np.float32))
    steps, values = curve.thinned(5000, 5500)
    assert list(steps) == list(range(5000, 5501)) == list(values)
    assert curve.thinned(200_000, 300_000).shape == (2, 0)


def test_smoothing_is_its_formula() -> None:
    rng = np.random.default_rng(3)
    points = np.stack([np.cumsum(rng.integers(1, 9, 50)).astype(float), rng.normal(size=50)])
    for over in (0.05, 1, 20, 1000):  # the first: every point for itself
        apart = (points[0][None] - points[0][:, None]) / over
        lines = []
        for d, w in zip(apart, np.exp(-np.abs(apart)), strict=True):
            normal = np.array([[w.sum(), w @ d], [w @ d, w @ d**2 + LEVEL]])
            lines.append(np.linalg.solve(normal, [w @ points[1], w @ (d * points[1])])[0])
        assert smoothed(points, over) == pytest.approx(lines, rel=1e-11)
    assert [width_of(n) for n in (0, 60, 150, 1000, 2500, 1e6)] == [1, 1, 2, 10, 50, 10_000]


def test_smoothing_stays_among_the_points() -> None:
    for n, where in ((60, -3), (150, -2), (90, 20), (60, 2)):
        values = 1 + 0.1 * np.sin(np.arange(n))
        values[where] = 100
        drawn = smoothed(np.stack([np.arange(n, dtype=float), values]), 5)
        assert drawn.min() >= values.min() * (1 - 1e-12) and drawn.max() <= 100


@pytest.mark.parametrize("value", [0.1, -7.0, 1e-30, 1e30])
def test_what_is_constant_stays_exactly(value: float, tmp_path: Path) -> None:
    steps = np.cumsum(np.random.default_rng(3).integers(1, 9, 500)).astype(float)
    assert np.array_equal(smoothed(np.stack([steps, np.full(500, value)]), 20), np.full(500, value))
    (tmp_path / "metrics.jsonl").write_text("".join(line(s, loss=value) for s in range(5000)))
    loss = board(Runs([tmp_path]))["runs"][0]["picture"]["curves"]["loss"]  # as the page draws it, buckets and all
    assert loss["smooth"] == loss["mean"] == [loss["mean"][0]] * len(loss["step"])


def test_smoothing_begins_and_ends_where_the_curve_does() -> None:
    """A mean, of what lies on one side alone, would begin 14 % too low."""
    steps = np.arange(1.0, 1001)
    falling = 3 + 8 * np.exp(-steps / 40)
    assert smoothed(np.stack([steps, falling]), 10)[[0, -1]] == pytest.approx(falling[[0, -1]], rel=0.03)
    assert smoothed(np.stack([steps, 0.6 * steps]), 10) == pytest.approx(0.6 * steps, abs=1e-8)  # but for LEVEL


def test_a_part_is_smoothed_as_the_whole_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    rng = np.random.default_rng(4)
    (run / "metrics.jsonl").write_text("".join(line(s, loss=rng.normal()) for s in range(900)))
    runs = Runs([run])
    whole = board(runs, over=20)["runs"][0]["picture"]["curves"]["loss"]["smooth"]
    part = board(runs, first=600, last=700, over=20)["runs"][0]["picture"]["curves"]["loss"]
    assert part["step"] == list(range(600, 701))
    assert part["smooth"] == pytest.approx(whole[600:701], abs=0.02)  # e⁻⁴ of the noise beyond


def test_a_large_file_is_looked_over_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "SURVEY_FROM", 1 << 20)
    path = tmp_path / "metrics.jsonl"
    count = 40_000
    path.write_text("".join(map(line, range(count))))
    metrics = Metrics(path)
    metrics.read(0)
    assert 0 < metrics.share < 1
    rough = metrics.curves.curves["loss"]
    assert 400 < len(rough) < 600
    assert rough.steps[0] < count / 100
    assert rough.steps[-1] > count * 0.99
    shares = []
    while metrics.share < 1:
        shares.append(metrics.share)
        version = metrics.version
        metrics.read(0)
        assert metrics.version != version
    assert shares == sorted(shares)
    metrics.read(0)
    assert list(metrics.curves.curves["loss"].steps) == list(range(count))
    with path.open("rb") as file:
        assert len(list(survey(file, path.stat().st_size))) == 500


# ---- clocks


def step_line(step: int, ms: Any = 500.0, tokens: int = 1000, **more: Any) -> str:
    return line(step, ms=ms, tokens_per_s=tokens / ms * 1000 if type(ms) is float else 1.0, **more)


def clocks(path: Path, *steps: float) -> list[tuple[float, float]]:
    """Tokens and seconds up to these steps."""
    metrics = Metrics(path)
    metrics.read()
    return [(metrics.curves.along("tokens", at), metrics.curves.along("seconds", at)) for at in np.array(steps)]


def test_clocks_add_up_over_restarts_with_other_batches(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = '{"step": 0, "val_loss": 9}\n' + "".join(step_line(s, 300.0, 512) for s in range(1, 5))
    lost = "".join(step_line(s, 300.0, 512) for s in range(5, 9))
    path.write_text(kept + '{"step": 4, "val_loss": 8}\n' + lost)
    assert clocks(path, 0, 1, 8) == [(0, 0), (512, pytest.approx(0.3)), (8 * 512, pytest.approx(2.4))]
    metrics = Metrics(path)
    metrics.read()
    again = "".join(step_line(s, 700.0, 2048) for s in range(5, 7)) + '{"step": 6, "val_loss": 7}\n'
    path.write_text(kept + again)  # as --resume cuts it, with a larger batch
    metrics.read()
    told = metrics.curves.along("tokens", np.array([4, 6])), metrics.curves.along("seconds", np.array([4, 6]))
    assert np.array(told) == pytest.approx(np.array([[2048, 6144], [1.2, 2.6]]), rel=1e-12)
    with path.open("a") as file:  # or as lines that come again
        file.write(step_line(5, 100.0, 256) + step_line(6, 100.0, 256))
    assert clocks(path, 6) == [(2048 + 512, pytest.approx(1.4))]
    metrics.read()
    assert metrics.curves.along("tokens", np.array([6])) == 2048 + 512


def test_a_step_that_comes_again_later_counts_as_it_came_last(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(step_line(1) + step_line(2))
    metrics = Metrics(path)
    metrics.read()
    for ms, tokens in ((700.0, 3000), (900.0, 2000)):
        with path.open("a") as file:
            file.write(step_line(2, ms, tokens))
        metrics.read()
        told = [metrics.curves.along(clock, np.array([1, 2])).tolist() for clock in ("tokens", "seconds")]
        assert told == [[1000, 1000 + tokens], pytest.approx([0.5, 0.5 + ms / 1000])]
        assert clocks(path, 2) == [(1000 + tokens, pytest.approx(0.5 + ms / 1000))]


def test_tokens_are_whole_numbers(tmp_path: Path) -> None:
    """Whatever time their steps took: of `ms` · `tokens_per_s` that is a product of rounded numbers."""
    path = tmp_path / "metrics.jsonl"
    took = np.random.default_rng(5).uniform(1, 1000, 1000)
    path.write_text("".join(step_line(s, float(ms), 1009) for s, ms in enumerate(took, 1)))
    metrics = Metrics(path)
    metrics.read()
    assert metrics.curves.along("tokens", np.arange(1001)).tolist() == [1009 * s for s in range(1001)]


def test_the_tokens_of_a_real_run_that_went_on(tmp_path: Path) -> None:
    """Every one that was read: 5 steps of 2 x 16, then 3 of 2 batches of 4 x 16."""
    (tmp_path / "my.txt").write_text("the cat sat on the mat and the dog ran to the sea\n" * 200, "utf-8")
    run = tmp_path / "run"
    first = TrainOptions(
        data=(tmp_path / "my.txt",), model="d1", vocab_size=300, out=run, batch_size=2, sequence_length=16, steps=5,
        eval_batches=1, sample_tokens=1,
    )  # fmt: skip
    assert train(first, Laptop()) == 0
    then = TrainOptions.gather({"resume": run, "steps": 8, "batch_size": 4, "total_batch": 128})
    assert train(then, Laptop()) == 0
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    took = [row["ms"] for row in map(json.loads, lines) if "ms" in row]
    at = clocks(run / "metrics.jsonl", 0, 1, 5, 6, 8)
    assert [tokens for tokens, _ in at] == [0, 32, 160, 288, 544]
    assert at[-1][1] == pytest.approx(sum(took) / 1000, rel=1e-12)


def test_lines_that_are_missing_count_and_those_that_say_nonsense_do_not(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    nonsense: tuple[Any, ...] = ("5", -1.0, math.nan, math.inf, 1e300, [1], None)
    path.write_text(step_line(1) + "".join(step_line(2, ms=ms) for ms in nonsense) + line(3) + step_line(4))
    assert clocks(path, 1, 4) == [(1000, 0.5), (4000, 2)]
    path.write_text(step_line(1001) + step_line(1002))  # what was before, in another program, is not known
    assert clocks(path, 1000, 1002) == [(0, 0), (2000, 1)]


def test_a_look_at_lines_here_and_there_knows_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "SURVEY_FROM", 1 << 20)
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.path.write_text("".join(map(step_line, range(1, 20_001))))
    metrics.read(0)
    assert metrics.share < 1
    assert metrics.curves.along("tokens", np.array([20_000])) == pytest.approx(20_000_000, rel=0.01)


def test_a_part_of_an_axis(tmp_path: Path) -> None:
    """Its ends are tokens or seconds; what comes back tells where its steps lie."""
    for name, tokens in (("small", 100), ("large", 400)):
        (tmp_path / name).mkdir()
        rows = "".join(step_line(s, tokens=tokens, val_loss=1.0) for s in range(1, 5001))
        (tmp_path / name / "metrics.jsonl").write_text(rows)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "metrics.jsonl").write_text(line(1))
    names = "small", "large", "none"
    told = board(Runs([tmp_path / n for n in names]), first=40_000, last=80_000, axis="tokens", points=101)
    small, large, none = (row["picture"] for row in told["runs"])
    for picture, tokens in ((small, 100), (large, 400)):
        steps, clock = picture["curves"]["val_loss"]["step"], picture["clock"]
        assert 40_000 // tokens <= steps[0] <= steps[-1] <= 80_000 // tokens
        assert len(steps) == 101 if tokens == 400 else 30 < len(steps) < 101
        assert clock["step"][0] <= steps[0] <= steps[-1] <= clock["step"][-1]
        assert clock["tokens"] == [tokens * s for s in clock["step"]]
        assert clock["seconds"] == [0.5 * s for s in clock["step"]]
        assert len(clock["step"]) <= 104
    assert none["clock"] == {"step": [], "tokens": [], "seconds": []}
    whole = board(Runs([tmp_path / "small"]))["runs"][0]["picture"]["clock"]
    assert (whole["step"][0], whole["step"][-1]) == (0, 5000)
    late = board(Runs([tmp_path / "small"]), first=2400, last=2450, axis="seconds")["runs"][0]["picture"]
    assert late["curves"]["loss"]["step"] == list(range(4800, 4901))


# ---- runs


def test_every_row_is_filled_and_no_file_is_read_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "END", 4000)
    shown, small, large = (run_folder(tmp_path / name, steps) for name, steps in (("a", 5), ("b", 9), ("c", 3000)))
    file = large / "metrics.jsonl"
    with file.open("a") as more:
        more.write('{"step": 3000, "val_loss": 1.5}\n' + line(3001, eta_s=61.5) + '{"step": 3002, "loss": 1')
    runs = Runs([tmp_path])
    read, opened = Metrics.read, list[Path]()
    monkeypatch.setattr(Metrics, "read", lambda self, seconds: opened.append(self.path) or read(self, seconds))

    def rows(*show: Path, seconds: float = math.inf) -> dict[str, Any]:
        return {row["name"]: row for row in board(runs, [*map(str, show)], seconds=seconds)["runs"]}

    told = rows(shown)
    assert set(opened) == {shown / "metrics.jsonl", small / "metrics.jsonl"}
    assert told[str(small)]["numbers"]["step"] == 9
    numbers = told[str(large)]["numbers"]
    assert (numbers["step"], numbers["val_loss"], numbers["eta_s"]) == (3001, 1.5, 61.5)
    assert numbers["loss"] == pytest.approx(10 / 3002)
    assert "picture" not in told[str(large)]
    with file.open("a") as more:
        more.write("}\n")
    assert rows()[str(large)]["numbers"]["step"] == 3002
    kept = file.read_bytes()[:20_000]
    file.write_bytes(kept)
    last = rows()[str(large)]["numbers"]["step"]
    assert last == json.loads(kept.splitlines()[-2])["step"]
    assert rows(large)[str(large)]["picture"]["curves"]["loss"]["step"][-1] == last
    with file.open("a") as more:  # one that was read goes on so, for all its numbers are known
        more.write("\n" + line(9000))
    assert rows()[str(large)]["numbers"]["step"] == 9000
    file.write_text("")
    assert rows()[str(large)]["numbers"] == {"step": 0}
    assert rows(seconds=0)[str(large)]["numbers"] == {"step": 0}  # there was no time: as it was


def test_every_row_has_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a look takes long, as over a network, calls go on where the last one stopped; then no page hurries."""
    folders = [run_folder(tmp_path / name) for name in "abcdefgh"]
    runs = Runs([tmp_path])
    glance = Metrics.glance
    monkeypatch.setattr(Metrics, "glance", lambda self, seconds: time.sleep(0.02) or glance(self, seconds))

    def told(seconds: float = 0.05) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in board(runs, [], seconds=seconds)["runs"]}

    assert [row["read"] for row in told(0).values()] == 8 * [0]  # none had a turn: the page asks again at once
    for count in range(1, 9):
        assert sum("numbers" in row for row in told().values()) >= count
    for folder in folders:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(line(6))
    for _ in range(8):
        rows = told()
        assert not any("read" in row for row in rows.values())
    assert [row["numbers"]["step"] for row in rows.values()] == 8 * [6]
    assert [*rows] == [*runs.all()]


def test_which_runs_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LlmpyError, match="no run here"):
        Runs([])
    for age, name in enumerate(("new", "old", "oldest")):
        run = run_folder(tmp_path / "runs" / name)
        os.utime(run / "metrics.jsonl", (time.time() - 100 - age,) * 2)
    (tmp_path / "runs" / "no run").mkdir()
    runs = Runs([])
    told = board(runs)
    assert [row["name"] for row in told["runs"]] == [os.path.join("runs", n) for n in ("new", "old", "oldest")]
    assert told["chosen"] == [os.path.join("runs", "new")]
    assert "picture" not in told["runs"][1]  # and it was not read
    (tmp_path / "runs" / "old" / "run.lock").write_text(f"{os.getpid()}\n")
    assert board(runs)["chosen"] == [os.path.join("runs", "old")]
    assert board(runs)["runs"][1]["trains"]
    run_folder(tmp_path / "runs" / "begun since")
    assert os.path.join("runs", "begun since") in [row["name"] for row in board(runs)["runs"]]
    both = Runs([Path("runs/oldest"), Path("runs/new")])
    assert board(both)["chosen"] == [os.path.join("runs", n) for n in ("oldest", "new")]
    with pytest.raises(LlmpyError, match="no run folder nothing"):
        Runs([Path("nothing")])


def test_a_run_trains_while_its_process_lives(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    os.utime(run / "metrics.jsonl", (time.time() - 100,) * 2)
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (trains,) = Runs([run]).all().values()
    for holder, expected in (
        (None, False),
        (str(os.getpid()), True),
        (ended.stdout, False),
        ("", False),
        ("x", False),
        ("99999999999", False),  # more than a process id can be
        ("9" * 20, False),
    ):
        (run / "run.lock").unlink(missing_ok=True)
        if holder is not None:
            (run / "run.lock").write_text(holder)
        assert trains.trains() is expected, holder


def test_samples_newest_first(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    text = "".join(f"--- step {n}\n<b>{n}</b>\n\nmore\n\n" for n in range(1, 30))
    (run / "samples.txt").write_text(text + "--- step 30\nhalf wri")
    samples = board(Runs([run]))["runs"][0]["samples"]
    assert samples[0] == {"step": 30, "text": "half wri"}
    assert samples[1] == {"step": 29, "text": "<b>29</b>\n\nmore"}
    assert len(samples) == 8


def test_a_version_that_is_there_is_not_sent_again(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    runs = Runs([run])
    row = board(runs)["runs"][0]
    have = {row["name"]: row["version"]}
    assert "picture" not in board(runs, [row["name"]], have)["runs"][0]
    assert "picture" in board(runs, [row["name"]], have, over=3)["runs"][0]
    assert "picture" in board(runs, [row["name"]], have, axis="tokens")["runs"][0]
    assert "picture" in board(Runs([run]), [row["name"]], have)["runs"][0]  # another server does not know what we have
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line(9))
    again = board(runs, [row["name"]], have)["runs"][0]
    assert again["picture"]["curves"]["loss"]["step"][-1] == 9
    (run / "samples.txt").write_text("--- step 9\nthe\n\n")
    assert "samples" in board(runs, [row["name"]], {row["name"]: again["version"]})["runs"][0]


# ---- server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    run_folder(tmp_path / "runs" / "a")
    (tmp_path / "secret").write_text("secret")
    with Server(Runs([tmp_path / "runs"]), 20_000 + os.getpid() % 20_000) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def ask(server: Server, path: str, host: str = "localhost", method: str = "GET") -> Answer:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)) as connection:
        connection.putrequest(method, path, skip_host=True)
        connection.putheader("Host", host)
        connection.endheaders()
        with connection.getresponse() as answer:
            return Answer(answer.status, dict(answer.getheaders()), answer.read())


def test_it_listens_on_loopback_alone(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.address == f"http://127.0.0.1:{server.server_port}/"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200), ("localhost:9999", 200), ("[::1]:80", 200), ("evil.example", 403), ("", 403),
        ("evil.example:8642", 403), ("localhost.evil.example", 403), ("127.0.0.1.evil.example:80", 403),
        ("evil.example:80@localhost:80", 403),
    ],
)  # fmt: skip
def test_other_hosts_are_refused(server: Server, host: str, status: int) -> None:
    for path in ("/", "/board"):
        answer = ask(server, path, host)
        assert answer.status == status
        assert status == 200 or b"metrics" not in answer.body


@pytest.mark.parametrize(
    "path",
    ["/metrics.jsonl", "/../secret", "/%2e%2e/secret", "//secret", "/page.js", "/runs/a/metrics.jsonl", "/board/", "x"],
)
def test_no_path_leads_to_a_file(server: Server, path: str) -> None:
    answer = ask(server, path)
    assert answer.status in (400, 404)
    assert b"secret" not in answer.body


def test_only_names_that_were_found_are_read(server: Server, tmp_path: Path) -> None:
    run_folder(tmp_path / "other")
    for name in ("../other", str(tmp_path / "other"), "%2e%2e/other", "", "a/../../other"):
        told = json.loads(ask(server, f"/board?show={name}").body)
        assert told["chosen"] == []
        assert not any("picture" in row for row in told["runs"])
    assert all("picture" in row for row in json.loads(ask(server, "/board").body)["runs"])


@pytest.mark.parametrize(
    "query", ["first=x", "last=nan", "over=-1", "first=1e99", "axis=miles", "&".join(["a=1"] * 2000)]
)
def test_questions_that_make_no_sense(server: Server, query: str) -> None:
    assert ask(server, f"/board?{query}").status == 400


def test_headers(server: Server) -> None:
    answer = ask(server, "/")
    told = answer.headers["Content-Security-Policy"]
    assert told.startswith(policy())
    assert "unsafe" not in told
    assert "default-src 'none'" in told
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert answer.body.decode() == page()
    assert ask(server, "/", method="HEAD").body == b""
    assert ask(server, "/", method="POST").status == 501
    assert ask(server, "/favicon.ico").status == 204


def test_the_page_loads_nothing_from_anywhere() -> None:
    text = page({"runs": [], "chosen": ["</script><script>alert(1)</script>", "<!--"]})
    assert "</script><script>alert" not in text
    assert text.count("</script>") == text.count("<script") == 2
    assert "http:" not in text
    assert "https:" not in text
    assert "innerHTML" not in text


def test_a_busy_port_gives_the_next(server: Server, tmp_path: Path) -> None:
    with Server(Runs([tmp_path / "runs"]), server.server_port) as other:
        assert server.server_port < other.server_port < server.server_port + PORTS


def test_no_free_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setattr("llmpy.watch.server.PORTS", 1)
    with pytest.raises(LlmpyError, match="is free — choose another with --port"):
        Server(Runs([tmp_path / "runs"]), server.server_port)


@pytest.mark.skipif(os.name != "posix", reason="Windows sends Ctrl-C to whole consoles")
def test_ctrl_c_ends_it_cleanly(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    process, address = started(str(run), "--port", str(40_000 + os.getpid() % 20_000))
    with urllib.request.urlopen(address + "board") as answer:
        assert json.load(answer)["runs"][0]["numbers"]["step"] == 5
    process.send_signal(signal.SIGINT)
    said, faults = process.communicate(timeout=20)
    assert (process.returncode, said.strip(), faults) == (0, "", "")


def test_nothing_is_written_to_a_run(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (run, *run.iterdir())}
    board(Runs([run]))
    assert before == {p: p.stat().st_mtime_ns for p in (run, *run.iterdir())}


def test_looking_loads_no_kernels() -> None:
    program = (
        "import sys, llmpy.watch.server, llmpy.watch.plot\n"
        "print(sorted({'numba', 'llvmlite', 'matplotlib', 'tokenizers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


def test_seconds_left_that_are_unknown_are_not_told(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    assert "eta_s" not in board(Runs([run]))["runs"][0]["numbers"]
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line(9, eta_s=61.5) + '{"step": 9, "val_loss": 2.5}\n')
    numbers = board(Runs([run]))["runs"][0]["numbers"]
    assert (numbers["eta_s"], numbers["val_loss"], numbers["step"]) == (61.5, 2.5, 9)
    assert math.isclose(numbers["loss"], 1.0)
