"""Options in YAML files and recipes; records of runs, also of 0.1.0."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support.heard import hear
from support.refused import refused

from llmpy.cli import main as cli
from llmpy.options.train import TrainOptions
from llmpy.options.yaml_files import RECIPE_NAMES


def test_a_file_of_options_and_flags_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lr: 1e-4\nbatch-size: 8\ndata: [a, b]\nsteps: 7\nshuffle: false\nrecipe: gpt2_350M\n", "utf-8")
    heard = hear(monkeypatch)
    assert cli.main(["train", "--config", str(path), "--steps", "9"]) == 0
    (found,) = heard
    assert (found.lr, found.batch_size, found.steps, found.shuffle, found.model) == (1e-4, 8, 9, False, "d24")
    assert found.data == (Path("a"), Path("b"))
    assert {"lr", "batch_size", "steps"} <= found.given
    record = yaml.safe_load(yaml.safe_dump(found.as_record()))
    assert TrainOptions.from_record(record).as_record() == found.as_record()


def test_print_config_is_such_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--recipe", "gpt3_125M", "--print-config", "--data", "x"]) == 0
    path = tmp_path / "run.yaml"
    path.write_text(capsys.readouterr().out, "utf-8")
    again = TrainOptions.gather({"config": path})
    assert again.as_record() == TrainOptions.gather({"recipe": "gpt3_125M", "data": (Path("x"),)}).as_record()


def test_recipes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    heard = hear(monkeypatch)
    assert {"124M", "350M", "774M", "1558M", "gpt3_125M"} <= set(RECIPE_NAMES)
    assert cli.main(["train", "--recipe", "124M", "--data", "d", "--lr", "1", "-B", "8"]) == 0
    assert (heard[0].lr, heard[0].batch_size, heard[0].warmup) == (1.0, 8, 700)
    assert cli.main(["train", "--recipe", "124M"]) == 1
    assert "--recipe 124M needs --data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("learning_rate: 1", "config.invalid-option", "'learning_rate'"),
        ("lr: fast", "config.invalid-option", "'fast'"),
        ("steps: 1.5", "config.invalid-option", "steps: 1.5"),
        ("shuffle: 1", "config.invalid-option", "shuffle: 1"),
        ("- a", "config.no-options", "run.yaml"),
        ("a: [", "config.not-yaml", "run.yaml"),
        ("schedule: step", "option.invalid", "--schedule step"),
        (None, "file.missing", "run.yaml"),
    ],
)
def test_files_with_errors(tmp_path: Path, text: str | None, code: str, named: str) -> None:
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text, "utf-8")
    with refused(code, named):
        TrainOptions.gather({"config": path})


def test_records_of_an_older_version() -> None:
    record = TrainOptions(steps=3).as_record()
    old = record | {"give_up_after": 5, "recompute_layers": None, "keep_every": 0}
    assert TrainOptions.from_record(old) == TrainOptions(steps=3)
    with refused("option.removed", "--keep-every 100"):
        TrainOptions.from_record(old | {"keep_every": 100})


def test_a_total_that_batches_do_not_fill() -> None:
    with refused("option.total-batch", "--total-batch 512"):
        _ = TrainOptions(total_batch=500).micro_steps
    assert TrainOptions(total_batch=2048).micro_steps == 4
    assert TrainOptions().micro_steps == 1
    assert TrainOptions(steps=-1, total_batch=512).settled(64, 10_000).steps == 19
