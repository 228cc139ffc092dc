"""Checkpoints round-trip bitwise; every flipped bit is detected; old ones are removed."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.laptop import TINY, Laptop, tiny_model
from support.refused import refused

from llmpy.data.loader import Loader
from llmpy.data.shards import Shard
from llmpy.errors import LlmpyError
from llmpy.model.gpt2 import GPT2
from llmpy.run import checkpoint
from llmpy.run.checkpoint import MANIFEST, MODEL
from llmpy.run.checkpoint_writer import CheckpointWriter, page_aligned
from llmpy.run.journal import Journal
from llmpy.run.parts import part_name
from llmpy.system import durable
from llmpy.train.optimizer import AdamW
from llmpy.train.single_process import SINGLE_PROCESS

PART = part_name(0, 1)


class Run:
    """A tiny model in training, and the writer of its checkpoints."""

    def __init__(self, folder: Path, every: int = 2, keep: int = 2) -> None:
        self.model = tiny_model()
        self.optimizer = AdamW(self.model)
        rng = np.random.default_rng(0)
        for x in (self.optimizer.m, self.optimizer.v):
            x[...] = rng.normal(size=x.size)
        self.loader = Loader([Shard(Path("a"), rng.integers(0, 300, 500).astype(np.uint16))], 2, 8, shuffle=True)
        self.writer = CheckpointWriter(SINGLE_PROCESS, folder, self.model, self.optimizer, 8, Journal(), every, keep)
        self.writer.begin(0)

    def state(self) -> tuple[np.ndarray, ...]:
        return self.model.params.buffer, self.optimizer.m, self.optimizer.v

    def save(self, step: int) -> Path:
        assert self.writer.due(step)
        self.writer.save(step, {"data": {}}, self.loader.position)
        self.writer.close()
        return self.writer.folder / f"step-{step:08}"

    def finish(self, step: int) -> None:
        self.writer.finish(step, {"data": {}}, self.loader.position)


def test_round_trip_to_the_bit(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for _ in range(40):  # into the second epoch
        run.loader.next()
    path = run.save(2)
    run.finish(2)  # exists
    again = Run(tmp_path)
    for x in again.state():
        x.fill(0)
    again.loader.position = again.writer.restore(path, checkpoint.verify(path), 42)
    assert [x.tobytes() for x in again.state()] == [x.tobytes() for x in run.state()]
    for _ in range(80):
        assert np.array_equal(again.loader.next()[0], run.loader.next()[0])
    assert set(load_file(path / MODEL)) == {t.name for t in run.model.params.table}  # the library reads both
    assert load_file(path / PART)["v"].tobytes() == run.optimizer.v.tobytes()
    assert os.path.samefile(path / MODEL, tmp_path / MODEL)


def test_the_copy_is_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training continues while the thread waits; the checkpoint holds the state of its step."""
    run = Run(tmp_path)
    before = run.model.params.buffer.copy()
    true = checkpoint.write_files

    def late(*arguments: Any) -> Any:
        while not (run.model.params.buffer == 7).all():
            pass
        return true(*arguments)

    monkeypatch.setattr(checkpoint, "write_files", late)
    run.writer.save(2, {}, run.loader.position)
    assert not run.writer.due(4), "one at a time"
    run.model.params.buffer[...] = 7
    run.writer.close()
    assert run.writer.due(4)
    model = GPT2(TINY, Laptop())
    checkpoint.load_parameters(tmp_path / MODEL, model.params)
    assert np.array_equal(model.params.buffer, before)


