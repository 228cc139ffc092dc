"""Several ranks: the optimizer equals AdamW, checkpoints resume on any number, and a lost rank is named."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import psutil
import pytest
from support.fellows import Fellow, Fellows
from support.laptop import TINY, AtOnce, Laptop, tiny_model
from support.refused import refused

from llmpy.cli.main import main
from llmpy.data.loader import Loader
from llmpy.data.shards import open_shard, write_shard
from llmpy.distributed import launch, world
from llmpy.distributed import watchdog as watch
from llmpy.distributed.watchdog import RankFailure, Watch
from llmpy.distributed.zero import Zero
from llmpy.errors import LlmpyError
from llmpy.formats import llmc_state
from llmpy.model.config import ModelConfig
from llmpy.model.gpt2 import GPT2, params_table
from llmpy.model.initialise import initialise
from llmpy.model.partition import buckets
from llmpy.options.train import TrainOptions
from llmpy.run import checkpoint, checkpoint_writer
from llmpy.run.checkpoint_writer import CheckpointWriter
from llmpy.run.journal import Journal
from llmpy.train.memory import memory_parts
from llmpy.train.optimizer import AdamW
from llmpy.train.outliers import UpdateGuard
from llmpy.train.single_process import SINGLE_PROCESS
from llmpy.train.trainer import Trainer
from llmpy.train.training_data import Update
from llmpy.train.verification import Verification

needs_mpi = pytest.mark.skipif(find_spec("mpi4py") is None, reason="no mpi4py: pip install 'llmpy[mpi]'")
SETTINGS = {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "clip": 0.5}
B, T = 2, 8


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("limit", [300, 3000, 1 << 20])
@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_every_parameter_has_one_owner(layers: int, limit: int, ranks: int) -> None:
    table = params_table(ModelConfig(layers=layers, heads=2, channels=8, context=16, vocab_size=300))
    seen = np.zeros(sum(t.size for t in table), np.int32)
    found = buckets(table, layers, limit)
    for bucket in found:
        assert bucket.size <= max(limit, 1)
        assert list(bucket.ranges) == sorted(bucket.ranges)
        for rank in range(ranks):
            for start, stop in bucket.part(rank, ranks):
                seen[start:stop] += 1
    assert (seen == 1).all()
    assert [b.first for b in found] == sorted((b.first for b in found), reverse=True)


def batches(steps: int, ranks: int) -> np.ndarray:
    """Tokens and targets (steps, ranks, 2, B, T)."""
    return np.random.default_rng(1).integers(0, TINY.vocab_size, (steps, ranks, 2, B, T), dtype=np.int32)


def trained(fellow: Fellow, ranks: int, steps: int = 3, limit: int = 700) -> tuple[np.ndarray, ...]:
    """Return parameters and norms of a rank after some steps; the second step is skipped."""
    model = tiny_model(TINY, B, T)
    optimizer = Zero(model, fellow, **SETTINGS, limit=limit)
    norms = []
    for step, rows in enumerate(batches(steps, ranks)):
        optimizer.expect()
        model.loss_and_grads(*rows[fellow.rank], micro_steps=ranks)
        norms.append(optimizer.norm())
        if step == 1:
            optimizer.skip()
        else:
            optimizer.update(1e-2, norms[-1])
    collected = np.empty(model.params.size, np.float32)
    optimizer.weights(collected)
    if fellow.rank == 0:
        assert np.array_equal(collected, model.params.buffer)
    return model.params.buffer, np.array(norms)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_it_is_adamw_on_the_mean_gradient(ranks: int) -> None:
    """Bitwise: ranks are summed in order, whatever the network does."""
    results = Fellows(ranks).run(lambda fellow: trained(fellow, ranks))
    model = tiny_model(TINY, B, T)
    optimizer = AdamW(model, **SETTINGS)
    for step, rows in enumerate(batches(3, ranks)):
        total = 0
        for rank in range(ranks):
            model.loss_and_grads(*rows[rank], micro_steps=ranks)
            total = total + model.grads.buffer  # type: ignore[union-attr]
        model.grads.buffer[...] = total  # type: ignore[union-attr]
        norm = float(results[0][1][step])
        assert norm == pytest.approx(optimizer.norm(), rel=1e-6)
        if step == 1:
            optimizer.skip()
        else:
            optimizer.update(1e-2, norm)
    for params, norms in results:
        assert np.array_equal(params, model.params.buffer)
        assert np.array_equal(norms, results[0][1])


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_memory_is_what_the_optimizer_holds(dtype: Any, ranks: int) -> None:
    machine = Laptop()
    machine.dtype = np.dtype(dtype)  # wide arrays stay float32; nothing is computed

    def held(fellow: Fellow) -> dict[str, int]:
        model = GPT2(TINY, machine)
        initialise(model.params, TINY)
        model.reserve(B, T, training=True)
        o = Zero(model, fellow, **SETTINGS)
        messages = (o._stage, o._packed, o._theirs, o._arrivals)
        return {
            "moments": o.m.nbytes + o.v.nbytes,
            "master weights": o.master.nbytes,
            "reduced gradients": o.grad.nbytes,
            "messages": sum(x.nbytes for x in messages),
        }

    first, *others = Fellows(ranks).run(held)
    parts = memory_parts(TINY, B, T, machine, copied=True, ranks=ranks)
    assert first == {name: parts[name] for name in first}
    assert all(other[name] <= first[name] for other in others for name in first)
    copy = 4 * sum(t.size for t in params_table(TINY)) + memory_parts(TINY, B, T, machine, ranks=ranks)["moments"]
    assert parts["copy for checkpoints"] == copy


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    write_shard(tmp_path / "train.bin", np.random.default_rng(0).integers(0, 300, 5000))
    return tmp_path / "train.bin"


def kept(fellow: Any, folder: Path, tokens: Path, resume: bool = False) -> dict[str, np.ndarray]:
    """Train three steps and write a checkpoint, or resume from it; return the state."""
    model = tiny_model(TINY, B, T)
    alone = fellow is None
    rank, ranks = (0, 1) if alone else (fellow.rank, fellow.size)
    loader = Loader([open_shard(tokens, 300)], B, T, True, 42, rank, ranks)
    optimizer = AdamW(model, **SETTINGS) if alone else Zero(model, fellow, **SETTINGS, limit=700)
    journal = Journal()
    writer = CheckpointWriter(fellow or SINGLE_PROCESS, folder, model, optimizer, T, journal, 0, 2)
    if resume:
        path = folder / "checkpoints" / "step-00000003"
        manifest = checkpoint.verify(path)
        position = writer.restore(path, manifest, 42)
        loader.resume(position, manifest["data"]["sample_tokens"])
    else:
        for _ in range(3):
            optimizer.expect()
            model.loss_and_grads(*loader.next(), micro_steps=ranks)
            optimizer.update(1e-2, optimizer.norm())
        place = loader.position
        options = TrainOptions(batch_size=B, sequence_length=T, ranks=ranks, shuffle=True).as_record()
        writer.finish(3, {"data": {"sample_tokens": B * T * ranks}, "options": options}, place)
    where = np.concatenate([np.arange(*r) for r in optimizer.owned])
    m, v = np.full((2, model.params.size), np.nan, np.float32)
    m[where], v[where] = optimizer.m, optimizer.v
    return {"params": model.params.buffer.copy(), "m": m, "v": v, "next": loader.next()[0].copy()}


def run_of(ranks: int, folder: Path, tokens: Path, resume: bool) -> dict[str, Any]:
    """Run `kept` on so many ranks; combine their moments."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    if ranks == 1:
        return kept(None, folder, tokens, resume) | {"nexts": []}
    each = Fellows(ranks).run(lambda fellow: kept(fellow, folder, tokens, resume))
    whole = {name: np.nanmax([x[name] for x in each], axis=0) for name in ("m", "v")}
    assert all(np.array_equal(x["params"], each[0]["params"]) for x in each)
    return {**each[0], **whole, "nexts": [x["next"] for x in each]}


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("before", [1, 2, 3])
def test_any_number_of_ranks_resumes_from_a_checkpoint(tmp_path: Path, tokens: Path, before: int, after: int) -> None:
    left = run_of(before, tmp_path / "run", tokens, resume=False)
    found = run_of(after, tmp_path / "run", tokens, resume=True)
    for name in ("params", "m", "v"):
        assert np.array_equal(left[name], found[name]), name
    if before == after:  # each rank continues at its own position
        assert all(map(np.array_equal, left["nexts"], found["nexts"]))


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_run_of_several_ranks_moves_to_llm_c(
    tmp_path: Path, tokens: Path, ranks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    left = run_of(ranks, tmp_path / "run", tokens, resume=False)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "llm.c"), "--to", "llmc-run"]) == 0
    assert f"-b {B * ranks} -t {T} -d {B * T * ranks} " in capsys.readouterr().out
    _, state = llmc_state.read_checkpoint(tmp_path / "llm.c")
    for name, found in (("params", state.master), ("m", state.m), ("v", state.v)):
        assert np.array_equal(left[name], found), name
    loader = Loader([open_shard(tokens, 300)], B * ranks, T, True)
    llmc_state.restore_place(state, loader)
    rows = loader.next()[0]
    assert np.array_equal(rows[:B], left["next"])


