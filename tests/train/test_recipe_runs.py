"""Recipes, files of options and llm.c's letters: three ways to say the same."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
import yaml

from llmpy.cli import main as cli
from llmpy.errors import LlmpyError
from llmpy.model.config import ModelConfig
from llmpy.options.recipes import RECIPES
from llmpy.options.train import TrainOptions

# The lines of llm.c's scripts, but for what is about several GPUs.
SCRIPTS = {
    "gpt2_124M": "-i d -v 250 -s 20000 -g 144 -b 64 -t 1024 -d 524288 -r 0 -c 0.1 -l 0.0006 -q 0.0 -u 700 -n 5000 "
    "-e d12",
    "gpt2_350M": "-i d -v 250 -s 100000 -g 144 -b 64 -t 1024 -d 524288 -r 0 -c 0.1 -l 0.0003 -q 0.0 -u 700 -n 2000 "
    "-x 60000 -e d24",
    "gpt2_774M": "-i d -v 250 -s 300000 -g 144 -b 32 -t 1024 -d 524288 -r 0 -c 0.1 -l 0.00025 -q 0.0 -u 700 -n 4000 "
    "-x 286102 -e d36",
    "gpt2_1558M": "-i d -v 250 -s 300000 -g 384 -b 16 -t 1024 -d 1048576 -r 0 -c 0.1 -k cosine -l 0.0006 -q 0.1 -u 700 "
    "-n 2000 -x 32000 -e d48",
    "gpt3_125M": "-i d -v 250 -s 20000 -g 144 -b 32 -t 2048 -d 524288 -r 0 -c 0.1 -l 0.0006 -q 0.1 -u 700 -n 10000 "
    "-nk 5 -nm 50000 -sl 7.0 -sg 7.0 -x 572204 -e gpt3:c768",
}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[TrainOptions]:
    """Options that `llmpy train` would have run with."""
    seen: list[TrainOptions] = []

    def remember(options: TrainOptions) -> int:
        """Train."""
        seen.append(options)
        return 0

    monkeypatch.setattr(cli, "train", remember)
    return seen


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_recipe_is_the_script_of_that_name(told: list[TrainOptions], name: str) -> None:
    assert cli.main(["train", *shlex.split(SCRIPTS[name])]) == 0
    assert cli.main(["train", "--recipe", name, "--data", "d", *(["-x", "-1"] if name == "gpt2_124M" else [])]) == 0
    script, recipe = told
    ours = {"batch_size": 4, "recipe": name, "keep": 0 if name != "gpt3_125M" else 5}
    if name == "gpt2_124M":
        ours["steps"] = -1
    assert dataclasses.replace(script, **ours) == recipe
    config = ModelConfig.from_dial(recipe.model)
    assert recipe.sequence_length == config.context
    assert recipe.micro_steps * recipe.batch_size * recipe.sequence_length == recipe.total_batch


def test_short_names_and_what_a_recipe_needs(told: list[TrainOptions], capsys: pytest.CaptureFixture[str]) -> None:
    assert {"124M", "350M", "774M", "1558M"} <= set(RECIPES)
    assert cli.main(["train", "--recipe", "124M", "--data", "d", "--lr", "1", "-B", "8"]) == 0
    assert (told[0].lr, told[0].batch_size, told[0].warmup) == (1.0, 8, 700)
    assert cli.main(["train", "--recipe", "124M"]) == 1
    assert "--recipe 124M needs --data" in capsys.readouterr().err
    assert TrainOptions(steps=-1, total_batch=512).settled(64, 10_000).steps == 19


def test_letters_that_take_a_number_and_those_without_meaning(
    told: list[TrainOptions], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(shlex.split("train -a 1 -y 0 -i a -j b -o out -m -1 -z 1 -ge 1 -f 1 -w 1 -h 0")) == 0
    assert told == [TrainOptions(overfit=True, data=(Path("a"), Path("b")), out=Path("out"), eval_batches=-1)]
    assert "note: passed over, as without effect here: -z (ZeRO-1 is on where " in (err := capsys.readouterr().err)
    assert err.count("\n") == 1
    assert "-f (use --dtype), " in err
    assert err.endswith("-h (use --hellaswag FILE)\n")
    for letter in ("-pn", "-pm"):  # a word is no number
        with pytest.raises(SystemExit):
            cli.main(["train", letter, "tcp"])
        assert f"unknown argument {letter} — use --ranks N, or mpiexec (" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", "-a", "2"])
    assert "use 0 or 1, not '2'" in capsys.readouterr().err


def test_a_file_of_options_flags_win_and_it_prints_itself(
    told: list[TrainOptions], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lr: 1e-4\nbatch-size: 8\ndata: [a, b]\nsteps: 7\nshuffle: false\nrecipe: gpt2_350M\n", "utf-8")
    assert cli.main(["train", "--config", str(path), "--steps", "9"]) == 0
    (found,) = told
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rate: 1", "unknown option 'learning_rate'"),
        ("stepz: 1", "did you mean steps?"),
        ("lr: fast", "option lr: 'fast' is no float"),
        ("steps: 1.5", "option steps: 1.5 is no int"),
        ("steps: true", "is no int"),
        ("shuffle: 1", "is no bool"),
        ("- a", "holds no options"),
        ("a: [", "is no YAML"),
        ("schedule: step", "--schedule step"),
    ],
)
def test_files_that_say_what_nobody_understands(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(LlmpyError) as caught:
        TrainOptions.gather({"config": path})
    assert said in str(caught.value)
    with pytest.raises(LlmpyError, match="cannot read .*none.yaml: No such file"):
        TrainOptions.gather({"config": tmp_path / "none.yaml"})


@pytest.mark.parametrize(
    ("total", "said"), [(500, "use --total-batch 512, or another -B"), (1, "use --total-batch 512")]
)
def test_a_total_that_batches_do_not_fill(total: int, said: str) -> None:
    with pytest.raises(LlmpyError, match=said):
        _ = TrainOptions(total_batch=total).micro_steps
    assert TrainOptions(total_batch=2048).micro_steps == 4
    assert TrainOptions().micro_steps == 1
