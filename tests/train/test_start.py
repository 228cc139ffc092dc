"""The starting point of a run: its size, absolute paths, and the report of changed options."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.laptop import Laptop
from support.refused import refused

from llmpy.errors import LlmpyError
from llmpy.model.config import ModelConfig
from llmpy.options.train import DEFAULT_MODEL, TrainOptions
from llmpy.run.folder import RunFolder, read_config
from llmpy.run.journal import Journal
from llmpy.train.assemble import assemble
from llmpy.train.start import RunStart, anywhere, changed, check_more, dial, resolve


def test_a_model_that_agrees_may_be_named() -> None:
    gpt2 = ModelConfig.from_dial("gpt2")
    for named in ("gpt2", "d12", ""):
        assert dial(named, gpt2) == (named or "d12")
    assert dial("", None) == "d3"
    assert dial("d6", None) == "d6"
    with refused("option.conflict", "--model d6", "--init"):
        dial("d6", gpt2)


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = anywhere(TrainOptions(data=(Path("a.txt"),), init="model", hellaswag=Path("h.bin")))
    assert (found.data, found.init, found.hellaswag) == ((tmp_path / "a.txt",), f"{tmp_path}/model", tmp_path / "h.bin")
    found = anywhere(TrainOptions(data=(Path("tinyshakespeare"),), init="gpt2"))
    assert (found.data, found.init) == ((Path("tinyshakespeare"),), "gpt2")


def test_changes_are_reported() -> None:
    before = TrainOptions(batch_size=2, sequence_length=16, total_batch=64)
    assert list(changed(before, before)) == []
    batches, lr = changed(before, replace(before, total_batch=128, threads=3, lr=1e-4))
    assert batches.startswith("4 micro-batches per step instead of 2: ")
    assert lr.startswith("lr is 0.0001 instead of unset")
    (ranks,) = changed(before, replace(before, ranks=2))
    assert ranks.startswith("2 ranks instead of 1: ")


def test_fewer_steps_than_trained() -> None:
    fewer = TrainOptions(steps=5, given=frozenset({"steps"}))
    check_more(fewer, fewer, 5)
    check_more(TrainOptions(steps=5), fewer, 7)  # not given now
    with refused("resume.fewer-steps", "--steps 5 ", "7 steps"):
        check_more(fewer, fewer, 7)


def half_way(*_: object) -> None:
    raise LlmpyError("test.half-way", "half way")


def test_a_new_run_writes_its_config_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before data are read: it can be resumed if killed from then on."""
    folder = RunFolder.open(tmp_path / "run", "")
    start = resolve(TrainOptions(), folder, print)
    assert (start.source, start.checkpoint, start.done, start.elapsed) == (None, None, 0, 0.0)
    monkeypatch.setattr(RunStart, "read_data", half_way)
    with Journal() as journal, refused("test.half-way"):
        assemble(TrainOptions(), folder, journal, Laptop())
    assert start.options.model == read_config(tmp_path / "run" / "config.json")["model"] == DEFAULT_MODEL
    folder.discard()
    (tmp_path / "config.json").write_text(json.dumps({}))
    with refused("run.bad-config", tmp_path / "config.json"):
        read_config(tmp_path / "config.json")
