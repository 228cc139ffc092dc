"""Options in YAML files and recipes; records of runs, also of 0.1.0."""

from __future__ import annotations

import re
import time
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from support.heard import hear
from support.refused import refused

from llmpy.cli import main as cli
from llmpy.errors import LlmpyError
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
        ("seed: 1\nlr: fast", "config.invalid-option", "run.yaml, line 2: option lr: fast is not a number"),
        ("steps: 1.5", "config.invalid-option", "steps: 1.5"),
        ("steps: .inf", "config.invalid-option", "steps: .inf is not a whole number"),
        ("steps: 2026-11-28", "config.invalid-option", "steps: 2026-11-28 is not a whole number"),
        ("shuffle: 1", "config.invalid-option", "shuffle: 1 is not yes or no"),
        ("steps: true", "config.invalid-option", "steps: true"),
        ("schedule: ~", "config.invalid-option", "schedule: an empty value is not a text"),
        ("lr: [1]", "config.invalid-option", "lr: a list is not a number"),
        ("prompt: [a]", "config.invalid-option", "prompt: a list is not a text"),
        ("out: {a: 1}", "config.invalid-option", "out: a nested value is not a path"),
        ("out: ''", "config.invalid-option", "out: an empty value"),
        ("data: []", "config.invalid-option", "data: an empty value"),
        ("data: [a, null]", "config.invalid-option", "data: an empty value"),
        ("data: [[a]]", "config.invalid-option", "data: a nested value is not a path"),
        ("lr: $LR", "config.invalid-option", "lr: $LR is not a number"),
        ("lr: !!binary aGVs", "config.invalid-option", "option lr"),
        ("lr: !!python/name:os.system ''", "config.invalid-option", "option lr"),
        ("prompt: !!set {a}", "config.invalid-option", "option prompt"),
        ("lr: 1\nseed: 1\nlr: 2", "config.invalid-option", "line 3: option lr is given twice"),
        ("batch-size: 1\nbatch_size: 2", "config.invalid-option", "option batch_size is given twice"),
        ("config: other.yaml", "config.invalid-option", "another"),
        ("? [a]\n: b", "config.invalid-option", "unknown option"),
        ("<<: {lr: 1}", "config.invalid-option", "'<<'"),
        ("- a", "config.no-options", "run.yaml"),
        ("", "config.no-options", "run.yaml"),
        ("# lr: 1\n", "config.no-options", "run.yaml"),
        ("lr", "config.no-options", "NAME: VALUE"),
        ("a: [", "config.not-yaml", "run.yaml"),
        ("seed: 1\n\tlr: 1", "config.not-yaml", "run.yaml, line 2, column 1 is not YAML"),
        ("lr: 1\n---\nlr: 2", "config.not-yaml", "line 2"),
        ("lr: 1\n  seed: 2", "config.not-yaml", "line 2"),
        ("lr: \x00", "config.not-yaml", "run.yaml"),
        (bytes(range(256)), "config.not-yaml", "run.yaml"),
        (b"lr: 1 # caf\xe9", "config.not-yaml", "run.yaml"),
        ("data: " + "[" * 60_000, "config.not-yaml", "too deep"),
        ("data: " + "[[]," * 20_000, "config.not-yaml", "too deep"),
        ("- " * 60_000, "config.not-yaml", "too deep"),
        ("a: &a [x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(9)), "config.invalid-option", "'a'"),
        ("lr: &a [*a]", "config.invalid-option", "lr"),
        ("lr: 1\n" * 30_000, "config.not-yaml", "too long"),
        ("schedule: step", "config.invalid-option", "run.yaml, line 1: --schedule step"),
        ("track: none", "config.invalid-option", "--track none"),
        ("track: [wandb, off]", "config.invalid-option", "--track off"),
        ("recipe: ../../x", "config.invalid-option", "run.yaml, line 1: --recipe ../../x"),
        ("lr: 1\nbatch_size: -2", "config.invalid-option", "run.yaml, line 2: --batch-size -2"),
        ('prompt: "\\ud83d"', "config.invalid-option", "line 1: option 'prompt' has half a surrogate pair"),
        *[
            (f"{name}: {value}", "config.invalid-option", f"option {name}: ")
            for name, value in (
                ("init", r'"a\0b"'),
                ("model", r'"./a\x00.bin"'),
                ("data", r'[x, "a\0"]'),
                ("out", r'"\0"'),
                ("val", r'"a\u0000"'),
                ("hellaswag", r'"a\0b"'),
                ("resume", r'"a\0b"'),
            )
        ],
        (None, "file.missing", "run.yaml"),
    ],
)
def test_files_with_errors(tmp_path: Path, text: str | bytes | None, code: str, named: str) -> None:
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with refused(code, named) as caught:
        TrainOptions.gather({"config": path})
    assert text is None or not re.search("yaml\\.|tuple|None|<class|PosixPath|codec|while scanning", str(caught.value))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a: &a [x]\n" + "".join(f"{b}: &{b} [{f'*{a},' * 9}]\n" for a, b in pairwise("abcdefghijk")), "line 1"),
        ("data: &a [x,x]\n" + "".join(f"{b}: &{b} {{<<: [{f'*{a},' * 9}]}}\n" for a, b in pairwise("abcdefgh")), "'b'"),
        ("lr: " + "{a: " * 40_000, "too deep"),
        ("data: " + "{? " * 40_000, "too deep"),
        ("".join(f"{'  ' * i}a:\n" for i in range(350)), "too deep"),
        ("lr: 1" + ":59" * 40_000, "lr: "),
        ("steps: " + "9" * 120_000, "steps: "),
        ("prompt: |\n" + " \n" * 60_000 + "\tx\n- ", "run.yaml"),
        ("lr: *" + "a" * 120_000, "run.yaml"),
        ("? " * 60_000, "too deep"),
        ("prompt: " + "'\n" * 60_000, "run.yaml"),
        ("lr: !<" + "%41" * 40_000 + "> 1", "run.yaml"),
        ("\n".join(f"&a{i} x: *a{i}" for i in range(6_000)), "'x'"),
    ],
    ids=range(13),
)
def test_short_files_that_would_take_long(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    start = time.process_time()
    with pytest.raises(LlmpyError, match=re.escape(named)) as caught:
        TrainOptions.gather({"config": tmp_path / "run.yaml"})
    assert caught.value.code in ("config.not-yaml", "config.invalid-option")
    assert len(str(caught.value)) < 400
    assert time.process_time() - start < 15  # 40 s and more, or for ever


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("data: 2024", "data", (Path("2024"),)),
        ("data: [12:30, 0123, 1_000, 1.50, yes]", "data", tuple(map(Path, ("12:30", "0123", "1_000", "1.50", "yes")))),
        ("out: 20241128", "out", Path("20241128")),
        ('{"prompt": "\\ud83d\\ude42"}', "prompt", "\U0001f642"),  # JSON
        ("out: 2024-11-28", "out", Path("2024-11-28")),
        ("out: ~/x", "out", Path("/home/of/me/x")),
        ("out: ~", "out", None),
        ("out: $HOME/x", "out", Path("$HOME/x")),
        ("data: [a, ~/x]", "data", (Path("a"), Path("/home/of/me/x"))),
        ("init: ~/m", "init", "/home/of/me/m"),
        ("model: ~/m.bin", "init", "/home/of/me/m.bin"),
        ("out: ~nobody-here/x", "out", Path("~nobody-here/x")),
        ("prompt: ~/x", "prompt", "~/x"),
        ("prompt: no", "prompt", "no"),
        ("prompt: 'null'", "prompt", "null"),
        ("prompt: 12", "prompt", "12"),
        ("prompt: ''", "prompt", ""),
        ("lr: 1e-4", "lr", 1e-4),
        ("lr: '1e-4'", "lr", 1e-4),
        ("steps: 1e3", "steps", 1000),
        ("steps: -1", "steps", -1),
        ("seed: 4294967295", "seed", 4294967295),
        ("shuffle: No", "shuffle", False),
        ("overfit: on", "overfit", True),
        ("track: wandb", "track", ("wandb",)),
        ("steps: &x 1\nseed: *x", "seed", 1),
        (b"\xef\xbb\xbflr: 1", "lr", 1.0),
        ("lr: 1".encode("utf-16"), "lr", 1.0),
        (b"lr: 1\r\nseed: 2\r\n", "lr", 1.0),
    ],
)
def test_values_as_they_are_written(
    tmp_path: Path, text: str | bytes, name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/of/me")
    monkeypatch.setenv("USERPROFILE", "/home/of/me")
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = TrainOptions.gather({"config": path})
    assert getattr(found, name) == value
    record = yaml.safe_load(yaml.safe_dump(found.as_record()))
    assert getattr(TrainOptions.from_record(record), name) == value or name == "out"


def test_home_in_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/me")
    monkeypatch.setenv("USERPROFILE", "/home/of/me")
    monkeypatch.chdir(tmp_path)
    heard = hear(monkeypatch)
    words = ["--data=~/x", "--init=~/m", "--out=~nobody-here/o", "--prompt=~/p"]
    assert cli.main(["train", *words]) == 0
    (o,) = heard
    assert (o.data, o.init, o.out, o.prompt) == (
        (Path("/home/of/me/x"),),
        "/home/of/me/m",
        Path("~nobody-here/o"),
        "~/p",
    )
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "x").touch()  # the file of this name is meant
    assert cli.main(["train", "--data=~/x"]) == 0
    assert heard[1].data == (Path("~/x"),)


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
