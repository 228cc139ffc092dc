"""Model cards of exported runs and models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.samples import in_memory

from llmpy.cli.main import main
from llmpy.formats import llmc, open_model
from llmpy.formats.model_card import commands, model_card

FINISHED = Path(__file__).parents[1] / "fixtures" / "0.1.0" / "finished"


@pytest.mark.parametrize(
    ("model", "step", "loss"),
    [("", 8, "5.1361"), ("checkpoints/step-00000004", 4, "5.3961"), ("best.safetensors", 8, "5.1361")],
)
def test_a_card_says_what_its_run_recorded(tmp_path: Path, model: str, step: int, loss: str) -> None:
    assert main(["convert", str(FINISHED / model), str(tmp_path / "m")]) == 0
    card = (tmp_path / "m" / "README.md").read_text("utf-8")
    for line in (
        "# finished",
        "| base model | init |",
        "| train data | train.bin (1,783 tokens, blake2b 909e283e0994253d3e1f75f95d890d63) |",
        f"| steps | {step}{' (lowest validation loss)' * model.startswith('best')} |",
        f"| validation loss (nats per token) | {loss} |",
    ):
        assert line in card.splitlines(), line
    command = next(line for line in card.splitlines() if line.startswith("| command |"))
    assert command.startswith("| command | llmpy train --data text.txt --init init --batch-size 2 ")
    assert "--dtype float32" in command and not any(x in card for x in ("--prompt", "--give-up", "--keep-every"))
    assert "/tmp" not in card and "| text |" not in card


def test_training_may_be_ahead_of_its_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(FINISHED, run)
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    card = model_card(open_model(run))
    assert "| steps | 4 |" in card and "5.3961" in card and "5.1361" not in card
    shutil.rmtree(run / "checkpoints")
    assert "| steps | 8 |" in model_card(open_model(run))
    about = {name: config()[name] for name in ("llmpy", "options")}  # a start that was refused after it wrote this
    (run / "config.json").write_text(json.dumps(about), "utf-8")
    assert "| command |" not in model_card(open_model(run))


def config(**options: object) -> dict[str, Any]:
    about = json.loads((FINISHED / "config.json").read_text("utf-8"))
    return dict(about | {"options": about["options"] | {"init": None} | options})


def test_commands_of_starts() -> None:
    about = config(prompt="-x")
    first = {"step": 0, "ranks": 2, **{name: about[name] for name in ("llmpy", "options", "machine")}}
    more = first | {"step": 4, "ranks": 1, "options": first["options"] | {"lr": 0.0012345678901234567}}
    made = [line for _, line in commands(about | {"starts": [first, more]}, "-r")]
    assert "train --out=-r " in made[0] and " --ranks 2" in made[0] and " --prompt=-x" in made[0]
    assert made[1] == "llmpy train --resume=-r --lr 0.0012345678901234567"


def test_commands_of_paths_like_flags() -> None:
    ((_, line),) = commands(config(data=["/a/-a.txt", "/a/b.txt"]), "b")
    assert "--data ./-a.txt b.txt " in line


def test_commands_without_a_file_to_start_from() -> None:
    ((_, line),) = commands(config(init="/a/runs/b/start.safetensors"), "b")
    assert line == ""
    ((_, line),) = commands(config(init="/a/lc", init_state=True), "b")
    assert line.startswith("llmpy train --resume lc --data ") and "init" not in line
    for path, name in (("/a/b/model.safetensors", "b/model.safetensors"), ("/a/b/checkpoints/step-00000010", None)):
        ((_, line),) = commands(config(init=path), "c")
        assert f"--init {name or path[3:]} " in line


def test_hub_names_and_odd_runs(tmp_path: Path) -> None:
    run = tmp_path / "a|b"
    shutil.copytree(FINISHED, run)
    about = json.loads((run / "config.json").read_text("utf-8"))
    about["options"] |= {"init": "org/small.1", "prompt": "a\n| <b>", "shuffle": False, "data": None}
    (run / "config.json").write_text(json.dumps(about), "utf-8")
    (run / "metrics.jsonl").write_text('{"step": 3, "loss": 1.5}\n[1]\n{"step": 4, "lo', "utf-8")
    card = model_card(open_model(run))
    assert 'base_model: "org/small.1"' in card and "| text | the documentation of Python and NumPy |" in card
    assert "--init org/small.1" in card and "--no-shuffle" in card and "'a \\| &lt;b>'" in card
    assert "# a\\|b" in card and "| steps | 8 |" in card and "| 1.5000 |" in card and "validation loss" not in card
    llmc.write_model(tmp_path / "x.bin", in_memory(), "float32")
    assert "# x.bin" in model_card(open_model(tmp_path / "x.bin"))