def test_a_rank_that_cannot_write_fails_all_and_leaves_nothing(tmp_path: Path, tokens: Path, monkeypatch: Any) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    write = checkpoint.durable.write_stretches

    def refuse(path: Path, pieces: Any) -> Any:
        if path.name.startswith("state-00001"):
            raise OSError(28, "No space left on device")
        return write(path, pieces)

    monkeypatch.setattr(checkpoint.durable, "write_stretches", refuse)

    def attempt(fellow: Fellow) -> str:
        with pytest.raises(LlmpyError, match=r"No space left on device \(rank 1\)") as failure:
            kept(fellow, tmp_path / "run", tokens)
        return str(failure.value)

    assert len(set(Fellows(2).run(attempt))) == 1
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_ranks_that_cannot_write_warn_and_try_again(tmp_path: Path, tokens: Path, monkeypatch: Any) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint.durable, "write_stretches", lambda *_: (_ for _ in ()).throw(full))
    monkeypatch.setattr(checkpoint_writer, "Thread", AtOnce)

    def attempts(fellow: Fellow) -> tuple[list[int], list[str]]:
        model, loader = tiny_model(TINY, B, T), Loader([open_shard(tokens, 300)], B, T, True, 42, fellow.rank, 2)
        optimizer, logged, tried = Zero(model, fellow, **SETTINGS, limit=700), list[str](), list[int]()
        journal = SimpleNamespace(log=logged.append)
        writer = CheckpointWriter(fellow, tmp_path / "run", model, optimizer, T, journal, 20, 2)  # type: ignore[arg-type]
        writer.begin(0)
        for step in range(1, 60):
            if writer.due(step):
                tried.append(step)
                writer.save(step, {}, loader.position)
        return tried, logged

    for tried, logged in Fellows(2).run(attempts):
        assert tried == [20, 40]
        assert len(logged) == 2 and all("No space left on device (rank 0)" in line for line in logged)


