"""llm.c's checkpoints: bytes against an independent description, ranks, and an exactly resumed run."""

from __future__ import annotations

import math
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import golden
from support.laptop import TINY, AtOnce, Laptop
from support.refused import refused
from support.samples import in_memory, training_state

from llmpy.cli.main import main
from llmpy.data.loader import Loader
from llmpy.data.shards import open_shard, write_shard
from llmpy.formats import llmc, llmc_state, native, open_model
from llmpy.formats.llmc_state import TrainingState
from llmpy.formats.source import shapes
from llmpy.options.train import TrainOptions
from llmpy.rng import MT19937
from llmpy.run import checkpoint, checkpoint_writer
from llmpy.run.parts import part_name
from llmpy.train import assemble

SIZE = sum(math.prod(s) for s in shapes(TINY).values())


def facts(state: TrainingState) -> list[object]:
    """Return a state's content for comparison."""
    arrays = [x if x is None else x.tobytes() for x in (state.m, state.v, state.master)]
    places = [(p.shard, p.sample, p.shard_order.tolist(), p.sample_order.tolist()) for p in state.places]
    rngs = [(p.rng.pos, p.rng.key.tolist()) for p in state.places if state.shuffle]
    return [state.step, state.shuffle, arrays, places, rngs]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("ranks", [1, 3])
def test_round_trip(tmp_path: Path, ranks: int, master: bool, shuffle: bool) -> None:
    state = training_state(TINY, ranks, shuffle, master)
    for rank in range(ranks):
        llmc_state.write_state(tmp_path / f"state_00000007_{rank:05d}.bin", TINY, state, rank)
    assert facts(llmc_state.read_state(tmp_path / "state_00000007_00000.bin", TINY)) == facts(state)


def in_llmc_order(x: np.ndarray) -> np.ndarray:
    """Return our flat arena in llm.c's order, by a dictionary of views."""
    views, start = {}, 0
    for name, shape in shapes(TINY).items():
        views[name] = x[start : start + math.prod(shape)]
        start += math.prod(shape)
    return np.concatenate([views[name] for name in llmc.ORDER])


def test_bytes_are_those_of_llm_c(tmp_path: Path) -> None:
    """Against every field packed by struct from the description."""
    state = training_state(TINY)
    path = tmp_path / "state_00000007_00000.bin"
    llmc_state.write_state(path, TINY, state)
    place = state.places[0]
    assert state.master is not None
    header = struct.pack("<6i", 20240527, 1, 1, 0, 1, 1).ljust(40, b"\0") + struct.pack("<i", 7)
    header = header.ljust(80, b"\0") + struct.pack("<2Q", 13371337, 13371337)
    header = header.ljust(120, b"\0") + struct.pack("<2Q", 1, 4)
    body = b"".join(in_llmc_order(x).astype("<f4").tobytes() for x in (state.m, state.v, state.master))
    block = struct.pack("<Q3i", 3, *place.shard_order) + struct.pack("<Q11i", 11, *place.sample_order)
    twister = struct.pack("<QiI624I2I", 0, 625 - place.rng.pos, place.rng.pos, *place.rng.key, 0, 0x9908B0DF)
    assert len(twister) == 2520
    assert path.read_bytes() == header.ljust(1024, b"\0") + body + block + twister


def test_zero_1_is_assembled(tmp_path: Path) -> None:
    """Rank r has the r-th part of each layer of each tensor."""
    whole = training_state(TINY, ranks=2)
    for rank in range(2):
        parts = []
        for x in (whole.m, whole.v, whole.master):
            start, views = 0, {}
            assert x is not None
            for name, shape in shapes(TINY).items():
                stacked = name not in ("wte", "wpe", "ln_f_w", "ln_f_b")
                views[name] = x[start : (start := start + math.prod(shape))].reshape(shape[0] if stacked else 1, 2, -1)
            parts += [views[name][:, rank].tobytes() for name in llmc.ORDER]
        path = tmp_path / f"state_00000007_{rank:05d}.bin"
        llmc_state.write_state(path, TINY, whole, rank)
        content = path.read_bytes()
        path.write_bytes(content[:1024] + b"".join(parts) + content[1024 + 12 * SIZE :])
    assert facts(llmc_state.read_state(tmp_path / "state_00000007_00000.bin", TINY)) == facts(whole)


