"""llm.c's letters: its scripts are accepted, letters without effect here are reported."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.heard import hear

from llmpy.cli import main as cli
from llmpy.model.config import ModelConfig
from llmpy.options.llmc_letters import LETTERS, translated
from llmpy.options.train import TrainOptions

# The commands of llm.c's scripts, without flags for several GPUs.
SCRIPTS = {
    "gpt2_124M": "-i d -v 250 -s 20000 -g 144 -b 64 -t 1024 -d 524288 -r 0 -c 0.1 -l 0.0006 -q 0.0 -u 700 -n 5000 "
    "-e d12 -x -1",
    "gpt2_350M": "-i d -v 250 -s 100000 -g 144 -b 64 -t 1024 -d 524288 -r 0 -c 0.1 -l 0.0003 -q 0.0 -u 700 -n 2000 "
    "-x 60000 -e d24",
    "gpt2_774M": "-i d -v 250 -s 300000 -g 144 -b 32 -t 1024 -d 524288 -r 0 -c 0.1 -l 0.00025 -q 0.0 -u 700 -n 4000 "
    "-x 286102 -e d36",
    "gpt2_1558M": "-i d -v 250 -s 300000 -g 384 -b 16 -t 1024 -d 1048576 -r 0 -c 0.1 -k cosine -l 0.0006 -q 0.1 -u 700 "
    "-n 2000 -x 32000 -e d48",
    "gpt3_125M": "-i d -v 250 -s 20000 -g 144 -b 32 -t 2048 -d 524288 -r 0 -c 0.1 -l 0.0006 -q 0.1 -u 700 -n 10000 "
    "-nk 5 -nm 50000 -sl 7.0 -sg 7.0 -x 572204 -e gpt3:c768",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_recipe_is_the_script_of_that_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = hear(monkeypatch)
    assert cli.main(["train", *SCRIPTS[name].split()]) == 0
    assert cli.main(["train", "--recipe", name, "--data", "d"]) == 0
    script, recipe = heard
    # llm.c's GPUs fit larger batches; without -nk it keeps all
    assert dataclasses.replace(script, batch_size=4, recipe=name, keep=5 if "-nk" in SCRIPTS[name] else 0) == recipe
    assert recipe.sequence_length == ModelConfig.from_dial(recipe.model).context
    assert recipe.micro_steps * recipe.batch_size * recipe.sequence_length == recipe.total_batch


def test_switches_and_letters_without_meaning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard = hear(monkeypatch)
    line = "train -a 1 -y 0 -i a -j b -o out -m -1 -z 1 -ge 1 -f 1 -w 1 -h 0"
    assert cli.main(line.split()) == 0
    assert heard == [TrainOptions(overfit=True, data=(Path("a"),), val=(Path("b"),), out=Path("out"), eval_batches=-1)]
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert all(f"{letter} ({LETTERS[letter]})" in err for letter in ("-z", "-ge", "-f", "-w", "-h"))
    for line, letter in (("-pm 1x", "-pm"), ("-a 2", "-a")):
        with pytest.raises(SystemExit):
            cli.main(["train", *line.split()])
        assert f"unknown argument {letter}" in capsys.readouterr().err


def test_every_letter_is_a_flag_or_a_hint() -> None:
    flags = {flag for action in cli.build_parser()._actions if action.dest == "VERB"
             for flag in action.choices["train"]._option_string_actions}  # type: ignore[index, union-attr]  # fmt: skip
    for letter, meaning in LETTERS.items():
        assert meaning in flags if meaning.startswith("--") else " " in meaning
        assert letter not in flags - {"-h"}, "one of ours"
    assert translated(["train", "-B", "2", "-T", "8", "-h"]) == (["train", "-B", "2", "-T", "8", "-h"], [])
