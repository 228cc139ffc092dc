"""Model files round-trip bitwise; an invalid file is one error, and no file is half-written."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.laptop import TINY, Laptop, tiny_model
from support.refused import refused

from llmpy.errors import LlmpyError
from llmpy.model.gpt2 import GPT2
from llmpy.run import checkpoint
from llmpy.system import durable


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A valid model file."""
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, tiny_model(), 8)
    return path


def test_round_trip_to_the_bit(saved: Path) -> None:
    header = checkpoint.read_header(saved)
    assert header == checkpoint.Header(TINY, 8)
    model = GPT2(header.config, Laptop())
    checkpoint.load_parameters(saved, model.params)
    assert np.array_equal(model.params.buffer, tiny_model().params.buffer)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


GOOD = {"format": checkpoint.FORMAT, "config": asdict(TINY), "trained_length": 8}


@pytest.mark.parametrize(
    ("about", "name"),
    [
        (None, ""),
        ("{", "header"),
        (GOOD | {"format": 2}, "format 2"),
        (GOOD | {"config": {"layers": 2}}, "header"),
        (GOOD | {"config": asdict(TINY) | {"heads": "x"}}, "header"),
        (GOOD | {"config": asdict(replace(TINY, channels=16))}, "('F32', "),
        (GOOD | {"trained_length": 17}, "17"),
    ],
)
def test_a_wrong_header(saved: Path, about: Any, name: str) -> None:
    text = about if isinstance(about, str) else json.dumps(about)
    save_file(load_file(saved), saved, {checkpoint.KEY: text} if about else None)
    with refused("file.corrupt" if about else "model.not-llmpy", saved, name):
        checkpoint.read_header(saved)


def test_tensors_missing_unknown_or_of_another_type(saved: Path) -> None:
    good = load_file(saved)
    for bad in (
        {k: v for k, v in good.items() if k != "wpe"},
        good | {"extra": np.zeros(1, np.float32)},
        good | {"wpe": good["wpe"].astype(np.float16)},
        good | {"wpe": np.ascontiguousarray(good["wpe"].T)},
    ):
        save_file(bad, saved, {checkpoint.KEY: json.dumps(GOOD)})
        with refused("file.corrupt", saved):
            checkpoint.read_header(saved)


def test_no_file_or_a_folder(tmp_path: Path) -> None:
    for path, code in ((tmp_path / "model.safetensors", "model.missing"), (tmp_path, "file.corrupt")):
        with refused(code, path):
            checkpoint.read_header(path)


def test_a_failed_write_leaves_what_was_there(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()
    monkeypatch.setattr(durable.os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(LlmpyError, match="No space left"):
        checkpoint.save(saved, tiny_model(), 8)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
    with pytest.raises(LlmpyError, match="none"):
        checkpoint.save(saved.parent / "none" / "model.safetensors", tiny_model(), 8)