@pytest.mark.parametrize(
    ("ranks", "given", "environment", "what"),
    [
        (1, False, {}, "alone"), (1, False, {"PMI_SIZE": "x"}, "alone"), (4, True, {}, "launch"),
        (4, False, {}, "launch"),  # from a file of options
        (1, False, {"PMI_SIZE": "4"}, "join"), (1, False, {"OMPI_COMM_WORLD_SIZE": "2"}, "join"),
        (4, True, {"PMI_SIZE": "4"}, "join"), (4, True, {"LLMPY_LAUNCH": "/tmp/x"}, "join"),
        (1, False, {"SLURM_NTASKS": "4"}, "join"),  # refused later if MPI finds one
        (4, True, {"SLURM_NTASKS": "4"}, "launch"),  # in a batch script
        (4, True, {"SLURM_NTASKS": "4", "PMIX_RANK": "0"}, "join"),  # under srun
        (1, True, {"SLURM_NTASKS": "4"}, "alone"), (1, False, {"SLURM_NTASKS": "1"}, "alone"),
    ],
)  # fmt: skip
def test_who_starts_ranks(ranks: int, given: bool, environment: dict[str, str], what: str) -> None:
    assert launch.needed(ranks, given, environment) == what


def test_without_mpi4py_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda _: None)
    with refused("package.missing", "mpi4py", "pip install 'llmpy[mpi]'"):
        launch.run(2, [])


