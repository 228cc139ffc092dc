"""Checkpoints to the byte: what is written is read, every flipped bit is found, old ones go."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.laptop import TINY, Laptop, tiny_model

from llmpy.data.loader import Loader
from llmpy.data.shards import Shard
from llmpy.errors import LlmpyError
from llmpy.model.gpt2 import GPT2
from llmpy.run import checkpoint
from llmpy.run import checkpoint_writer as snapshot
from llmpy.run.checkpoint import MANIFEST, MODEL, STATE
from llmpy.run.checkpoint_writer import CheckpointWriter, restore
from llmpy.run.journal import Journal
from llmpy.run.place import position_of
from llmpy.system import durable
from llmpy.train.optimizer import AdamW


class Run:
    """A tiny model in training, and its keeper."""

    def __init__(self, folder: Path, every: int = 2, keep: int = 2, keep_every: int = 0) -> None:
        self.model = tiny_model()
        self.optimizer = AdamW(self.model)
        rng = np.random.default_rng(0)
        for x in (self.optimizer.m, self.optimizer.v):
            x[...] = rng.normal(size=x.size)
        self.loader = Loader([Shard(Path("a"), rng.integers(0, 300, 500).astype(np.uint16))], 2, 8, shuffle=True)
        self.keeper = CheckpointWriter(folder, self.model, self.optimizer, 8, Journal(), every, keep, keep_every)
        self.keeper.begin(0)

    def state(self) -> dict[str, Any]:
        position = self.loader.position
        return {"data": {"shard": 0, "sample": position.sample, "generator_used": position.rng.pos}}

    def save(self, step: int) -> Path:
        assert self.keeper.due(step)
        self.keeper.save(step, self.state(), self.loader.position)
        self.keeper.close()
        return self.keeper.folder / f"step-{step:08}"


def test_round_trip_to_the_bit(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for _ in range(40):  # into the second epoch
        run.loader.next()
    path = run.save(2)
    run.keeper.finish(2, run.state(), run.loader.position)  # there is one already
    model = GPT2(TINY, Laptop())
    model.reserve(2, 8, training=True)
    optimizer = AdamW(model)
    others = restore(path, model, optimizer)
    for mine, theirs in ((model.params.buffer, run.model.params.buffer), (optimizer.m, run.optimizer.m)):
        assert mine.tobytes() == theirs.tobytes()
    assert optimizer.v.tobytes() == run.optimizer.v.tobytes()
    again = Loader(run.loader.shards, 2, 8, shuffle=True)
    again.position = position_of(checkpoint.verify(path), others)
    for _ in range(80):
        assert np.array_equal(again.next()[0], run.loader.next()[0])
    assert set(load_file(path / MODEL)) == {t.name for t in model.params.table}  # the library reads both
    assert load_file(path / STATE)["v.wte"].shape == model.params.wte.shape
    assert os.path.samefile(path / MODEL, tmp_path / MODEL)


def test_the_copy_is_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on while the thread waits; the checkpoint is of the step it was asked for."""
    run = Run(tmp_path)
    before = run.model.params.buffer.copy()
    true = checkpoint.write

    def late(*arguments: Any) -> Path:
        while not (run.model.params.buffer == 7).all():
            pass
        return true(*arguments)

    monkeypatch.setattr(checkpoint, "write", late)
    run.keeper.save(2, run.state(), run.loader.position)
    assert not run.keeper.due(4), "one at a time"
    run.model.params.buffer[...] = 7
    run.keeper.close()
    assert run.keeper.due(4)
    model = GPT2(TINY, Laptop())
    checkpoint.load_parameters(tmp_path / MODEL, model.params)
    assert np.array_equal(model.params.buffer, before)


