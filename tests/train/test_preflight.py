"""The summary before training, and the refusal of runs that do not fit."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from support.laptop import Laptop
from support.refused import refused

from llmpy.data.hellaswag import Example, write_examples
from llmpy.model.arena import memory
from llmpy.model.config import ModelConfig
from llmpy.model.families import flops_per_token
from llmpy.model.gpt2 import activations_table, params_table
from llmpy.model.language_model import RECOMPUTE
from llmpy.options.train import TrainOptions
from llmpy.system.words import duration
from llmpy.train.memory import (
    COMPILER_BYTES,
    PROGRAM_BYTES,
    check_disk,
    check_memory,
    disk_needed,
    memory_of,
    memory_parts,
)
from llmpy.train.preflight import Preflight, check, inspect
from llmpy.train.start import RunStart

GPT2_124M = ModelConfig.from_dial("gpt2")
TOKENS = 305_260, 32_768  # to train on, to validate


def needed_by(*given: Any, **more: Any) -> int:
    return sum(memory_parts(*given, **more).values())


def flight(**options: object) -> Preflight:
    given = TrainOptions(model="gpt2", batch_size=4, sequence_length=64, **options)  # type: ignore[arg-type]
    given = given.settled(768, 305_260)
    return inspect(RunStart(given), GPT2_124M, given, Laptop(), TOKENS)


def test_memory_follows_the_tables() -> None:
    sizes = [
        memory(table, 4, 4) for table in (params_table(GPT2_124M), activations_table(GPT2_124M, 4, 64, True, RECOMPUTE))
    ]
    assert sizes[0] == 4 * 124_475_904
    least = 4 * sizes[0] + sizes[1]
    needed = needed_by(GPT2_124M, 4, 64, Laptop())
    assert least + PROGRAM_BYTES < needed < 1.1 * least + PROGRAM_BYTES
    assert needed_by(GPT2_124M, 8, 64, Laptop()) > needed
    assert needed_by(GPT2_124M, 4, 128, Laptop()) > needed


def test_short_samples_need_less_memory() -> None:
    whole = needed_by(GPT2_124M, 1, 1024, Laptop())
    short = needed_by(GPT2_124M, 1, 1024, Laptop(), sampled=128)
    assert whole - short > 50e6
    assert needed_by(GPT2_124M, 1, 64, Laptop(), sampled=128) == needed_by(GPT2_124M, 1, 64, Laptop())


def test_the_summary() -> None:
    text = "\n".join(flight(steps=100).lines())
    for part in ("gpt2", "124,475,904 parameters", "305,260 training", "32,768", "4 x 64", "1 thread, numpy, float32"):
        assert part in text
    assert "peak 10 GFLOP/s" in text
    assert "after 100 steps" in text
    assert "after 11,920 steps or 3.5 minutes, whichever comes first" in "\n".join(flight().lines())
    assert "after 7 minutes" in "\n".join(flight(minutes=7).lines())
    busy = {"ranks": 64, "total_batch": 1 << 20, "steps": 10**9, "minutes": 12345.5}
    assert max(map(len, flight(**busy).lines())) <= 80


def test_cautions() -> None:
    # 305,260 tokens are 1,192 batches of 256
    assert "caution" not in "\n".join(flight(steps=20_000).lines())
    assert "caution  22 epochs" in "\n".join(flight(steps=26_000).lines())
    assert "caution  a step reads 1.7 epochs" in "\n".join(flight(steps=9, total_batch=524_288).lines())
    assert "a step reads" not in "\n".join(flight(steps=9, total_batch=262_144).lines())


def test_a_resumed_run_shows_the_rest() -> None:
    given = TrainOptions(model="gpt2", batch_size=4, sequence_length=64, steps=100).settled(768, 305_260)

    def after_90(elapsed: float) -> Preflight:
        start = RunStart(given, manifest={"step": 90, "seconds": {"elapsed": elapsed}})
        return inspect(start, GPT2_124M, given, Laptop(), TOKENS)

    rest = after_90(1e4)
    assert rest.steps == 10
    assert "10 steps of" in "\n".join(rest.lines())
    assert " after the first 90, 0.1 epochs" in "\n".join(rest.lines())
    given = replace(given, steps=None, minutes=10)
    left = after_90(540.0)
    assert left.steps == int(60 / left.step_seconds)
    assert after_90(600.0).steps == 0


def test_memory_of_hellaswag_and_of_the_compiler(tmp_path: Path) -> None:
    write_examples(tmp_path / "h.bin", [Example(np.arange(50), (np.arange(1, 21),) * 4, 0)])
    given = TrainOptions(model="gpt2", batch_size=4, sequence_length=64, checkpoint_every=0)
    plain = memory_of(given, GPT2_124M, Laptop())
    apart = memory(activations_table(GPT2_124M, 4, 69, False), 4, 4) + 4 * (4 * 69 - 256) * GPT2_124M.padded_vocab_size
    assert memory_of(replace(given, hellaswag=tmp_path / "h.bin"), GPT2_124M, Laptop()) == plain + apart
    same = replace(given, sequence_length=69)
    assert memory_of(replace(same, hellaswag=tmp_path / "h.bin"), GPT2_124M, Laptop()) == memory_of(
        same, GPT2_124M, Laptop()
    )
    cold = Laptop()
    cold.compiled = lambda _: False  # type: ignore[method-assign]
    assert memory_of(given, GPT2_124M, cold) == plain + COMPILER_BYTES
    flown = inspect(RunStart(given), GPT2_124M, given.settled(768, 305_260), cold, TOKENS)
    assert "compilation" in "\n".join(flown.lines())


def test_memory_follows_recompute() -> None:
    sizes = [memory_of(TrainOptions(model="gpt2", recompute=level), GPT2_124M, Laptop()) for level in (0, 1, 2)]
    acts = [memory(activations_table(GPT2_124M, 4, 128, True, level), 4, 4) for level in (0, 1, 2)]
    assert [a - sizes[0] for a in sizes] == [a - acts[0] for a in acts]
    assert sizes[0] > sizes[1] > sizes[2]


def test_time_is_estimated_from_the_peak() -> None:
    plan = flight(steps=100)
    assert plan.step_seconds == pytest.approx(flops_per_token(GPT2_124M, 64) * 256 / 6e9)
    assert plan.steps == 100
    assert flight(minutes=10).steps == int(600 / plan.step_seconds)
    assert flight(minutes=0.01).steps == 1
    mixed: Any = SimpleNamespace(isa="amx", dtype=np.dtype(np.float16), wide=np.dtype(np.float32))
    assert replace(plan, machine=mixed).step_seconds == pytest.approx(plan.step_seconds * 0.6 / 0.08)


def test_too_little_memory_is_refused() -> None:
    plan = flight(steps=1)
    check_memory(plan.options, plan.config, plan.machine, plan.memory)
    with refused("memory.insufficient", "-B 4 -T 64"):
        check_memory(plan.options, plan.config, plan.machine, plan.memory - 1)


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59.4, 59.6, 150, 3599, 12_000)] == [
        "0 s",
        "59 s",
        "1 min 0 s",
        "2 min 30 s",
        "59 min 59 s",
        "3 h 20 min",
    ]


FILES = 92 << 20  # of mapped libraries, in PROGRAM_BYTES
MEASURE = """
import contextlib, io, sys
from pathlib import Path
import numpy as np
from llmpy.train import assemble, memory
from llmpy.bench import peak_memory
from llmpy.data.shards import write_shard
from llmpy.options.train import TrainOptions