def test_a_limit_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(launch, "mpiexec", lambda: "mpiexec")
    monkeypatch.setattr(launch.subprocess, "Popen", full)
    with refused("mpi.failed", "Resource temporarily unavailable", "ulimit -u"):
        launch.run(2, [])
    monkeypatch.setattr(watch, "few", lambda: True)
    with refused("rank.no-threads", "a limit of processes", "--ranks 1"):
        Fellows(2).run(lambda fellow: Watch(fellow.rank, 20.0).start(fellow.size, fellow.gather_values))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, float], list[Watch]]]:
    """A function that starts so many watchdogs in this process; failures do not end it."""
    monkeypatch.setattr(watch, "GRACE", 60.0)
    found: list[Watch] = []

    def act(fellow: Fellow, patience: float) -> Watch:
        one = Watch(fellow.rank, patience)
        one.start(fellow.size, fellow.gather_values)
        found.append(one)
        return one

    yield lambda size, patience: Fellows(size).run(lambda fellow: act(fellow, patience))
    for one in found:
        one.close()


def failure_of(one: Watch, within: float) -> RankFailure:
    until = time.monotonic() + within
    while one.failure is None and time.monotonic() < until:
        time.sleep(0.01)
    assert one.failure is not None
    return one.failure


@pytest.mark.parametrize("gone", [0, 1])
def test_a_rank_that_dies_is_named(gone: int, watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    send = Watch._send_all
    # A dead rank sends nothing, not even that others seem to be dead.
    monkeypatch.setattr(Watch, "_send_all", lambda self, m: None if self.rank == gone else send(self, m))
    ranks = watched(3, 20.0)
    for peer in ranks[gone]._peers:
        peer.line.shutdown(2)
    for q in {0, 1, 2} - {gone}:
        failure = failure_of(ranks[q], 5)
        assert (failure.rank, failure.lost) == (gone, True) or gone == 0 and q == 0
        assert failure.code == "rank.died" and re.match(rf"rank {gone} \(process \d+ on .*\)", failure.text)


def test_a_rank_that_is_silent_is_named(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    send = Watch._send_all
    monkeypatch.setattr(Watch, "_send_all", lambda self, m: None if self.rank == 2 and "beat" in m else send(self, m))
    ranks = watched(3, 2.0)
    for q in (0, 1):
        failure = failure_of(ranks[q], 6)
        assert failure.code == "rank.silent" and re.search(r"rank 2 .* \d s", failure.text)


def test_a_failure_reaches_all_and_a_farewell_is_not_one(watched: Any) -> None:
    ranks = watched(3, 20.0)
    full = RankFailure(2, "the disk is full", 5, "disk.full")
    ranks[2].broadcast(full)
    assert all(failure_of(one, 5) == full for one in ranks)
    ranks = watched(2, 20.0)
    ranks[1].close()
    time.sleep(0.5)  # for the other to see that the connection is closed
    assert ranks[0].failure is None


COMMAND = [sys.executable, "-m", "llmpy", "train"]


def flags(text: Path, out: Path) -> list[str]:
    return [
        "--data", str(text), "--model", "d1", "--vocab-size", "300", "-B", "2", "-T", "16", "--no-shuffle", "--dtype",
        "float32", "--total-batch", "128", "--sample-tokens", "5", "--eval-batches", "3", "--out", str(out),
    ]  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat", "and", "ran"], 20_000)
    path = tmp_path / "text.txt"
    path.write_text("\n".join(" ".join(words[i : i + 12]) for i in range(0, 20_000, 12)), encoding="utf-8")
    return path


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in records if "loss" in r]


def go(*words: str, code: int = 0, **environment: str) -> str:
    environment = {**os.environ, **environment}
    result = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stderr


def same_run(text: Path, folder: Path, steps: int, ranks: list[int]) -> None:
    """Compare runs of one and several ranks, and two equal runs."""
    go(*flags(text, folder / "1"), "--steps", str(steps))
    one = losses(folder / "1")
    assert len(one) == steps
    for n in ranks:
        go(*flags(text, folder / f"{n}"), "--steps", str(steps), "--ranks", str(n))
        several = losses(folder / f"{n}")
        assert max(abs(a - b) / a for a, b in zip(one, several, strict=True)) < 1e-5
    last = ranks[-1]
    go(*flags(text, folder / "again"), "--steps", str(steps), "--ranks", str(last), "--verify-every", "2")
    assert losses(folder / "again") == losses(folder / f"{last}")
    models = [(folder / run / "model.safetensors").read_bytes() for run in ("again", f"{last}")]
    assert models[0] == models[1]
    manifest = checkpoint.verify(folder / "again" / "checkpoints" / f"step-{steps:08}")
    assert len(manifest["weights_hash"]) == 16


@needs_mpi
def test_two_ranks_train_like_one(text: Path, tmp_path: Path) -> None:
    same_run(text, tmp_path, 6, [2])
    # one rank resumes the run of two, and two that of one
    for run, ranks in (("2", "1"), ("1", "2")):
        go("--resume", str(tmp_path / run), "--steps", "9", "--ranks", ranks)
    assert max(abs(a - b) / a for a, b in zip(*(losses(tmp_path / r) for r in "12"), strict=True)) < 1e-5


@pytest.mark.mpi
@needs_mpi
def test_one_two_and_four_ranks_over_a_hundred_steps(text: Path, tmp_path: Path) -> None:
    same_run(text, tmp_path, 100, [2, 4])


@needs_mpi
def test_one_mpi_process_of_many_tasks_is_refused(text: Path, tmp_path: Path) -> None:
    error = go(*flags(text, tmp_path / "run"), code=1, SLURM_NTASKS="4")
    assert "4 tasks" in error and "--ranks 1 [mpi.one-rank]" in error
    assert not (tmp_path / "run").exists()


@needs_mpi
def test_all_problems_of_ranks_are_reported_at_once_with_their_code(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = go(*flags(tmp_path / "none.txt", tmp_path / "file" / "run"), "--ranks", "2", code=1)
    assert len(re.findall(r"llmpy: error: .*\(1\) .*\(2\) .*none\.txt.* \[[a-z-]+\.[a-z-]+\]$", error, re.M)) == 1
    assert "[rank." not in error and "[mpi." not in error


@needs_mpi
def test_the_launcher_of_another_mpi_is_refused(text: Path, tmp_path: Path) -> None:
    if "Open MPI" in subprocess.run([launch.mpiexec(), "--version"], capture_output=True, text=True).stdout:
        pytest.skip("this is Open MPI")
    error = go(*flags(text, tmp_path / "run"), code=1, OMPI_COMM_WORLD_SIZE="2")
    assert "MPICH" in error and "[mpi.mismatch]" in error
    assert not (tmp_path / "run").exists()


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 100) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.002)


