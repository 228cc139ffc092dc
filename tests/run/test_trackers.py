"""Trackers get the numbers; a missing one is refused before a run, a failing one does not end it."""

from __future__ import annotations

import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from support.laptop import AtOnce, Laptop
from support.refused import refused

from llmpy.options.train import TrainOptions
from llmpy.run import checkpoint_writer, trackers
from llmpy.train import assemble
from llmpy.train.preflight import check
from llmpy.train.start import RunStart


class Fake(types.ModuleType):
    """wandb and trackio have the same three functions, TensorBoard a writer."""

    def __init__(self, name: str, fails: bool = False) -> None:
        super().__init__(name)
        self.seen: list[Any] = []
        self.fails = fails
        self.close = self.finish

    def SummaryWriter(self, folder: str, purge_step: int | None) -> Fake:  # noqa: N802, its name
        self.init(folder=folder, purge_step=purge_step)
        return self

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.log({name: value}, step)

    def init(self, **settings: Any) -> None:
        self.seen.append(("init", settings))

    def log(self, numbers: dict[str, float], step: int) -> None:
        if self.fails:
            raise ConnectionError("no network")
        self.seen.append((step, numbers))

    def finish(self) -> None:
        self.seen.append("finish")


@pytest.mark.parametrize("name", trackers.PACKAGES)
def test_numbers_arrive(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(name)
    monkeypatch.setitem(sys.modules, trackers.PACKAGES[name], fake)
    said: list[str] = []
    opened = trackers.Trackers([name], tmp_path, {"lr": 0.1}, said.append)
    opened.log(3, {"step": 3, "loss": 1.5, "skipped": "why"})
    opened.close()
    (_, settings), *rest = fake.seen
    assert rest == [(3, {"loss": 1.5}), "finish"]
    if name == "tensorboard":
        assert settings == {"folder": str(tmp_path / "events"), "purge_step": None}
    else:
        assert (settings["project"], settings["name"], settings["config"]) == ("llmpy", tmp_path.name, {"lr": 0.1})
    assert said == []


def test_one_that_fails_is_disabled_with_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Fake("wandb", fails=True))
    said: list[str] = []
    opened = trackers.Trackers(["wandb"], tmp_path, {}, said.append)
    for step in range(3):
        opened.log(step, {"loss": 1.0})
    opened.close()
    assert len(said) == 1 and "wandb" in said[0] and "ConnectionError: no network" in said[0]


def test_one_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with refused("package.missing", "--track trackio", "pip install trackio"):
        check(RunStart(TrainOptions(track=("trackio",))), tmp_path, Laptop())


def test_tensorboard_purges_repeated_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake("tensorboardX")
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    data = tmp_path / "text.txt"
    data.write_text("the cat sat on the mat and the dog ran to the sea\n" * 100, "utf-8")
    options = TrainOptions(
        data=(data,), out=tmp_path / "run", model="d1", batch_size=2, sequence_length=16, steps=9, eval_every=2,
        eval_batches=1, sample_tokens=1, checkpoint_every=4, track=("tensorboard",), keep=0,
    )  # fmt: skip
    monkeypatch.setattr(checkpoint_writer, "Thread", AtOnce)
    assert assemble.train(options, Laptop()) == 0
    whole, fake.seen = steps(fake.seen), []
    for step in (8, 9):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08}")
    assert assemble.train(TrainOptions(resume=tmp_path / "run"), Laptop()) == 0
    assert fake.seen[0] == ("init", {"folder": str(tmp_path / "run" / "events"), "purge_step": 5})
    assert steps(fake.seen, after=4) == [(step, name) for step, name in whole if step > 4]


def steps(seen: list[Any], after: int = 0) -> list[tuple[int, str]]:
    """Steps and names of the logged numbers."""
    return [(call[0], *call[1]) for call in seen if isinstance(call[0], int) and call[0] > after]
