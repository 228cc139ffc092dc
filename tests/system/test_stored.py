"""Reads are continued when they return few bytes; a file that shrinks or fails under its reader gives one error."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.laptop import TINY, Laptop, tiny_model
from support.refused import refused

from llmpy.data.hellaswag import Example, read_examples, write_examples
from llmpy.data.loader import Loader
from llmpy.data.shards import mask_path, open_shard, write_shard
from llmpy.model.gpt2 import GPT2
from llmpy.run import checkpoint
from llmpy.system import durable
from llmpy.system.stored import Stored

N = 100_000
TOKENS = np.arange(N) % 300


def batches(path: Path, form: str = "uint16") -> list[bytes]:
    write_shard(path, TOKENS, form, None if form == "int32" else TOKENS % 3 > 0)
    loader = Loader([open_shard(path, 300)], 4, 64, shuffle=True, vocab_size=300)
    return [x.tobytes() for _ in range(9) for x in loader.next()]


class Few(io.FileIO):
    """A file of a file system that returns at most 1,000 bytes per read."""

    def readinto(self, buffer: Any) -> int | None:  # type: ignore[override]
        return super().readinto(memoryview(buffer)[:1000])


def stingy(monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(os, "preadv"):
        true = os.preadv
        monkeypatch.setattr(os, "preadv", lambda handle, buffers, at: true(handle, [buffers[0][:1000]], at))

    def few(path: Path, mode: str = "r", buffering: int = -1, **_: Any) -> Any:
        assert mode == "rb"
        return Few(path) if buffering == 0 else io.BufferedReader(Few(path))

    monkeypatch.setattr(Path, "open", few)


@pytest.mark.parametrize("form", ["uint16", "uint32", "int32"])
def test_batches_from_short_reads(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = batches(tmp_path / "train.bin", form)
    with monkeypatch.context() as patched:
        stingy(patched)
        loader = Loader([open_shard(tmp_path / "train.bin", 300)], 4, 64, shuffle=True, vocab_size=300)
        assert [x.tobytes() for _ in range(9) for x in loader.next()] == expected


def test_models_and_checkpoints_from_short_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = tiny_model(), tmp_path / "model.safetensors"
    checkpoint.save(path, model, 8)
    size, sums = durable.write_stretches(tmp_path / "big", [np.arange(durable.STRETCH, dtype=np.int32)])
    write_examples(tmp_path / "h.bin", [Example(np.arange(900), (np.arange(9),) * 4, 2)])
    with monkeypatch.context() as patched:
        stingy(patched)
        read = GPT2(TINY, Laptop())
        checkpoint.load_parameters(path, read.params)
        assert durable.stretches_differ(tmp_path / "big", size, sums) == ""
        assert read_examples(tmp_path / "h.bin", 1000)[0].context.tolist() == list(range(900))
    assert np.array_equal(read.params.buffer, model.params.buffer)
    os.truncate(tmp_path / "big", size - 1)
    assert "instead of" in durable.stretches_differ(tmp_path / "big", size, sums)


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="Windows")
def test_without_preadv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = batches(tmp_path / "train.bin")
    monkeypatch.delattr(os, "preadv")
    assert batches(tmp_path / "train.bin") == expected


def cut(path: Path, shard: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(path, 1024 + 1000)


def empty(path: Path, shard: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"")


def cut_mask(path: Path, shard: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(mask_path(path), 1024 + 1000)


def fail(path: Path, shard: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize(
    ("change", "code", "name"),
    [(cut, "file.changed", ".bin"), (empty, "file.changed", ".bin"), (cut_mask, "file.changed", ".mask"),
     (fail, "file.unreadable", "Input/output error")],
)  # fmt: skip
@pytest.mark.parametrize("part", [False, True])
def test_a_file_that_fails_under_the_loader(
    change: Callable[..., None], code: str, name: str, part: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.bin"
    batches(path)
    shard = open_shard(path, 300)
    loader = Loader([shard.part(5000, N) if part else shard], 4, 64, shuffle=False)
    for _ in range(9):
        loader.next()
    change(path, shard, monkeypatch)
    with refused(code, path.stem, name):
        loader.next()


def test_examples_outlive_their_file(tmp_path: Path) -> None:
    write_examples(tmp_path / "h.bin", [Example(np.arange(9), (np.arange(9),) * 4, 2)] * 3000)
    read = read_examples(tmp_path / "h.bin", 300)
    os.truncate(tmp_path / "h.bin", 0)
    assert read[-1].context.tolist() == list(range(9))
    for size in (1024 + 101, 1024 + 9, 1025, 15, 0):
        (tmp_path / "h.bin").write_bytes(bytes(size))
        with refused("hellaswag.corrupt", "h.bin"):
            read_examples(tmp_path / "h.bin", 300)


def test_a_removed_file_and_empty_slices(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(np.arange(10, dtype="<i4").tobytes())
    values = Stored(tmp_path / "x", "<i4", 8, 8)
    last = values.part(6, 8)
    (tmp_path / "x").unlink()
    assert values[2:4].tolist() == [4, 5] and values[:].tolist() == list(range(2, 10))
    del values
    assert last[:].tolist() == [8, 9] and last[5:].size == last[1:0].size == 0 and len(last) == 2