def test_a_generator_that_was_just_seeded(tmp_path: Path) -> None:
    """llm.c has left 1 and next 0; NumPy's position is 624."""
    path = tmp_path / "state_00000007_00000.bin"
    place = replace(training_state(TINY).places[0], rng=MT19937(42).state)
    llmc_state.write_state(path, TINY, replace(training_state(TINY), places=(place,)))
    content = bytearray(path.read_bytes())
    at = len(content) - 2520
    assert struct.unpack_from("<iI", content, at + 8) == (1, 624)
    content[at : at + 16] = struct.pack("<QiI", 0xDEADBEEF, 1, 0)  # the seed is garbage in llm.c's files
    path.write_bytes(content)
    rng = MT19937(0)
    rng.state = llmc_state.read_state(path, TINY).places[0].rng
    assert tuple(rng.uint32(6)) == golden.WORDS


@pytest.mark.parametrize(
    ("offset", "value", "code", "name"),
    [
        (4, 2, "file.corrupt", "version 2"),
        (8, 2, "file.missing", "00001.bin"),
        (16, 2, "file.corrupt", "master=2"),
        (20, 0, "file.wrong-size", "too long"),
        (1024 + 12 * SIZE, 2**31 - 1, "file.wrong-size", "too long"),
    ],
)
def test_corrupt_states(tmp_path: Path, offset: int, value: int, code: str, name: str) -> None:
    path = tmp_path / "state_00000007_00000.bin"
    llmc_state.write_state(path, TINY, training_state(TINY))
    content = bytearray(path.read_bytes())
    content[offset : offset + 4] = struct.pack("<i", value)
    path.write_bytes(content)
    with refused(code, name):
        llmc_state.read_state(path, TINY)


def test_states_of_the_ranks_must_match(tmp_path: Path) -> None:
    state = training_state(TINY, ranks=2)
    for rank in range(2):
        llmc_state.write_state(tmp_path / f"state_00000007_{rank:05d}.bin", TINY, replace(state, step=7 + rank), rank)
    with refused("file.corrupt", "state_00000007_00001.bin"):
        llmc_state.read_state(tmp_path / "state_00000007_00000.bin", TINY)


def test_only_a_complete_checkpoint_counts(tmp_path: Path) -> None:
    assert llmc_state.latest(tmp_path) is None
    for step in (5, 10):
        state = replace(training_state(TINY), step=step)
        llmc_state.write_checkpoint(tmp_path, in_memory(), state, "bfloat16")
    (tmp_path / "DONE_00000099").touch()  # left by a crash of llm.c during deletion
    (tmp_path / "DONE_junk").touch()
    assert llmc_state.latest(tmp_path) == 10
    assert (tmp_path / "DONE_00000010").read_bytes() == b""
    (tmp_path / "DONE_00000010").unlink()
    assert llmc_state.latest(tmp_path) == 5
    source, state = llmc_state.read_checkpoint(tmp_path)
    assert state.step == 5
    assert open_model(tmp_path).what == "checkpoint of llm.c at step 5, master weights"
    # the master weights, not the model file's bfloat16
    assert state.master is not None
    assert np.array_equal(source.read("wte").reshape(-1), state.master[: source.read("wte").size])
    with refused("checkpoint.missing", tmp_path):
        llmc_state.read_checkpoint(tmp_path / "..")


# A whole run: ours → llm.c's files → ours.


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, ...]:
    rng = np.random.default_rng(0)
    paths = tuple(tmp_path / name for name in ("train_0.bin", "train_1.bin", "val.bin"))
    for path, size in zip(paths, (300, 200, 100), strict=True):
        write_shard(path, rng.integers(0, 300, size))
    return paths


def options_for(shards: tuple[Path, ...], **changes: Any) -> TrainOptions:
    """Two batches a step: an epoch of 30 batches ends at step 15, a shard before that."""
    settings: dict[str, Any] = {
        "data": shards, "batch_size": 2, "sequence_length": 8, "total_batch": 32, "steps": 24, "warmup": 3, "lr": 1e-2,
        "eval_every": 6, "eval_batches": 2, "sample_tokens": 2, "checkpoint_every": 4, "keep": 0,
    }  # fmt: skip
    return TrainOptions(**settings | changes)