folder, model, dtype, T, every = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
needed = []
true = memory.memory_parts
def noting(*given):
    needed.append(sum(true(*given).values()))
    return true(*given)
memory.memory_parts = noting
for name in ("train.bin", "val.bin"):
    write_shard(folder / name, np.arange(20_000) % 50_257)
with contextlib.redirect_stdout(io.StringIO()):
    assemble.train(TrainOptions(
        data=(folder / "train.bin", folder / "val.bin"), out=folder / "run", model=model, dtype=dtype,
        sequence_length=T, steps=3, checkpoint_every=every, eval_batches=1, sample_tokens=4))
files = Path("/proc/self/status").read_text().partition("RssFile:")[2].split()[0]
print(needed[-1], peak_memory() - 1024 * int(files))
"""


def measured(folder: Path, model: str, dtype: str, T: int, every: int) -> tuple[int, int]:
    """Return the predicted and the measured bytes of a run in another process.

    Libraries count as FILES: the kernel maps a file in larger pieces if it was written a short time ago, as in a new
    installation (152 MB).
    """
    command = [sys.executable, "-c", MEASURE, str(folder), model, dtype, str(T), str(every)]
    predicted, own = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.split()
    return int(predicted), int(own) + FILES


@functools.cache
def compile_all(dtype: str) -> None:
    """Compile in another process: compilation would count as memory of the measured one."""
    with tempfile.TemporaryDirectory() as folder:
        measured(Path(folder), "d4", dtype, 64, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is counted differently elsewhere")
@pytest.mark.parametrize(
    ("model", "T", "every"),
    [("d4", 64, 2), *(pytest.param(*given, marks=pytest.mark.long) for given in
     [("d4", 64, 0), ("d4", 1024, 0), ("d8", 256, 2), ("d8", 1024, 0), ("d12", 64, 0), ("d12", 256, 2)])],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_predicted_memory_is_that_of_a_run(tmp_path: Path, model: str, dtype: str, T: int, every: int) -> None:
    compile_all(dtype)
    predicted, peak = measured(tmp_path, model, dtype, T, every)
    assert predicted == pytest.approx(peak, rel=0.05)


def test_each_rank_has_its_share_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the first check, before anything is read or downloaded."""
    given = TrainOptions(model="d4", batch_size=4, sequence_length=64, ranks=4, total_batch=1024)
    needed = memory_of(given, ModelConfig.from_dial("d4", vocab_size=512), Laptop())

    def checked(available: int) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
        check(RunStart(replace(given, vocab_size=512)), tmp_path, Laptop(), 4)

    checked(4 * needed)
    with refused("memory.insufficient"):
        checked(4 * needed - 4)


def test_files_of_a_resumed_run_count_as_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its models are replaced; a linked model counts once."""
    config = ModelConfig.from_dial("d1", vocab_size=300)
    given = TrainOptions(model="d1", steps=4, keep=1)
    needed = disk_needed(given, config)
    step = tmp_path / "checkpoints" / "step-00000001"
    step.mkdir(parents=True)
    for path, size in ((step / "model.safetensors", 1000), (tmp_path / "best.safetensors", 500)):
        path.write_bytes(bytes(size))
    (tmp_path / "model.safetensors").hardlink_to(step / "model.safetensors")

    def check_with(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        check_disk(given, config, tmp_path)

    check_with(needed - 1500)
    with refused("disk.insufficient", tmp_path):
        check_with(needed - 1501)
