"""A run that is stopped at any step and resumed is bitwise identical to an uninterrupted one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.laptop import CLOCKED, AtOnce, Laptop
from support.refused import refused

from llmpy import backend
from llmpy.backend.machine import Machine
from llmpy.data.shards import write_shard
from llmpy.errors import LlmpyError
from llmpy.model.gpt2 import GPT2
from llmpy.options.train import TrainOptions
from llmpy.run import checkpoint, checkpoint_writer
from llmpy.run.parts import part_name
from llmpy.system import durable
from llmpy.train import assemble, samples, trainer

STEPS = 200
# Shards of 62, 46 and 31 batches of 2 x 16: with two batches per step, shards and the epoch end within steps (the epoch
# in step 70); evaluations at multiples of 50, detectors full from step 128 on.
SIZES = (2000, 1500, 1000)
EDGES = (50, 69, 129)


def data(folder: Path) -> tuple[Path, ...]:
    """Write three training shards and one for validation."""
    rng = np.random.default_rng(0)
    paths = [folder / f"train_{i}.bin" for i in range(len(SIZES))] + [folder / "val.bin"]
    for path, size in zip(paths, (*SIZES, 600), strict=True):
        write_shard(path, rng.integers(0, 300, size))
    return tuple(paths)


def options(folder: Path, **changes: Any) -> TrainOptions:
    given: dict[str, Any] = {
        "data": tuple(sorted(folder.glob("*.bin"))) or data(folder), "out": folder / "run", "model": "d1",
        "vocab_size": 300, "batch_size": 2, "sequence_length": 16, "total_batch": 64, "steps": STEPS, "eval_every": 50,
        "eval_batches": 2, "sample_every": 70, "sample_tokens": 2, "checkpoint_every": 1, "keep": 0, "lr": 3e-3,
        "skip_norm": 2.0,
    }  # fmt: skip
    return TrainOptions(**given | changes)


def outcome(run: Path, steps: int = STEPS) -> dict[str, Any]:
    """Return everything of a run that must be equal: all but times."""
    last = run / "checkpoints" / f"step-{steps:08}"
    found: dict[str, Any] = {name: (last / name).read_bytes() for name in (checkpoint.MODEL, part_name(0, 1))}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    found["metrics"] = [{k: v for k, v in r.items() if k not in CLOCKED} for r in rows]
    found |= {name: (run / name).read_bytes() for name in ("main.log", "samples.txt", "model.safetensors")}
    manifest = checkpoint.verify(last)
    for name in ("seconds", "logs", "options"):  # times, file sizes, changed options
        del manifest[name]
    return found | {"manifest": manifest}


def cut_to(run: Path, step: int, to: Path) -> Path:
    """Copy the run folder as left by a kill after the checkpoint of `step`; checkpoint files are linked."""

    def copy(source: str, target: str) -> None:
        (os.link if Path(source).parent.parent.name == "checkpoints" else shutil.copy2)(source, target)

    shutil.copytree(run, to, copy_function=copy, ignore=lambda folder, names: [
        name for name in names if (match := checkpoint.NAME.fullmatch(name)) and int(match[1]) > step
    ])  # fmt: skip
    return to


def resumed(run: Path, **changes: Any) -> TrainOptions:
    return TrainOptions(resume=run, given=frozenset(changes), **changes)


def resume_everywhere(folder: Path, places: Any, machine: Callable[[], Machine], **changes: Any) -> None:
    """Run with a checkpoint at every step; resume from each of `places` and compare."""
    given = options(folder, **changes)
    assert assemble.train(given, machine()) == 0
    last = given.steps or 0
    expected = outcome(folder / "run", last)
    for step in places:
        run = cut_to(folder / "run", step, folder / "cut")
        assert assemble.train(resumed(run, checkpoint_every=0), machine()) == 0
        found = outcome(run, last)
        assert [name for name in expected if found[name] != expected[name]] == [], f"after step {step}"
        shutil.rmtree(run)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write each checkpoint before the next step, so that every step has one."""
    monkeypatch.setattr(checkpoint_writer, "Thread", AtOnce)