def flips(path: Path, places: Any) -> list[int]:
    """Places (in bits) of a file whose flip `verify` does not find."""
    content = path.read_bytes()
    missed = []
    for place in places:
        bad = bytearray(content)
        bad[place // 8] ^= 1 << place % 8
        path.write_bytes(bad)
        try:
            checkpoint.verify(path.parent)
            missed.append(place)
        except LlmpyError as fault:
            assert "damaged" in str(fault) or "reads 1" in str(fault)
    path.write_bytes(content)
    checkpoint.verify(path.parent)
    return missed


@pytest.mark.parametrize("name", [MODEL, STATE, MANIFEST])
def test_a_flip_in_any_byte_of_a_header(tmp_path: Path, name: str) -> None:
    path = Run(tmp_path).save(2) / name
    size = path.stat().st_size
    header = size if name == MANIFEST else 8 + int.from_bytes(path.read_bytes()[:8], "little")
    rng = np.random.default_rng(1)
    assert flips(path, [8 * byte + int(rng.integers(8)) for byte in range(header)]) == []


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.long)])
def test_flips_in_the_payload(tmp_path: Path, count: int) -> None:
    folder = Run(tmp_path).save(2)
    rng = np.random.default_rng(count)
    for name in (MODEL, STATE):
        bits = 8 * (folder / name).stat().st_size
        assert flips(folder / name, rng.integers(8 * durable.PAGE, bits, count // 2).tolist()) == []


def test_other_damage(tmp_path: Path) -> None:
    folder = Run(tmp_path).save(2)
    good = (folder / STATE).read_bytes()
    for bad in (b"", good[:-1], good + b"\0"):
        (folder / STATE).write_bytes(bad)
        with pytest.raises(LlmpyError, match=r"state\.safetensors is damaged .* bytes instead of"):
            checkpoint.verify(folder)
    (folder / STATE).unlink()
    with pytest.raises(LlmpyError, match="No such file"):
        checkpoint.verify(folder)
    manifest = json.loads((folder / MANIFEST).read_bytes())["manifest"] | {"format": 2}
    (folder / MANIFEST).write_bytes(checkpoint._sealed(manifest))
    with pytest.raises(LlmpyError, match="has format 2, this program reads 1"):
        checkpoint.verify(folder)


def test_the_newest_and_majors_are_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=2, keep_every=6)
    for step in range(2, 21, 2):
        run.save(step)
    kept = [int(p.name[5:]) for p in checkpoint.listed(tmp_path / "checkpoints")]
    assert kept == [20, 18, 12, 6]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_full_disk_frees_the_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, keep=3)
    for step in (2, 4, 6):
        run.save(step)
    true, full = durable.write, [True]

    def write(handle: int, data: np.ndarray) -> None:
        if full.pop() if full else False:
            raise OSError(errno.ENOSPC, "No space left on device")
        true(handle, data)

    monkeypatch.setattr(durable, "write", write)
    run.keeper.finish(7, run.state(), run.loader.position)
    assert [int(p.name[5:]) for p in checkpoint.listed(tmp_path / "checkpoints")] == [7, 6]


def test_another_attempt_at_a_step_never_takes_its_checkpoint_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is whole when the link of its model fails, and must be at every moment from then on."""
    run = Run(tmp_path, keep=1)
    run.save(2)
    true_link, true_replace, failures = durable.link, durable.replace, [True]

    def link(*arguments: Path) -> None:
        if failures and failures.pop():
            raise OSError(errno.ENOSPC, "No space left on device")
        true_link(*arguments)

    def replace(source: Path, target: Path) -> None:
        true_replace(source, target)
        assert checkpoint.newest(tmp_path / "checkpoints", lambda _: None) is not None

    monkeypatch.setattr(durable, "link", link)
    monkeypatch.setattr(durable, "replace", replace)
    run.keeper.finish(3, run.state(), run.loader.position)
    found = checkpoint.newest(tmp_path / "checkpoints", lambda _: None)
    assert found is not None
    assert found[1]["step"] == run.keeper.last == 3
    assert os.path.samefile(found[0] / MODEL, tmp_path / MODEL)


def test_a_thread_that_runs_out_of_memory_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, every=20)

    def none(*_: Any) -> Path:
        raise MemoryError

    with monkeypatch.context() as m:
        m.setattr(checkpoint, "write", none)
        run.keeper.save(20, run.state(), run.loader.position)
        run.keeper.close()
    assert "warning: cannot write a checkpoint: out of memory; none exists yet" in capsys.readouterr().out
    assert not run.keeper.due(21)
    assert run.keeper.due(22), "tried again before the next multiple"


def test_a_checkpoint_of_a_newer_program_is_left_alone(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(2)
    newer = run.save(4)
    manifest = json.loads((newer / MANIFEST).read_bytes())["manifest"] | {"format": 2}
    (newer / MANIFEST).write_bytes(checkpoint._sealed(manifest))
    with pytest.raises(LlmpyError, match="has format 2, this program reads 1 — use a newer llmpy"):
        checkpoint.newest(tmp_path / "checkpoints", lambda _: None)
    assert newer.exists()


@pytest.mark.parametrize("sizes", [(4096, 10), (4096, 3 * durable.STRETCH + 5, 7), (1,), (0,), (durable.STRETCH,)])
@pytest.mark.parametrize("direct", [True, False])
def test_stretches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], direct: bool) -> None:
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    rng = np.random.default_rng(0)
    pieces = [snapshot.page_aligned(size // 4 + 1).view(np.uint8)[:size] for size in sizes]
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
