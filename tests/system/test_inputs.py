"""A pipe that nobody writes to and a device without end are refused wherever a path is taken, at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.samples import in_memory, with_tokenizer

from llmpy.cli.main import main
from llmpy.data.shards import write_shard
from llmpy.formats import huggingface, native
from llmpy.system.inputs import regular

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of /dev and mkfifo as Linux has them")
COMMANDS = (
    "train --data {bad}",
    "train --data {bad}.bin",
    "train --init {bad} --data {text}",
    "train --config {bad}",
    "train --data {text} --hellaswag {bad}",
    "data {bad}",
    "data {text} --tokenizer {bad}",
    "data tinyshakespeare --tokenizer bytes --source {bad}",
    "data tinystories --tokenizer bytes --source {bad}",
    "data hellaswag --tokenizer bytes --source {bad}",
    "sample {bad}",
    "sample {run} --prompts-file {bad}",
    "convert {bad} {out}",
    "selftest --model {bad} --debug-state {bad}",
    "selftest --model {run} --debug-state {bad}",
)


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """Paths by name; whoever waits longer than ten seconds fails."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("A line of text.\n" * 200)
    native.write_model(tmp_path / "run", with_tokenizer(in_memory(), tmp_path / "tokenizer.json"))
    signal.alarm(10)
    yield {"text": tmp_path / "text.txt", "run": tmp_path / "run", "out": tmp_path / "out"}
    signal.alarm(0)


@pytest.mark.parametrize("kind", ["a pipe", "a device"])
@pytest.mark.parametrize("command", COMMANDS)
def test_refused_at_once(
    words: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, kind: str
) -> None:
    bad = tmp_path / "bad"
    for path in (bad, bad.with_suffix(".bin")):
        os.mkfifo(path) if kind == "a pipe" else path.symlink_to("/dev/zero")
    before = sorted(tmp_path.rglob("*"))
    assert main(command.format(bad=bad, **words).split()) == 1
    error = capsys.readouterr().err
    assert f"{kind}, not a file — save its content" in error
    assert str(bad) in error
    assert sorted(p for p in tmp_path.rglob("*") if "cache" not in p.parts) == before


def test_in_a_folder_they_are_passed_over_or_refused(
    words: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    huggingface.write_model(folder, in_memory(), "float32")
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert main(["convert", str(folder), str(words["out"])]) == 1
    assert "has no model.safetensors" in capsys.readouterr().err
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "train.bin", np.arange(200))
    os.mkfifo(tmp_path / "shards" / "tokenizer.json")
    assert main(["train", "--data", str(tmp_path / "shards"), "-T", "8", "--out", str(words["out"])]) == 1
    assert "tokenizer.json is a pipe" in capsys.readouterr().err


def test_files_folders_and_nothing_are_regular(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", Path(__file__), tmp_path / ("x" * 300)):
        assert regular(path) == path