@pytest.mark.parametrize("every", [50, 0])
def test_resume_at_the_edges(tmp_path: Path, every: int) -> None:
    resume_everywhere(tmp_path, EDGES if every else (127,), Laptop, eval_every=every)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_on_the_cpu(tmp_path: Path, dtype: str) -> None:
    resume_everywhere(tmp_path, (1, 4), lambda: backend.load("cpu", dtype=dtype), steps=6, eval_every=3, dtype=dtype)


@pytest.mark.long
@pytest.mark.parametrize("every", [50, 0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_at_every_step(tmp_path: Path, dtype: str, every: int) -> None:
    machine = backend.load("cpu", dtype=dtype)
    resume_everywhere(tmp_path, range(1, STEPS), lambda: machine, eval_every=every, dtype=dtype)


def test_the_first_resumed_step_shows_its_own_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not the mean of the earlier process."""
    assert assemble.train(options(tmp_path, steps=5), Laptop()) == 0
    run = cut_to(tmp_path / "run", 4, tmp_path / "cut")
    capsys.readouterr()
    assert assemble.train(resumed(run), Laptop()) == 0
    rows = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    row = next(r for r in rows if r["step"] == 5 and "ms" in r)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("        5/5"))
    assert f" {row['ms']:.0f} {row['tokens_per_s']:7,.0f} " in line


def test_a_run_on_text_resumes_with_its_own_tokens(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the cat number {i} sat on the mat" for i in range(400)), "utf-8")
    given = options(tmp_path, data=(text,), steps=12, total_batch=None, checkpoint_every=5, sample_every=0)
    assert assemble.train(given, Laptop()) == 0
    run = cut_to(tmp_path / "run", 5, tmp_path / "cut")
    text.unlink()
    assert assemble.train(TrainOptions(resume=run), Laptop()) == 0
    assert outcome(run, 12) == outcome(tmp_path / "run", 12)


def steps_of(run: Path) -> list[int]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [r["step"] for r in rows if "loss" in r]


def test_more_steps_after_the_end_and_other_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert assemble.train(options(tmp_path, steps=6, checkpoint_every=0), Laptop()) == 0
    before = outcome(run, 6)
    assert assemble.train(resumed(run), Laptop()) == 0
    assert "the run is complete: 6 steps" in capsys.readouterr().out
    assert outcome(run, 6) == before
    with refused("resume.fewer-steps", "--steps 5 ", "6 steps"):
        assemble.train(resumed(run, steps=5), Laptop())
    with refused("resume.fewer-steps", "--minutes "):
        assemble.train(resumed(run, minutes=1e-6), Laptop())
    assert assemble.train(resumed(run, steps=8), Laptop()) == 0
    assert steps_of(run) == [*range(1, 9)]
    given = resumed(run, steps=10, batch_size=4, threads=3, lr=1e-4, total_batch=128)
    assert assemble.train(given, Laptop()) == 0
    assert steps_of(run) == [*range(1, 11)]
    out = capsys.readouterr().out
    assert "batch 4 x 16 instead of 2 x 16: " in out
    assert "lr is 0.0001 instead of 0.003 " in out
    config = json.loads((run / "config.json").read_text("utf-8"))["options"]
    assert (config["batch_size"], config["steps"], config["lr"]) == (4, 10, 1e-4)


def test_what_cannot_change(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert assemble.train(options(tmp_path, steps=2), Laptop()) == 0
    for name, value in (("model", "d2"), ("seed", 7), ("vocab_size", 400)):
        with pytest.raises(LlmpyError, match=f"--{name.replace('_', '-')} "):
            assemble.train(resumed(run, **{name: value}), Laptop())
    write_shard(tmp_path / "train_1.bin", np.arange(1500) % 300)
    with refused("data.changed", run):
        assemble.train(resumed(run), Laptop())
    with refused("run.missing", tmp_path / "nowhere"):
        assemble.train(resumed(tmp_path / "nowhere"), Laptop())


def test_a_corrupt_checkpoint_is_skipped_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert assemble.train(options(tmp_path, steps=6), Laptop()) == 0
    expected = outcome(run, 6)
    for step, name in ((6, part_name(0, 1)), (5, checkpoint.MANIFEST)):
        path = run / "checkpoints" / f"step-{step:08}" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    assert assemble.train(resumed(run), Laptop()) == 0
    out = capsys.readouterr().out
    for name in ("step-00000006/state-00000-of-00001.safetensors", "step-00000005/manifest.json", "to step 4;"):
        assert name in out
    assert outcome(run, 6) == expected
    assert len(list((run / "checkpoints").glob("damaged-*"))) == 2
    for path in run.glob("checkpoints/step-*/manifest.json"):
        path.write_bytes(b"{}")
    with refused("checkpoint.corrupt", run / "checkpoints"):
        assemble.train(resumed(run), Laptop())


def test_auto_resume_starts_or_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert assemble.train(options(tmp_path, steps=2, auto_resume=True), Laptop()) == 0
    given = options(tmp_path, steps=4, auto_resume=True)
    given = TrainOptions(
        **{n: getattr(given, n) for n in ("data", "out", "auto_resume", "steps")}, given=frozenset({"steps"})
    )
    assert assemble.train(given, Laptop()) == 0
    assert "resuming after step 2," in capsys.readouterr().out
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]


def test_a_stop_and_the_clock_leave_a_run_to_resume(tmp_path: Path) -> None:
    class Stopping(Laptop):
        updates = 0

        def adamw(self, *arguments: Any) -> None:
            super().adamw(*arguments)
            self.updates += 1
            if self.updates == 6:  # two per step
                signal.raise_signal(signal.SIGTERM)

    assert assemble.train(options(tmp_path, steps=8, out=tmp_path / "whole"), Laptop()) == 0
    run = tmp_path / "run"
    assert assemble.train(options(tmp_path, steps=8, checkpoint_every=0), Stopping()) == 143
    assert [p.name for p in checkpoint.listed(run / "checkpoints")] == ["step-00000003"]
    assert assemble.train(resumed(run, checkpoint_every=1), Laptop()) == 0
    assert outcome(run, 8)["metrics"] == outcome(tmp_path / "whole", 8)["metrics"]
    timed = options(tmp_path, out=tmp_path / "timed", steps=None, minutes=0.01)
    assert assemble.train(timed, Laptop()) == 0
    made = len(steps_of(tmp_path / "timed"))
    assert assemble.train(resumed(tmp_path / "timed", steps=made + 5), Laptop()) == 0
    assert len(steps_of(tmp_path / "timed")) == made + 5


@pytest.mark.parametrize("step", [0, 4])
@pytest.mark.parametrize("what", ["evaluation", "sample"])
@pytest.mark.parametrize("every", [1, 0])
def test_a_stop_between_steps_leaves_no_gap_and_no_double(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, what: str, every: int
) -> None:
    """An evaluation or sample interrupted between two steps is in the end done exactly once."""
    given = {"steps": 8, "eval_every": 2, "sample_every": 2, "sample_tokens": 6}
    assert assemble.train(options(tmp_path, out=tmp_path / "whole", **given), Laptop()) == 0
    if what == "evaluation":
        true_loss = GPT2.loss

        def loss(model: Any, *arguments: Any) -> float:
            signal.raise_signal(signal.SIGTERM)
            return true_loss(model, *arguments)

        def chosen(model: Any, *arguments: Any) -> float:
            return (loss if here() else true_loss)(model, *arguments)

        monkeypatch.setattr(GPT2, "loss", chosen)
    else:
        true_generate = samples.generate

        def generate(*arguments: Any, **more: Any) -> Any:
            for i, token in enumerate(true_generate(*arguments, **more)):
                if i == 2 and here():
                    signal.raise_signal(signal.SIGTERM)
                yield token

        monkeypatch.setattr(samples, "generate", generate)
    made: list[trainer.Trainer] = []
    true_run = trainer.Trainer.run
    monkeypatch.setattr(trainer.Trainer, "run", lambda self: (made.append(self), true_run(self))[1])

    def here() -> bool:
        return len(made) == 1 and made[0].done == step and not made[0].stop.signal

    stopped = assemble.train(options(tmp_path, checkpoint_every=every, **given), Laptop())
    run = tmp_path / "run"
    if what == "sample" and step == 0:
        assert stopped == 0  # no sample is due before the first step
    else:
        assert stopped == 143
        assert [p.name for p in checkpoint.listed(run / "checkpoints")][0] == f"step-{step:08}"
    assert assemble.train(resumed(run, checkpoint_every=1), Laptop()) == 0
    assert outcome(run, 8) == outcome(tmp_path / "whole", 8)


def test_a_file_of_options_may_be_given_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options that it leaves open stay those of the run."""
    from llmpy.options.yaml_files import as_yaml

    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    data(tmp_path / "shards")
    first = options(tmp_path, steps=3, lr=None, data=(Path("shards"),), model="")
    (tmp_path / "run.yaml").write_text(as_yaml(first), "utf-8")
    first = TrainOptions.gather({"config": tmp_path / "run.yaml", "out": tmp_path / "run"})
    assert assemble.train(first, Laptop()) == 0
    again = TrainOptions.gather({"config": tmp_path / "run.yaml", "resume": tmp_path / "run", "steps": 5})
    assert assemble.train(again, Laptop()) == 0
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4, 5]
    assert json.loads((tmp_path / "run" / "config.json").read_text("utf-8"))["options"]["data"] == [
        str(tmp_path / "shards")
    ]


def test_data_that_moved_or_changed(tmp_path: Path) -> None:
    assert assemble.train(options(tmp_path, steps=2), Laptop()) == 0
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in tmp_path.glob("*.bin"):
        path.rename(moved / f"my_{path.name}")
    with pytest.raises(LlmpyError):
        assemble.train(resumed(tmp_path / "run", steps=4), Laptop())
    assert assemble.train(resumed(tmp_path / "run", steps=4, data=(moved,)), Laptop()) == 0
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the cat number {i} sat on the mat" for i in range(400)), "utf-8")
    of_text = tmp_path / "of text"
    assert assemble.train(options(tmp_path, data=(text,), steps=2, out=of_text), Laptop()) == 0
    assert assemble.train(resumed(of_text, data=(text,), steps=3), Laptop()) == 0
    (tmp_path / "other.txt").write_text("another text\n" * 1000, "utf-8")
    for changes, flag in (({"data": (tmp_path / "other.txt",)}, "--data"), ({"init": str(tmp_path / "run")}, "--init")):
        with refused("resume.fixed-option", flag):
            assemble.train(resumed(of_text, steps=4, **changes), Laptop())


crash = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="forks, and reads Linux's list of open files")


