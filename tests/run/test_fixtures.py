"""Files of 0.1.0 are read, sampled and resumed as by 0.1.0: see tests/fixtures/0.1.0."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from llmpy import backend
from llmpy.cli.main import main
from llmpy.model.arena import Arena
from llmpy.model.gpt2 import params_table
from llmpy.run import checkpoint
from llmpy.run.parts import load_moments, position_for, read_parts

OLD = Path(__file__).parents[1] / "fixtures" / "0.1.0"
EXPECTED = json.loads((OLD / "expected.json").read_text("utf-8"))
STEP_4, STEP_8 = (Path("checkpoints", f"step-0000000{step}") for step in (4, 8))
QUIET = ["-B", "2", "-T", "8", "--dtype", "float32", "--eval-batches", "1", "--sample-tokens", "2"]


def digest(x: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()[:16]


def state(path: Path) -> dict[str, Any]:
    """Return the restored state of a checkpoint, as in expected.json."""
    manifest = checkpoint.verify(path)
    params = Arena(params_table(checkpoint.read_header(path / checkpoint.MODEL).config), np.empty, np.float32)
    checkpoint.load_parameters(path / checkpoint.MODEL, params)
    m, v = np.empty((2, params.size), np.float32)
    parts = read_parts(path, manifest)
    load_moments(parts, [(0, params.size)], m, v)
    positions = [position_for(parts, rank, len(parts), 42) for rank in range(len(parts))]
    return {
        "params": digest(params.buffer), "m": digest(m), "v": digest(v), "updates": manifest["updates"],
        "detectors": digest(np.asarray(json.dumps(manifest["detectors"]).encode())),
        "places": [
            [p.shard, p.sample, p.rng.pos, *(digest(x) for x in (p.shard_order, p.sample_order, p.rng.key))]
            for p in positions
        ],
    }  # fmt: skip


def copied(name: str, to: Path) -> Path:
    shutil.copytree(OLD / name, to / name)
    return to / name


@pytest.mark.parametrize("path", [Path("finished", STEP_4), Path("finished", STEP_8), Path("ranks", STEP_4)])
def test_a_checkpoint_restores_every_bit(path: Path) -> None:
    assert state(OLD / path) == EXPECTED[path.as_posix()]


def resumed_as_by_itself(run: Path, expected: str) -> None:
    """Compare with 0.1.0: bitwise on the same instruction set and compiler, else update count and data position."""
    found, wanted = state(run / STEP_8), EXPECTED[expected]
    here = backend.load("cpu", threads=2, dtype="float32").version_info()
    if (here["isa"], here["llvmlite"]) == (EXPECTED["isa"], EXPECTED["llvm"]):
        assert found == wanted
    assert (found["updates"], found["places"]) == (wanted["updates"], wanted["places"])


def test_a_run_of_one_process_resumes(tmp_path: Path) -> None:
    run = copied("finished", tmp_path)
    shutil.rmtree(run / STEP_8)
    assert main(["train", "--resume", str(run)]) == 0
    resumed_as_by_itself(run, "finished/checkpoints/step-00000008")
    before, after = (load_file(path / STEP_8 / checkpoint.MODEL) for path in (OLD / "finished", run))
    for name, x in before.items():
        np.testing.assert_allclose(after[name], x, rtol=1e-3, atol=1e-5)


def test_a_run_of_two_ranks_resumes_in_one(tmp_path: Path) -> None:
    run = copied("ranks", tmp_path)
    assert main(["train", "--resume", str(run), "--ranks", "1"]) == 0
    resumed_as_by_itself(run, "by_one/checkpoints/step-00000008")


@pytest.mark.skipif(find_spec("mpi4py") is None, reason="no mpi4py: pip install 'llmpy[mpi]'")
def test_a_run_of_two_ranks_resumes_in_two(tmp_path: Path) -> None:
    run = copied("ranks", tmp_path)
    command = [sys.executable, "-m", "llmpy", "train", "--resume", str(run), "--ranks", "2"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    resumed_as_by_itself(run, "by_two/checkpoints/step-00000008")


def test_a_run_without_a_checkpoint_starts_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copied("stopped", tmp_path)
    assert main(["train", "--resume", str(run), "--data", str(OLD / "text.txt"), "--steps", "2", *QUIET]) == 0
    assert "no complete checkpoint" in capsys.readouterr().out
    assert checkpoint.newest(run / "checkpoints", print) is not None


def test_every_model_writes_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    texts = set()
    for name in ("finished", "finished/best.safetensors", "finished/checkpoints/step-00000008", "model.bin", "hf"):
        words = ["--prompt", "the cat", "--tokens", "12", "--temperature", "0", "--dtype", "float32"]
        assert main(["sample", str(OLD / name), *words]) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1
    assert texts.pop().startswith("the cat")


def test_tokens_train(tmp_path: Path) -> None:
    words = ["--data", str(OLD / "tokens"), "--init", str(OLD / "hf"), "--steps", "2", "--out", str(tmp_path / "run")]
    assert main(["train", *words, *QUIET]) == 0