def lines_after(run: Path, step: int) -> list[str]:
    """Return main.log's lines from a step on, evaluations included."""
    lines = (run / "main.log").read_text("utf-8").splitlines()
    return [line for line in lines if int(line.split()[0][2:]) >= step]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_run_moves_to_llm_c_and_back_exactly(
    shards: tuple[Path, ...], tmp_path: Path, shuffle: bool, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(checkpoint_writer, "Thread", AtOnce)
    whole, llm_c, back = tmp_path / "whole", tmp_path / "llm.c", tmp_path / "back"
    options = options_for(shards, out=whole, model="d1", vocab_size=300, shuffle=shuffle)
    assert assemble.train(options, Laptop()) == 0
    shutil.copytree(whole, tmp_path / "cut", ignore=shutil.ignore_patterns("step-0000002*", "step-00000016"))
    assert main(["convert", str(tmp_path / "cut"), str(llm_c), "--to", "llmc-run"]) == 0
    assert f"-o {llm_c} -y 1 -b 2 -t 8 -d 32" in capsys.readouterr().out
    names = ["DONE_00000012", "model_00000012.bin", "state_00000012_00000.bin"]
    assert sorted(p.name for p in llm_c.iterdir()) == names
    assert assemble.train(options_for(shards, resume=llm_c, out=back), Laptop()) == 0
    assert "after step 12 of llm.c's run" in capsys.readouterr().out
    assert lines_after(back, 0) == lines_after(whole, 12)
    for name in (checkpoint.MODEL, part_name(0, 1)):
        a, b = (load_file(run / "checkpoints" / "step-00000024" / name) for run in (whole, back))
        assert all(np.array_equal(a[key], b[key]) for key in a | b)
    # resume from its own checkpoint: only the steps here are timed
    assert assemble.train(TrainOptions(resume=back, steps=25, given=frozenset({"steps"})), Laptop()) == 0
    manifest = checkpoint.verify(back / "checkpoints" / "step-00000025")
    assert (manifest["step"], manifest["seconds"]["untimed"]) == (25, 12)
    # llm.c's files of both runs are equal
    (back / "checkpoints" / "step-00000025").rename(tmp_path / "away")
    for run, out in ((whole, "a"), (back, "b")):
        assert main(["convert", str(run), str(tmp_path / out), "--to", "llmc-run"]) == 0
    for name in ("model_00000024.bin", "state_00000024_00000.bin"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_interrupted_run_from_llm_c_restarts_there(shards: tuple[Path, ...], tmp_path: Path) -> None:
    llm_c, run, cut = tmp_path / "llm.c", tmp_path / "run", tmp_path / "cut"
    state = state_on(shards)
    llmc_state.write_checkpoint(llm_c, in_memory(), state)
    assert assemble.train(options_for(shards, resume=llm_c, out=run, steps=9), Laptop()) == 0
    cut.mkdir()
    shutil.copy(run / "config.json", cut)
    assert assemble.train(TrainOptions(resume=cut), Laptop()) == 0
    assert (cut / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    assert lines_after(cut, 0) == lines_after(run, 7)


def state_on(shards: tuple[Path, ...], B: int = 2, ranks: int = 1) -> TrainingState:
    """Return a state after 7 updates, the loaders inside these shards."""
    opened = [open_shard(path, 300) for path in shards[:2]]
    places = []
    for rank in range(ranks):
        loader = Loader(opened, B, 8, True, rank=rank, ranks=ranks)
        loader.next()
        places.append(loader.position)
    state = training_state(TINY, ranks)
    return replace(state, v=np.abs(state.v), places=tuple(places))


@pytest.mark.parametrize(
    ("changes", "ranks", "code", "name"),
    [
        ({"batch_size": 4}, 1, "resume.position-mismatch", "-B"),
        ({"shuffle": False, "given": frozenset({"shuffle"})}, 1, "resume.loader-mismatch", "shuffling on"),
        ({}, 2, "resume.loader-mismatch", "--init"),
        ({"init": "gpt2"}, 1, "option.conflict", "--init gpt2"),
        ({"model": "d6"}, 1, "option.conflict", "--model d6"),
        ({"resume": None, "init": "nowhere", "init_state": True}, 1, "file.missing", "nowhere"),
    ],
)
def test_invalid_resumes_fail_before_compiling(
    shards: tuple[Path, ...], tmp_path: Path, changes: dict[str, Any], ranks: int, code: str, name: str
) -> None:
    llmc_state.write_checkpoint(tmp_path / "llm.c", in_memory(), state_on(shards, ranks=ranks))
    before = sorted(tmp_path.rglob("*"))
    machine = Laptop()
    with refused(code, name):
        assemble.train(
            options_for(shards, **{"resume": tmp_path / "llm.c", "out": tmp_path / "run"} | changes), machine
        )
    assert machine.warmed == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_llm_c_is_not_written_to(shards: tuple[Path, ...], tmp_path: Path) -> None:
    llmc_state.write_checkpoint(tmp_path / "llm.c", in_memory(), state_on(shards))
    for resume in (None, tmp_path / "llm.c"):
        with refused("run.llmc", "llm.c", "--resume"):
            assemble.train(options_for(shards, out=tmp_path / "llm.c", resume=resume, auto_resume=True), Laptop())


def test_a_model_has_no_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native.write_model(tmp_path / "m", in_memory())
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "out"), "--to", "llmc-run"]) == 1
    assert "--to llmc [checkpoint.missing]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