def campaigns(folder: Path, first: int, stride: int, *modes: str) -> list[dict[str, int]]:
    """Run crash.py in each mode, all at once."""
    found = []
    with contextlib.ExitStack() as stack:
        started = []
        for mode in modes:
            (folder / mode).mkdir()
            words = [sys.executable, "-m", "support.crash", str(folder / mode), mode, str(first), str(stride)]
            env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
            started.append(subprocess.Popen(words, cwd=Path(__file__).parents[1], env=env, **pipes))  # type: ignore[call-overload]
            stack.enter_context(started[-1])
            stack.callback(started[-1].kill)
        for process in started:
            out, err = process.communicate()
            assert process.returncode == 0, err[-3000:]
            found.append(dict(json.loads(out.splitlines()[-1])))
    return found


@crash
def test_some_crashes(tmp_path: Path) -> None:
    assert all(found["disturbed"] > 8 for found in campaigns(tmp_path, 1, 8, "kill", "power", "full"))


@crash
def test_some_random_kills(tmp_path: Path) -> None:
    (found,) = campaigns(tmp_path, 15, 1, "random")
    assert found["disturbed"] >= 15


@crash
@pytest.mark.long
@pytest.mark.parametrize("mode", ["kill", "power", "full"])
def test_crashes_at_every_operation(tmp_path: Path, mode: str) -> None:
    (found,) = campaigns(tmp_path, 1, 1, mode)
    assert found["disturbed"] == 2 * found["operations"]


