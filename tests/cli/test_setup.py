"""Fine-tuning GPT-2 after `make setup` needs no network, tested against a local server.

It serves a small model and text at the addresses of the real ones.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.laptop import Laptop
from support.network import network, stands_for
from support.samples import in_memory, with_tokenizer

from llmpy import backend, formats
from llmpy.cli import main as cli
from llmpy.data import datasets, user_data
from llmpy.formats import huggingface
from llmpy.model.config import ModelConfig
from llmpy.run import checkpoint

ROOT = Path(__file__).parents[2]
FILES = {"main", "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}  # main: their list
CONFIG = ModelConfig(layers=2, heads=2, channels=16, context=64, vocab_size=257)
TEXT = "".join(f"Citizen {i}:\nSpeak, number {i * i}, before we proceed any further.\n\n" for i in range(1500))


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serve the files; return the paths of all requests."""
    huggingface.write_model(tmp_path / "served", with_tokenizer(in_memory(CONFIG), tmp_path / "bytes.json"), "float32")
    files = {f"/openai-community/gpt2/resolve/main/{p.name}": p.read_bytes() for p in (tmp_path / "served").iterdir()}
    files["/text"] = TEXT.encode()
    with network(files, tmp_path / "hub", monkeypatch) as (here, found):
        monkeypatch.setenv("LLMPY_CACHE_DIR", str(tmp_path / "models"))
        monkeypatch.chdir(tmp_path)
        stands_for(monkeypatch, datasets, "SHAKESPEARE", f"{here}/text", files["/text"])
        for module in (user_data, formats.source):
            monkeypatch.setattr(module, "GPT2_VOCAB", CONFIG.vocab_size)
        monkeypatch.setattr(backend, "load", lambda *_, **__: Laptop())
        yield found


def run(line: str) -> None:
    assert cli.main(shlex.split(line)) == 0


def test_setup_then_fine_tuning_without_the_network(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = (ROOT / "Makefile").read_text("utf-8").split("\nsetup:")[1].split("\n\n")[0]
    for line in re.findall(r"\$\(BIN\)/llmpy (.*)", recipe):
        run(line)
    capsys.readouterr()
    fetched = {path.rpartition("/")[2] for path in asked}
    assert fetched == {"text", *FILES}
    asked.clear()
    run("train --init gpt2 --data tinyshakespeare -B 4 -T 64 --steps 40 --out run")
    assert asked == []
    assert "40/40" in capsys.readouterr().out
    rows = [json.loads(row) for row in Path("run/metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert checkpoint.read_header(Path("run/model.safetensors")).config == CONFIG
    run("sample run --prompt Citizen --tokens 5")


def test_fine_tuning_downloads_its_files(asked: list[str]) -> None:
    run("train --init gpt2 --data tinyshakespeare -B 4 -T 64 --steps 2 --out run")
    assert {path.rpartition("/")[2] for path in asked} == {"text", *FILES}