def flip(path: Path, places: Any) -> None:
    """Flip each of these bits of a file separately: `verify` detects it."""
    content = path.read_bytes()
    for place in places:
        bad = bytearray(content)
        bad[place // 8] ^= 1 << place % 8
        path.write_bytes(bad)
        with pytest.raises(LlmpyError) as caught:
            checkpoint.verify(path.parent)
        assert caught.value.code in ("file.corrupt", "checkpoint.newer-format")
    path.write_bytes(content)
    checkpoint.verify(path.parent)


@pytest.mark.parametrize("name", [MODEL, PART, MANIFEST])
def test_a_flip_in_any_byte_of_a_header(tmp_path: Path, name: str) -> None:
    path = Run(tmp_path).save(2) / name
    size = path.stat().st_size
    header = size if name == MANIFEST else 8 + int.from_bytes(path.read_bytes()[:8], "little")
    rng = np.random.default_rng(1)
    flip(path, [8 * byte + int(rng.integers(8)) for byte in range(header)])


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.long)])
def test_flips_in_the_payload(tmp_path: Path, count: int) -> None:
    folder = Run(tmp_path).save(2)
    rng = np.random.default_rng(count)
    for name in (MODEL, PART):
        bits = 8 * (folder / name).stat().st_size
        flip(folder / name, rng.integers(8 * durable.PAGE, bits, count // 2).tolist())


def test_other_damage(tmp_path: Path) -> None:
    folder = Run(tmp_path).save(2)
    good = (folder / PART).read_bytes()
    for bad in (b"", good[:-1], good + b"\0"):
        (folder / PART).write_bytes(bad)
        with refused("file.corrupt", folder / PART, f"{len(bad):,} bytes"):
            checkpoint.verify(folder)
    (folder / PART).unlink()
    with refused("file.corrupt", "No such file"):
        checkpoint.verify(folder)


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def steps(run: Run) -> list[int]:
    return [int(path.name[5:]) for path in checkpoint.listed(run.writer.folder)]


@pytest.mark.parametrize("name", ["write", "replace", "link", "prune"])
@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, background: bool
) -> None:
    """Earlier checkpoints are kept; a complete one counts, even if its model cannot be linked."""
    run, whole = Run(tmp_path, keep=1), name in ("link", "prune")
    run.save(2)
    with monkeypatch.context() as m:
        m.setattr(checkpoint if name == "prune" else durable, name, full)
        if background:
            run.save(4)
            assert capsys.readouterr().out.startswith("warning: ")
        for _ in range(2):  # the second time a complete one is not written again
            with refused("checkpoint.unpublished" if whole else "checkpoint.unwritable", "step 4", "No space"):
                run.finish(4)
        assert (steps(run), run.writer.last) == (([4, 2], 4) if whole else ([2], 2))
        assert not list(run.writer.folder.glob(".*"))
    run.finish(4)
    assert steps(run) == [4]
    assert os.path.samefile(run.writer.folder / "step-00000004" / MODEL, tmp_path / MODEL)


def test_a_thread_that_runs_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint, "write_files", lambda *_: (_ for _ in ()).throw(MemoryError))
    Run(tmp_path).save(2)
    assert "warning: cannot write a checkpoint: out of memory" in capsys.readouterr().out


def test_a_checkpoint_of_a_newer_program_is_left_alone(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(2)
    newer = run.save(4)
    manifest = checkpoint.verify(newer) | {"format": 3}
    (newer / MANIFEST).write_bytes(checkpoint._sealed(manifest))
    with refused("checkpoint.newer-format", newer, "format 3"):
        checkpoint.newest(tmp_path / "checkpoints", lambda _: None)
    assert newer.exists()


@pytest.mark.parametrize("sizes", [(4096, 10), (4096, 3 * durable.STRETCH + 5, 7), (1,), (0,), (durable.STRETCH,)])
@pytest.mark.parametrize("direct", [True, False])
def test_stretches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], direct: bool) -> None:
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    rng = np.random.default_rng(0)
    pieces = [page_aligned(size // 4 + 1).view(np.uint8)[:size] for size in sizes]
    for piece in pieces:
        piece[...] = rng.integers(0, 256, piece.size)
    size, sums = durable.write_stretches(tmp_path / "file", pieces)
    assert (tmp_path / "file").read_bytes() == b"".join(p.tobytes() for p in pieces)
    assert size == sum(sizes)
    assert durable.stretches_differ(tmp_path / "file", size, sums) == ""


def test_a_file_system_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "O_DIRECT", 1 << 30, raising=False)
    true = os.open

    def refusing(path: Any, flags: int, *mode: int) -> int:
        if flags & 1 << 30:
            raise OSError(errno.EINVAL, "Invalid argument")
        return true(path, flags, *mode)

    monkeypatch.setattr(durable.os, "open", refusing)
    durable.write_stretches(tmp_path / "file", [np.arange(10, dtype=np.uint8)])
    assert (tmp_path / "file").read_bytes() == bytes(range(10))
