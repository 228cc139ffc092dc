"""Trackers are told the numbers; one that is missing is named before a run, one that fails does not end it."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from laptop import Laptop

from llmpy import preflight, trackers
from llmpy.errors import LlmpyError
from llmpy.options import TrainOptions


class Fake(types.ModuleType):
    """wandb and trackio have the same three functions, TensorBoard a writer."""

    def __init__(self, name: str, fails: bool = False) -> None:
        super().__init__(name)
        self.seen: list[Any] = []
        self.fails = fails
        fake = self

        class SummaryWriter:
            def __init__(self, folder: str) -> None:
                fake.seen.append(("init", {"folder": folder}))

            def add_scalar(self, name: str, value: float, step: int) -> None:
                fake.log({name: value}, step)

            def close(self) -> None:
                fake.finish()

        self.SummaryWriter = SummaryWriter

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
        assert settings == {"folder": str(tmp_path / "events")}
    else:
        assert (settings["project"], settings["name"], settings["config"]) == ("llmpy", tmp_path.name, {"lr": 0.1})
    assert said == []


def test_one_that_fails_is_told_once_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Fake("wandb", fails=True))
    said: list[str] = []
    opened = trackers.Trackers(["wandb"], tmp_path, {}, said.append)
    for step in range(3):
        opened.log(step, {"loss": 1.0})
    opened.close()
    assert said == ["warning: wandb fails and is told no more: ConnectionError: no network"]


def test_one_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(LlmpyError, match="--track trackio needs the package trackio — pip install trackio"):
        trackers.package("trackio")
    found = preflight.problems(TrainOptions(track=("trackio",)), tmp_path, Laptop())
    assert [str(f) for f in found] == ["--track trackio needs the package trackio — pip install trackio"]