@contextlib.contextmanager
def endless(text: Path, run: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Start a run that does not end by itself; kill it with its ranks after the test."""
    whole = [*COMMAND, *flags(text, run), "--steps", "1000000", "--eval-every", "0", *words]
    with subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                    child.kill()


def ranks_of(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """Return the ranks below a launching process."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a helper of the launcher that has ended
            words = child.environ()
            rank = words.get("PMI_RANK", words.get("OMPI_COMM_WORLD_RANK"))
            if rank is not None and "llmpy" in child.cmdline():
                found[int(rank)] = child
    return found


def lose(text: Path, folder: Path, ranks: int, number: int, whom: int) -> float:
    """Send a signal to one rank of a run; return the seconds until all are gone. Fewer ranks must then resume."""
    run = folder / "run"
    with endless(text, run, "--checkpoint-every", "10", "--ranks", str(ranks)) as process:
        wait_for((run / "checkpoints" / "step-00000010").is_dir, process)
        victims = ranks_of(process)
        assert sorted(victims) == list(range(ranks))
        start = time.monotonic()
        victims[whom].send_signal(number)
        _, error = process.communicate(timeout=60)
        seconds = time.monotonic() - start
    assert process.returncode == 1
    line = next(line for line in error.splitlines() if line.startswith("llmpy: error:"))
    assert f"rank {whom} (process {victims[whom].pid}" in line
    assert f"llmpy train --resume {run} [rank.{'died' if number == signal.SIGKILL else 'silent'}]" in line
    psutil.wait_procs(victims.values(), timeout=5)
    assert not any(p.is_running() for p in victims.values())
    newest = checkpoint.newest(run / "checkpoints", print)
    assert newest is not None
    go("--resume", str(run), "--steps", str(newest[1]["step"] + 2), "--ranks", str(ranks // 2))
    return seconds


@needs_mpi
def test_a_killed_rank_stops_all(text: Path, tmp_path: Path) -> None:
    assert lose(text, tmp_path, 2, signal.SIGKILL, 1) < 10


@pytest.mark.mpi
@needs_mpi
@pytest.mark.parametrize("whom", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_one_lost_rank_of_four_stops_all_within_30_seconds(text: Path, tmp_path: Path, number: int, whom: int) -> None:
    assert lose(text, tmp_path, 4, number, whom) < 30


@needs_mpi
@pytest.mark.parametrize(
    ("number", "when"),
    [
        ("SIGTERM", "launched"), ("SIGINT", "started"), ("SIGTERM", "started"), ("SIGTERM", "claimed"),
        ("SIGHUP", "claimed"),
    ],
)  # fmt: skip
def test_a_signal_before_the_first_step_stops_the_run(text: Path, tmp_path: Path, number: str, when: str) -> None:
    """With only mpiexec, with a rank, or with the run's folder: one line names the signal."""
    run, sent = tmp_path / "run", getattr(signal, number, signal.SIG_IGN)
    if sent is signal.SIG_IGN or signal.getsignal(sent) is signal.SIG_IGN:
        pytest.skip("no such signal here, or under nohup")
    with endless(text, run, "--ranks", "2") as process:
        conditions = {
            "launched": psutil.Process(process.pid).children, "started": lambda: ranks_of(process),
            "claimed": (run / "run.lock").exists,
        }  # fmt: skip
        wait_for(conditions[when], process)
        process.send_signal(sent)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + sent
    (line,) = [line for line in error.splitlines() if line.startswith("llmpy: error")]
    assert ("Ctrl-C" if number == "SIGINT" else number) in line
    assert not run.exists()


@needs_mpi
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_all_ranks_stop_after_a_step_and_save(text: Path, tmp_path: Path, number: int, code: int) -> None:
    """On Ctrl-C, and if the launching process is killed."""
    run = tmp_path / "run"
    with endless(text, run, "--ranks", "2", "--checkpoint-every", "0") as process:
        assert process.stdout is not None
        next(line for line in process.stdout if " 3/" in line)
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == code
    assert len(checkpoint.listed(run / "checkpoints")) == 1


def test_mixed_precision_gathers_rounded_weights() -> None:
    """The received weights are the rounded master weights, as in one process."""
    from llmpy import backend

    def run(fellow: Fellow) -> bool:
        model = GPT2(TINY, backend.load("cpu", threads=1, dtype="bfloat16"))
        model.params.buffer[...] = np.random.default_rng(0).standard_normal(model.params.size) / 50
        model.store_weights()
        model.reserve(B, T, training=True)
        optimizer = Zero(model, fellow, **SETTINGS, limit=700)
        for rows in batches(2, 2):
            optimizer.expect()
            model.loss_and_grads(*rows[fellow.rank], micro_steps=2)
            optimizer.update(1e-2, optimizer.norm())
        master = np.zeros(model.params.size, np.float32)
        optimizer.weights(master)
        vectors = slice(model.matrix_elements, None)
        if fellow.rank:
            return True
        rounded = np.empty_like(model.weights.buffer)
        model.ops.narrow(rounded, master[: model.matrix_elements])
        same = np.array_equal(rounded.view(np.uint16), model.weights.buffer.view(np.uint16))
        return same and np.array_equal(master[vectors], model.params.buffer[vectors])

    # Kernels of one process take turns; only the received weights are tested.
    assert all(Fellows(2).run(run))


@pytest.mark.skipif(os.name != "posix", reason="a launcher in sh")
def test_a_signal_before_there_are_ranks_ends_a_launcher_that_hangs(tmp_path: Path) -> None:
    launcher, children = tmp_path / "mpiexec", tmp_path / "children"
    launcher.write_text(f"""#!/bin/sh
[ "$1" = --version ] && exit
trap '' TERM INT
setsid sleep 1000 & echo $! > {children}
sleep 1000
""")
    launcher.chmod(0o755)
    program = (
        "import sys; from pathlib import Path\n"
        "from llmpy.distributed import launch; from llmpy.errors import LlmpyError\n"
        f"launch.mpiexec = lambda: {str(launcher)!r}\n"
        "try: launch.run(2, [])\n"
        "except LlmpyError as error: print(error.code, error); sys.exit(error.exit_code)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    while not (children.exists() and children.read_text().endswith("\n")):
        time.sleep(0.01)
    time.sleep(0.2)  # for it to look after its child
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 143 and out.startswith("stopped ") and "SIGTERM" in out
    child = int(children.read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE  # not ours to reap


def test_a_checkpoint_of_all_ranks_counts_when_the_run_diverges(tmp_path: Path, tokens: Path) -> None:
    """Training stops while the threads write: the checkpoint is committed before the error is raised."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)

    def diverging(fellow: Fellow) -> str:
        model = tiny_model(TINY, B, T)
        loader = Loader([open_shard(tokens, 300)], B, T, True, 42, fellow.rank, fellow.size)
        optimizer = Zero(model, fellow, **SETTINGS, limit=700)
        options = TrainOptions(checkpoint_every=1, ranks=fellow.size)
        run = Trainer.__new__(Trainer)
        run.checkpoints = CheckpointWriter(fellow, tmp_path / "run", model, optimizer, T, Journal(), 1, 2)
        run.done, run.options, run.guard = 3, options, UpdateGuard({})
        run.checkpoints.begin(2)
        assert run.checkpoints.due(3)
        run.checkpoints.save(3, {"options": options.as_record()}, loader.position)
        return str(run.diverged("the loss is nan"))

    errors = Fellows(2).run(diverging)
    assert all("step 3" in text for text in errors)
    checkpoint.verify(tmp_path / "run" / "checkpoints" / "step-00000003")


def test_verified_steps_of_ranks(tmp_path: Path) -> None:
    """Bitwise as others; the first hash waits for the weights of the last update."""

    def act(fellow: Fellow, every: int) -> np.ndarray:
        exchange = fellow.exchange
        fellow.exchange = lambda *a: (time.sleep(0.003), exchange(*a))[1]  # type: ignore[method-assign,func-returns-value]
        model = tiny_model(TINY, B, T)
        run, options = Trainer.__new__(Trainer), TrainOptions(batch_size=B, sequence_length=T, verify_every=every)
        run.world, run.model, run.optimizer = fellow, model, Zero(model, fellow, **SETTINGS, limit=2000)  # type: ignore
        run.options, run.verification, run.counted = replace(options, steps=3), Verification(model, options), 2 * B * T
        run.elapsed, run.step_seconds = 0.0, 1.0
        for run.done, rows in enumerate(batches(3, 2)):
            run.update = Update([(*rows[fellow.rank], None, B * T)], [], None)  # type: ignore[arg-type]
            run.gradients()
            run.optimizer.update(1e-2, run.optimizer.norm())
        run.optimizer.settle()
        return model.params.buffer

    verified, plain = (Fellows(2).run(lambda fellow, every=every: act(fellow, every)) for every in (1, 0))
    assert all(np.array_equal(x, plain[0]) for x in (*verified, plain[1]))


@pytest.mark.parametrize(("ranks", "other"), [(3, None), (3, 1), (3, 2), (2, 1)])
def test_ranks_with_other_weights_stop(tmp_path: Path, ranks: int, other: int | None) -> None:
    """The rank `other` has one flipped bit. Of two, either may be wrong."""

    def act(fellow: Fellow) -> Any:
        model = tiny_model(TINY, B, T)
        run = Trainer.__new__(Trainer)
        run.world, run.model, run.optimizer = fellow, model, Zero(model, fellow, **SETTINGS, limit=700)  # type: ignore
        run.checkpoints = CheckpointWriter(fellow, tmp_path / "run", model, run.optimizer, T, Journal(), 0, 2)
        run.agreed, run.done, run.hash, run.checkpoints.last = None, 250, "", 200
        run.compare_ranks()
        run.done = 500
        if fellow.rank == other:
            model.params.attn_proj_b.view(np.int32)[1, 3] ^= 1 << 30
        try:
            run.compare_ranks()
        except LlmpyError as error:
            return error.code, error.message, error.hint
        return run.agreed, run.hash

    found = Fellows(ranks).run(act)
    assert len({*found}) == 1  # all ranks stop, for the same reason
    if other is None:
        assert found[0][0] == 500 and len(found[0][1]) == 16
    else:
        code, message, hint = found[0]
        assert code == "rank.weights-differ" and "agreed after step 250; the checkpoint of step 200" in message
        odd = f"rank {other} from the others" if ranks > 2 else "ranks 0, 1"
        assert message.startswith(f"step 500: weights differ: {odd};") and "--resume" in hint


@pytest.mark.parametrize("variable", ["SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_a_scheduler_without_mpi(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (launch.PARENT, "PMIX_RANK", *launch.TASKS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "4")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert launch.needed(1, given=False) == "join"
    with refused("package.missing", variable, "--ranks 1", "llmpy[mpi]"):
        world.join(TrainOptions())
    assert launch.needed(1, given=True) == "alone"