@crash
@pytest.mark.long
def test_a_thousand_random_kills(tmp_path: Path) -> None:
    (found,) = campaigns(tmp_path, 1000, 2, "random")
    assert found["disturbed"] >= 1000


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE])
def test_a_temporarily_unreadable_checkpoint_is_not_corrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    run = tmp_path / "run"
    assert assemble.train(options(tmp_path, steps=3), Laptop()) == 0
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    true = durable.stretches_differ

    def refuse(path: Path, *given: Any) -> str:
        if path.parent.name == "step-00000003":
            raise OSError(number, os.strerror(number), str(path))
        return true(path, *given)

    monkeypatch.setattr(durable, "stretches_differ", refuse)
    with refused("file.unreadable", "step-00000003", os.strerror(number)):
        assemble.train(resumed(run, steps=4), Laptop())
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before
    number = errno.EIO
    assert assemble.train(resumed(run, steps=4), Laptop()) == 0
    assert (run / "checkpoints" / "damaged-step-00000003").is_dir()


SMALL = "--model d1 -T 16 -B 1 --eval-batches 1 --sample-tokens 1 --dtype float32"


def started(run: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    """Start `llmpy train` in another process."""
    text = run.with_name("text.txt")
    text.write_text("the cat sat on the mat and the dog ran to the sea\n" * 200, "utf-8")
    command = [sys.executable, "-m", "llmpy", "train", *SMALL.split(), "--data", str(text), *words]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen(command, env=os.environ | environment, **quiet)  # type: ignore[call-overload, no-any-return]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such signals")
@pytest.mark.parametrize("after", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_before_the_first_step_leaves_nothing(tmp_path: Path, after: float, number: int, name: str) -> None:
    """Or a run to resume, if it came too late."""
    run = tmp_path / "below" / "run"
    run.parent.mkdir()
    process = started(run, "--out", str(run), "--steps", "1000000")
    while not (run / "run.lock").exists():
        time.sleep(0.002)
        assert process.poll() is None
    time.sleep(after)
    process.send_signal(number)
    err = process.communicate()[1]
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    if (run / "console.log").exists():
        assert (run / "checkpoints").is_dir()
        assert "stopping after this step" in err
    else:
        assert re.fullmatch(f"llmpy: error: .*{name}.*\n", err)
        assert [*run.parent.rglob("*")] == [run.parent / "text.txt"]
    assert not (run / "run.lock").exists()


@pytest.mark.parametrize("B", [1, 4, 6])
@pytest.mark.parametrize("shuffle", [True, False])
def test_other_batches_read_the_rest_of_a_shard_once(B: int, shuffle: bool) -> None:
    from llmpy.data.loader import Loader
    from llmpy.data.shards import Shard

    shard = Shard(Path("s"), np.arange(16 * 120 + 1, dtype=np.uint16))
    old = Loader([shard], 2, 16, shuffle)
    seen = [int(t) for _ in range(23) for t in old.next()[0].reshape(-1)]
    new = Loader([shard], B, 16, shuffle)
    new.resume(old.position, 32)
    left = (len(new._sample_order) - new._sample) * B * 16
    assert abs(left - (1920 - len(seen))) <= B * 16 * (23 if shuffle else 1)
    first = new.next()[0].reshape(-1).tolist()
    if not shuffle:
        assert abs(first[0] - len(seen)) < B * 16
    if B == 1:
        later = [int(t) for _ in range(left // 16 - 1) for t in new.next()[0].reshape(-1)]
        assert sorted([*first, *later, *seen]) == list(range(1920))
