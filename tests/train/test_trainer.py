"""Whole runs on the reference backend: their files, their ends, and refusals that leave nothing behind."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.laptop import CLOCKED, AtOnce, Laptop
from support.refused import refused

from llmpy.cli.sample import sample
from llmpy.data.shards import write_shard
from llmpy.data.user_data import prepare
from llmpy.errors import LlmpyError
from llmpy.generate.generation import open_run
from llmpy.model.gpt2 import GPT2
from llmpy.options.sample_chat import SampleOptions
from llmpy.options.train import BUILTIN_PROMPT, TrainOptions
from llmpy.run import checkpoint, checkpoint_writer
from llmpy.run.folder import RunFolder
from llmpy.run.journal import Journal
from llmpy.run.parts import part_name
from llmpy.system.durable import write_whole
from llmpy.system.lock import Lock
from llmpy.train import assemble, memory, trainer
from llmpy.train.signals import StopSignals
from llmpy.train.training_data import check_enough
from llmpy.watch.curves import Curves

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "old", "red", "house", "by", "sea", "."]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of simple sentences."""
    rng = np.random.default_rng(0)
    path = tmp_path / "my text.txt"
    lines = [" ".join(rng.choice(WORDS, 12)) for _ in range(400)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


Options = Callable[..., TrainOptions]


@pytest.fixture
def options(text: Path, tmp_path: Path) -> Options:
    """Options of a run of one second, with changes."""

    def make(**changes: Any) -> TrainOptions:
        small: dict[str, Any] = {
            "data": (text,), "model": "d1", "out": tmp_path / "run", "batch_size": 2, "sequence_length": 16,
            "steps": 4, "eval_batches": 2, "sample_tokens": 5, "vocab_size": 300,
        }  # fmt: skip
        return TrainOptions(**small | changes)

    return make


def test_validation_batches_are_weighted_by_their_targets(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = np.random.default_rng(0).integers(0, 300, 2 * 16 * 4 + 1)
    write_shard(tmp_path / "train.bin", tokens)

    def val_loss(name: str, batches: int, counted: np.ndarray) -> float:
        write_shard(tmp_path / "val.bin", tokens, counted=counted)
        data = tmp_path / "train.bin", tmp_path / "val.bin"
        assemble.train(options(data=data, out=tmp_path / name, eval_batches=batches, steps=1), Laptop())
        return next((r["val_loss"] for r in metrics(tmp_path / name) if "val_loss" in r), math.nan)

    everywhere = np.ones(tokens.size, bool)
    half, none = everywhere.copy(), np.zeros(tokens.size, bool)
    half[33:] = False  # from the second batch on
    alone = val_loss("alone", 1, everywhere)
    assert val_loss("masked", 2, half) == alone
    row = none.copy()
    row[33:49] = half[33:49] = True  # in the second batch: half the weight of the first
    assert val_loss("both", 2, half) == pytest.approx((alone + val_loss("row", 2, row) / 2) / 1.5, rel=1e-12)
    assert "are masked" not in capsys.readouterr().out
    late = none.copy()
    late[-9:] = True  # after the batches that are measured
    assert math.isnan(val_loss("late", 2, late))
    assert "all targets of the 2 validation batches are masked" in capsys.readouterr().out
    with refused("data.nothing-counted", "validation"):
        val_loss("none", 2, none)


def test_batches_without_a_target_report_no_loss(options: Options, tmp_path: Path, capsys: Any) -> None:
    tokens, counted = np.random.default_rng(0).integers(0, 300, 2 * 16 * 6 + 1), np.ones(2 * 16 * 6 + 1, bool)
    counted[33:97] = False  # the second and third batch
    data = tmp_path / "train.bin", tmp_path / "val.bin"
    write_shard(data[0], tokens, counted=counted)
    write_shard(data[1], tokens)
    assert assemble.train(options(data=data, steps=6, shuffle=False, checkpoint_every=0), Laptop()) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r" *\d/6 ", line)]
    assert [row[1:3] == ["no", "target"] for row in rows] == [False, True, True, False, False, False]
    assert not any(float(row[1]) == 0 for row in rows if row[1] != "no")
    steps = [row for row in metrics(tmp_path / "run") if "ms" in row]
    assert [row["step"] for row in steps if "loss" in row] == [1, 4, 5, 6]
    assert len(steps) == 6 and steps[1]["grad_norm"] == 0
    lines = (tmp_path / "run" / "main.log").read_text("utf-8").splitlines()
    assert [line.split()[0] for line in lines if "trl:" in line] == ["s:0", "s:3", "s:4", "s:5"]
    with (tmp_path / "run" / "metrics.jsonl").open("rb") as file:
        curves = Curves(file)
    assert curves.points("loss")[0].tolist() == [1, 4, 5, 6] and curves.points("grad_norm").shape == (2, 6)


def test_token_files_in_which_nothing_counts(options: Options, tmp_path: Path) -> None:
    """End-of-text alone does not count; without a tokenizer it is the last token."""
    tokens = np.random.default_rng(0).integers(0, 299, 300)
    tokens[::10] = 299
    data = tmp_path / "train.bin", tmp_path / "val.bin"
    for counted in (np.zeros(300, bool), tokens == 299):
        write_shard(data[0], tokens, counted=counted)
        write_shard(data[1], tokens)
        with refused("data.nothing-counted"):
            assemble.train(options(data=data), Laptop())
    assert assemble.train(options(data=data, overfit=True, steps=1), Laptop()) == 0  # trains on the validation part


def test_the_name_of_a_dataset_is_kept(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = tmp_path / "cache" / "tinyshakespeare" / "bytes"
    made.mkdir(parents=True)
    (made / "dataset.json").write_text("{}", "utf-8")
    for name in ("train.bin", "val.bin"):
        write_shard(made / name, np.arange(250))
    assert assemble.train(options(data=(Path("tinyshakespeare"),), checkpoint_every=2), Laptop()) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text("utf-8"))
    assert config["options"]["data"] == ["tinyshakespeare"]
    assert assemble.train(TrainOptions(resume=tmp_path / "run", steps=6, given=frozenset({"steps"})), Laptop()) == 0
    assert metrics(tmp_path / "run")[-1]["step"] == 6


def test_a_run_on_records_resumes_with_its_masks(options: Options, tmp_path: Path) -> None:
    rows = [{"prompt": f"How much is {i} and 1?", "completion": f" It is {i + 1}."} for i in range(200)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    assert assemble.train(options(data=(tmp_path / "sums.jsonl",)), Laptop()) == 0
    run = tmp_path / "run"
    assert (run / "train.mask").exists()
    more = TrainOptions(resume=run, steps=6, given=frozenset({"steps"}))
    assert assemble.train(more, Laptop()) == 0
    mask = (run / "train.mask").read_bytes()
    (run / "train.mask").write_bytes(mask[:1024] + bytes(len(mask) - 1024))
    with refused("data.changed", run):
        assemble.train(more, Laptop())


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder and its subfolders."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_files_of_a_run(options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = Laptop()
    assert assemble.train(options(eval_every=2, sample_every=3), machine) == 0
    run = tmp_path / "run"
    assert machine.warmed == 1
    files = ("manifest.json", "model.safetensors", part_name(0, 1))
    whole = [f"checkpoints/step-00000004/{name}" for name in files]
    assert sorted(contents(run)) == [
        "best.safetensors", *whole, "config.json", "console.log", "main.log", "metrics.jsonl", "model.safetensors",
        "samples.txt", "tokenizer.json", "train.bin", "val.bin",
    ]  # fmt: skip
    rows = metrics(run)
    steps = [r for r in rows if "loss" in r]
    evaluations = [r for r in rows if "val_loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4]
    assert set(steps[0]) == {"step", "loss", "lr", "grad_norm", *CLOCKED}
    assert [r["step"] for r in evaluations] == [0, 2, 4]
    assert evaluations[0]["val_loss"] == pytest.approx(math.log(300), rel=0.1)
    assert all(math.isfinite(v) for r in rows for v in r.values())
    out = capsys.readouterr().out
    assert out == (run / "console.log").read_text("utf-8")
    llmc = (run / "main.log").read_text("utf-8").splitlines()
    assert [line.split()[0] for line in llmc] == ["s:0", "s:0", "s:1", "s:2", "s:2", "s:3", "s:4"]
    assert re.fullmatch(r"s:0 tel:\d\.\d{4}", llmc[0])
    assert re.fullmatch(r"s:0 trl:\d\.\d{4} lr:0\.\d{6} norm:\d\.\d{2}", llmc[1])
    samples = (run / "samples.txt").read_text("utf-8")
    assert re.findall(r"--- step (\d)", samples) == ["3", "4"]
    for part in ("parameters", "measured peak", "        4/4  ", "sample at step 3", "sample at step 4"):
        assert part in out
    assert f"llmpy sample {run}" in out
    table = [line for line in out.splitlines() if re.match(r" +(step|\d/4) ", line)]
    assert [len(line) for line in table] == [80] * 5
    config = json.loads((run / "config.json").read_text("utf-8"))
    assert config["model"]["channels"] == 64
    assert config["options"]["steps"] == 4
    assert config["machine"]["isa"] == "numpy"
    assert {"platform", "python", "command"} <= set(config["machine"])
    assert [mark["name"] for mark in config["data"]["train"]] == ["train.bin"]
    header, tokenizer = open_run(run)
    assert header.trained_length == 16
    assert tokenizer.vocab_size == header.config.vocab_size


def test_a_speed_above_the_peak_is_noted_once(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    machine = Laptop()
    machine.measure_peak = lambda: 1e-9  # type: ignore[method-assign]
    assert assemble.train(options(), machine) == 0
    assert capsys.readouterr().out.count("above the measured peak") == 1


def test_it_learns_and_the_result_can_be_sampled(options: Options, tmp_path: Path) -> None:
    assert assemble.train(options(steps=60, lr=1e-2), Laptop()) == 0
    losses = [r["val_loss"] for r in metrics(tmp_path / "run") if "val_loss" in r]
    assert losses[-1] < 0.6 * losses[0]
    out: list[str] = []
    sample(SampleOptions(tmp_path / "run", prompt=("the cat",), tokens=20, top_k=5), out.append, Laptop())
    assert set("".join(out)[7:].split()) & set(WORDS)


def test_two_runs_are_the_same(options: Options, tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        assemble.train(options(out=tmp_path / name), Laptop())
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    assemble.train(options(out=tmp_path / "c", seed=7), Laptop())
    assert (tmp_path / "c" / "model.safetensors").read_bytes() != files[0]


def updates_with(folder: Path, micro_steps: int, masked: bool) -> tuple[np.ndarray, list[float]]:
    """Return the gradients of a batch of 48 rows, whole or in micro-batches, and the losses of three steps."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 300, 48 * 16 * 3 + 1)
    counted = np.arange(tokens.size) % 400 < rng.integers(60, 300, 6).repeat(400)[: tokens.size] if masked else None
    write_shard(folder / "train.bin", tokens, counted=counted)
    write_shard(folder / "val.bin", np.arange(500) % 300)
    machine = Laptop()
    run = RunFolder.open(folder / f"run{micro_steps}", "d1")
    small = TrainOptions(
        data=(folder / "train.bin", folder / "val.bin"), model="d1", vocab_size=300, batch_size=48 // micro_steps,
        sequence_length=16, total_batch=48 * 16, steps=3, shuffle=False, eval_every=0,
    )  # fmt: skip
    with Journal() as journal:
        made = assemble.assemble(small, run, journal, machine)
        made.update = made.data.read()
        made.agree(loss=0.0)
        made.gradients()
        assert made.model.grads is not None
        gradients = made.model.grads.buffer.copy()
        made.data.train.reset()
        made.run()
    run.discard()
    return gradients, [r["loss"] for r in metrics(run.path) if "loss" in r]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("micro_steps", [2, 3, 8])
def test_micro_batches_are_one_batch(tmp_path: Path, micro_steps: int, masked: bool) -> None:
    whole, losses = updates_with(tmp_path, 1, masked)
    parts, their_losses = updates_with(tmp_path, micro_steps, masked)
    assert np.abs(parts - whole).max() < 1e-6
    assert np.linalg.norm(parts - whole) < 1e-6 * np.linalg.norm(whole)
    # Adam divides by √v, which amplifies rounding where v is tiny, but not in the loss.
    assert their_losses == pytest.approx(losses, abs=1e-5)


def test_overfitting_reads_one_batch(options: Options, tmp_path: Path) -> None:
    assert assemble.train(options(overfit=True, steps=30, lr=1e-2, schedule="constant"), Laptop()) == 0
    losses = [r["loss"] for r in metrics(tmp_path / "run") if "loss" in r]
    assert losses[-1] < 0.2 * losses[0]


def test_an_outlier_is_skipped(options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Spiking(Laptop):
        batches = 0

        def classifier(self, losses: Any, dinp: Any, dwte: Any, *rest: Any) -> None:
            super().classifier(losses, dinp, dwte, *rest)
            self.batches += dinp is not None
            if dinp is not None and self.batches == 140:
                losses[...] += 100

    assert assemble.train(options(steps=142, lr=1e-9, skip_loss=5.0, verify_every=0), Spiking()) == 0
    rows = {r["step"]: r for r in metrics(tmp_path / "run") if "loss" in r}
    assert [step for step, r in rows.items() if "skipped" in r] == [140]
    assert rows[140]["loss_z"] > 5
    assert "loss_z" not in rows[128]
    assert "loss_z" in rows[129]
    assert "step 140: skipped: the loss is 1" in capsys.readouterr().out


def test_all_problems_are_reported_together(options: Options, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    bad = options(out=tmp_path / "file" / "run", data=(tmp_path / "a", tmp_path / "b"), model="d4x", total_batch=33)
    names = ("5 problems: (1) ", "[run.unwritable]; (2) ", "d4x", "--total-batch 33", tmp_path / "a", "(5) ")
    with refused("run.refused", *names, tmp_path / "b"):
        assemble.train(bad, Laptop())


@pytest.mark.parametrize("init", ["nowhere", "gpt2", "run"])
def test_problems_of_a_model_too(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: str) -> None:
    """Without downloading it."""
    (tmp_path / "file").touch()
    if init == "run":
        assemble.train(options(), Laptop())
        monkeypatch.chdir(tmp_path)
    model = "d4" if init == "run" else ""
    bad = options(out=tmp_path / "file" / "run", init=init, model=model, hellaswag=tmp_path / "file")
    of_init = {"nowhere": "nowhere", "gpt2": "", "run": "--model d4"}
    with refused("run.refused", "problems: (1) ", "[run.unwritable]", f"{tmp_path / 'file'} ", of_init[init]):
        assemble.train(bad, Laptop())


@pytest.mark.parametrize(
    ("lines", "pattern"),
    [(10, r"\b1,000\b"), (30, r"-B 4 -T 128 requires 513 and 129\. .* [\d.]+ times")],
)
def test_too_little_text(
    text: Path, options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: int, pattern: str
) -> None:
    """The hints work, and a folder that does not exist is not named."""
    whole = text.read_text("utf-8").splitlines()
    text.write_text("\n".join(whole[:lines]), "utf-8")
    batch = {"batch_size": 4, "sequence_length": 128}
    with pytest.raises(LlmpyError, match=pattern) as caught:
        assemble.train(options(**batch), Laptop())
    assert "run" not in capsys.readouterr().out and not (tmp_path / "run").exists()
    smaller = re.search(r"use -B (\d+) -T (\d+)$", str(caught.value))
    if smaller:
        B, T = map(int, smaller.groups())
        assert assemble.train(options(batch_size=B, sequence_length=T), Laptop()) == 0
        times = float(re.search(r"about ([\d.]+) times", str(caught.value))[1])  # type: ignore[index]
        text.write_text("\n".join(whole[: math.ceil(times * lines) + 1]), "utf-8")
        assert assemble.train(options(**batch, out=tmp_path / "again"), Laptop()) == 0
    assert bool(smaller) == (lines == 30)


@pytest.mark.parametrize(
    ("given", "sizes", "pattern"),
    [
        ({"overfit": True}, (300, 100), " 5.2 times .* use -B 1 -T 99$"),
        ({"total_batch": 2048}, (300, 100), " 3.3 times as much text$"),
        ({}, (600, 40, 90), r"\. Remove \S+/a/train1.bin .* use -B "),
    ],
)
def test_hints_for_too_little_text(tmp_path: Path, given: dict[str, Any], sizes: tuple[int, ...], pattern: str) -> None:
    files = [tmp_path / "a" / f"train{i}.bin" for i in range(len(sizes) - 1)] + [tmp_path / "a" / "val.bin"]
    files[0].parent.mkdir()
    for file, size in zip(files, sizes, strict=True):
        write_shard(file, np.zeros(size, np.uint16))
    data = prepare([tmp_path / "a"], tmp_path / "run", log=lambda _: None)
    with refused("data.too-short") as caught:
        check_enough(data, TrainOptions(batch_size=4, sequence_length=128, **given))
    assert re.search(pattern, str(caught.value))


def test_a_model_that_learns_to_answer(options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its samples start with a held-out question; without answers there is nothing to learn."""
    file = tmp_path / "talk.jsonl"

    def write(role: str) -> None:
        turns = [[("user", f"How much is {i} + 1?"), (role, f"It is {i + 1}.")] for i in range(200)]
        talks = [[{"role": role, "content": content} for role, content in talk] for talk in turns]
        file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))

    write("assistant")
    assert assemble.train(options(data=(file,), steps=1, sample_every=1, sequence_length=64), Laptop()) == 0
    assert re.search(r"--- sample at step 1\nuser: How much is \d+ \+ 1\?\n\nassistant: ", capsys.readouterr().out)
    write("user")
    with pytest.raises(LlmpyError, match="assistant"):
        assemble.train(options(data=(file,), out=tmp_path / "again"), Laptop())
    assert not (tmp_path / "again").exists()


def test_more_threads_than_cores_are_noted(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, and they are used."""
    monkeypatch.setattr("llmpy.system.resources.cores", lambda: 2)
    note = re.compile(r"^note: 99 threads .*--threads 2\b.*\n", re.MULTILINE)
    machine = Laptop()
    for threads, count in ((99, 1), (2, 0)):
        machine.threads = threads
        assemble.train(options(out=tmp_path / str(threads)), machine)
        assert len(note.findall(capsys.readouterr().out)) == count
        sample(SampleOptions(tmp_path / str(threads), tokens=2), print, machine)
        assert len(note.findall(capsys.readouterr().err)) == count


def test_checkpoints_that_do_not_fit_on_the_disk(options: Options, tmp_path: Path) -> None:
    with pytest.raises(LlmpyError, match=r"disk of .*/run\b"):  # among others, if memory is short too
        assemble.train(options(model="d48", keep=0, checkpoint_every=1, steps=10**6, sequence_length=16), Laptop())
    assert not (tmp_path / "run").exists()


def test_minutes_bound_a_run_and_its_learning_rate(options: Options, tmp_path: Path) -> None:
    start = time.perf_counter()
    assert assemble.train(options(steps=None, minutes=0.02, eval_every=0), Laptop()) == 0
    assert time.perf_counter() - start < 30
    rates = [r["lr"] for r in metrics(tmp_path / "run") if "lr" in r]
    assert len(rates) > 5
    assert rates[-1] < 0.2 * max(rates)


def test_evaluation_always_uses_the_same_batches(options: Options, tmp_path: Path) -> None:
    assemble.train(options(lr=1e-30, weight_decay=0.0, eval_every=1), Laptop())
    losses = [r["val_loss"] for r in metrics(tmp_path / "run") if "val_loss" in r]
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-6)


class Interrupting(Laptop):
    """Raises a signal during the second update, as Ctrl-C would."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.updates = number, 0

    def adamw(self, *arguments: Any) -> None:
        super().adamw(*arguments)
        self.updates += 1
        if self.updates == 3:  # two updates per step: matrices and vectors
            signal.raise_signal(self.number)


HANGUP = getattr(signal, "SIGHUP", 0)  # not on Windows
needs_hangup = pytest.mark.skipif(not HANGUP, reason="a signal of POSIX")


@pytest.fixture
def hangup() -> Iterator[Callable[[Any], object]]:
    """Set the handler of SIGHUP, and restore it afterwards."""
    before = signal.getsignal(HANGUP) if HANGUP else None
    yield lambda handler: signal.signal(HANGUP, handler)
    if HANGUP:
        signal.signal(HANGUP, before)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), pytest.param(HANGUP, 129, marks=needs_hangup)],
)
def test_ctrl_c_finishes_the_step_and_keeps_the_model(
    options: Options, tmp_path: Path, number: int, code: int, capfd: pytest.CaptureFixture[str], hangup: Any
) -> None:
    if number == HANGUP:
        hangup(signal.SIG_DFL)
    before = signal.getsignal(number)
    machine = Interrupting(number)
    assert assemble.train(options(steps=100), machine) == code
    assert signal.getsignal(number) is before
    assert machine.updates == 4
    assert [r["step"] for r in metrics(tmp_path / "run")] == [0, 1, 2]
    out, err = capfd.readouterr()
    assert "stopped after 2 steps" in out and "stopping after this step" in err
    assert ("press Ctrl-C again" in err) == (number == signal.SIGINT)
    checkpoint.read_header(tmp_path / "run" / "model.safetensors")


def test_the_second_ctrl_c_has_the_default_handler() -> None:
    stop = StopSignals()
    with stop.handled():
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert stop.signal == signal.SIGINT


@needs_hangup
def test_a_closing_terminal_may_hang_up_twice_and_nohup_holds(hangup: Callable[[Any], object]) -> None:
    hangup(signal.SIG_DFL)
    stop = StopSignals()
    with stop.handled():
        signal.raise_signal(HANGUP)
        signal.raise_signal(HANGUP)
    assert stop.signal == HANGUP
    hangup(signal.SIG_IGN)
    stop = StopSignals()
    with stop.handled():
        signal.raise_signal(HANGUP)
    assert stop.signal == 0


class Leaving(io.TextIOWrapper):
    """A pipe with a reader that leaves after some lines; optionally a terminal."""

    def __init__(self, lines: int, terminal: bool = False) -> None:
        self.reader: int | None
        self.reader, writer = os.pipe()
        super().__init__(open(writer, "wb"), "utf-8")  # noqa: SIM115
        self.lines, self.terminal = lines, terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        if self.lines == 0 and self.reader is not None:
            os.close(self.reader)
            self.reader = None
        self.lines -= self.lines > 0 and "\n" in text
        return super().write(text)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("lines", [0, 3, 14, 15, 16])  # at once, and around the first step
def test_a_dead_terminal_ends_no_run(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool, lines: int
) -> None:
    with Leaving(lines, terminal) as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert assemble.train(options(sample_every=2), Laptop()) == 0
        assert out.reader is None
    checkpoint.read_header(tmp_path / "run" / "model.safetensors")
    log = (tmp_path / "run" / "console.log").read_text("utf-8")
    for part in ("run folder", "        1/4 ", "        4/4 ", "sample at step 4", "trained 4 steps"):
        assert part in log


def test_ctrl_c_when_the_terminal_dies_with_it(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def gone(handle: int, data: Any) -> int:
        if handle == 2:
            raise BrokenPipeError(32, "Broken pipe")
        return write(handle, data)

    class Dying(Interrupting):
        def adamw(self, *arguments: Any) -> None:
            if self.updates == 2:
                monkeypatch.setattr(sys, "stdout", out)
                monkeypatch.setattr(os, "write", gone)
            super().adamw(*arguments)

    with Leaving(0) as out:
        assert assemble.train(options(steps=100), Dying(signal.SIGINT)) == 130
    checkpoint.read_header(tmp_path / "run" / "model.safetensors")
    assert "stopped after 2 steps" in (tmp_path / "run" / "console.log").read_text("utf-8")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_loses_the_log_but_not_the_model(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(journal: Journal, *_: object) -> None:
        journal._console, metrics, main = (open("/dev/full", "w", buffering=1) for _ in range(3))  # noqa: SIM115
        journal._files = {"metrics.jsonl": metrics, "main.log": main}

    monkeypatch.setattr(Journal, "open", full)
    assert assemble.train(options(), Laptop()) == 0
    checkpoint.read_header(tmp_path / "run" / "model.safetensors")
    out = capsys.readouterr().out
    assert out.count("warning: cannot write /dev/full: No space left on device") == 1
    assert "trained 4 steps" in out


def test_a_failed_checkpoint_is_tried_again(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the next interval."""
    make_room, steps = checkpoint.make_room_for, []
    errors = {40: 28, 60: 28, 80: 5}

    def full(folder: Path, step: int) -> None:
        steps.append(step)
        if step in errors:
            raise OSError(errors[step], os.strerror(errors[step]))
        make_room(folder, step)

    monkeypatch.setattr(checkpoint, "make_room_for", full)
    monkeypatch.setattr(checkpoint_writer, "Thread", AtOnce)
    assert assemble.train(options(checkpoint_every=20, steps=102), Laptop()) == 0
    assert steps == [20, 40, 60, 80, 100, 102]
    lines = capsys.readouterr().out.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ")]
    for number, line in zip(errors.values(), warnings, strict=True):
        assert os.strerror(number) in line and "step 20" in line
    assert [p.name for p in checkpoint.listed(tmp_path / "run" / "checkpoints")] == ["step-00000102", "step-00000100"]


def test_a_full_disk_at_the_end_loses_nothing(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, files: Any) -> Any:
        if path.name == ".step-00000006.tmp":
            raise OSError(28, "No space left on device")
        return write_files(path, files)

    write_files = checkpoint.write_files
    monkeypatch.setattr(checkpoint, "write_files", full)
    with refused("checkpoint.unwritable", "step 6", "No space", "step 4"):
        assemble.train(options(checkpoint_every=4, steps=6), Laptop())
    checkpoint.read_header(tmp_path / "run" / "model.safetensors")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    assert [r["step"] for r in metrics(tmp_path / "run") if "val_loss" in r] == [0, 6]
    monkeypatch.setattr(checkpoint, "write_files", write_files)
    assert assemble.train(TrainOptions(resume=tmp_path / "run"), Laptop()) == 0
    assert checkpoint.listed(tmp_path / "run" / "checkpoints")[0].name == "step-00000006"


def test_tokens_that_change_during_training_reach_no_kernel(options: Options, tmp_path: Path) -> None:
    path = shard_with(tmp_path, np.arange(2000) % 300)

    class Meddling(Laptop):
        def adamw(self, *arguments: Any) -> None:
            super().adamw(*arguments)
            with path.open("r+b") as file:
                file.seek(1024)
                file.write(b"\xff" * 4000)

    with pytest.raises(LlmpyError, match=r"tokens\.bin .*65,?535 .*300"):
        assemble.train(options(data=(path,)), Meddling())


class Diverging(Laptop):
    """The losses of some training batches are NaN; evaluation stays good."""

    def __init__(self, what: str, batches: Container[int]) -> None:
        super().__init__()
        self.what, self.bad, self.batches = what, batches, 0

    def classifier(self, losses: Any, dinp: Any, dwte: Any, *rest: Any) -> None:
        super().classifier(losses, dinp, dwte, *rest)
        self.batches += dinp is not None
        if dinp is not None and self.batches in self.bad:
            (losses if self.what == "loss" else dwte)[...] = np.nan


@pytest.mark.parametrize("what", ["loss", "norm of the gradient"])
def test_steps_that_are_not_finite_are_skipped(
    options: Options, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert assemble.train(options(steps=9, shuffle=False), Diverging(what, (4, 5, 8))) == 0
    rows = {r["step"]: r for r in metrics(tmp_path / "run") if "val_loss" not in r}
    assert [n for n, r in rows.items() if "skipped" in r] == [4, 5, 8]
    assert rows[5]["skipped"] == f"the {what} is nan"
    assert rows[5]["batches"] == [["train.bin", 4]]
    assert f"step 8: skipped: the {what} is nan; batches train.bin 7\n" in capsys.readouterr().out
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8")
    state = load_file(tmp_path / "run" / "checkpoints" / "step-00000009" / part_name(0, 1))
    assert all(np.isfinite(x).all() for x in state.values())


@pytest.mark.parametrize(
    ("what", "where"), [("loss", "the activation losses"), ("norm of the gradient", "the gradient of wte")]
)
def test_after_some_in_a_row_the_run_stops(options: Options, tmp_path: Path, what: str, where: str) -> None:
    names = (f"step 8: the {what} is nan", "5 consecutive", where, "checkpoint is of step 3", "--lr", "--resume")
    with refused("run.diverged", *names) as caught:
        assemble.train(options(steps=99, checkpoint_every=3), Diverging(what, range(4, 100)))
    assert caught.value.exit_code == 3
    assert [p.name for p in checkpoint.listed(tmp_path / "run" / "checkpoints")] == ["step-00000003"]
    out: list[str] = []
    sample(SampleOptions(tmp_path / "run", tokens=3), out.append, Laptop())


class Ruined(Diverging):
    """Evaluation is bad from then on too: the cause is the parameters, not a batch."""

    def classifier(self, losses: Any, dinp: Any, dwte: Any, *rest: Any) -> None:
        super().classifier(losses, dinp, dwte, *rest)
        if self.batches in self.bad:
            losses[...] = np.nan


def test_a_checkpoint_amid_such_steps_is_not_called_good(options: Options) -> None:
    with refused("run.diverged", "the checkpoint of step 6 is bad") as caught:
        assemble.train(options(steps=6), Ruined("loss", range(5, 100)))
    assert "--resume" not in str(caught.value)


def test_divergence_before_any_checkpoint(options: Options, tmp_path: Path) -> None:
    with refused("run.diverged", "no checkpoint exists"):
        assemble.train(options(steps=10), Diverging("loss", range(100)))
    assert not (tmp_path / "run" / "model.safetensors").exists()
    before = contents(tmp_path / "run")
    assert {"metrics.jsonl", "main.log", "train.bin"} <= set(before)
    with refused("run.interrupted", f"--resume {tmp_path / 'run'}"):
        assemble.train(options(), Laptop())
    with pytest.raises(LlmpyError, match="train --resume "):
        sample(SampleOptions(tmp_path / "run", tokens=3), print, Laptop())
    assert contents(tmp_path / "run") == before
    assert assemble.train(TrainOptions(resume=tmp_path / "run"), Laptop()) == 0  # from the start
    assert [r["step"] for r in metrics(tmp_path / "run") if "loss" in r] == [*range(1, 11)]


@pytest.mark.parametrize("every", [2, 0])
def test_parameters_that_are_not_finite_are_never_checkpointed(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    monkeypatch.setattr(checkpoint_writer, "Thread", AtOnce)

    class Rotten(Laptop):
        def adamw(self, param: Any, grad: Any, m: Any, v: Any, *rest: Any) -> None:
            super().adamw(param, grad, m, v, *rest)
            if rest[-2] == 3:
                v[0] = np.inf  # without effect on the loss

    with refused("run.diverged", *(("step 4:", "of step 2") if every else ("step 10:", "no checkpoint"))):
        assemble.train(options(checkpoint_every=every, steps=10), Rotten())
    assert len(list((tmp_path / "run").glob("checkpoints/*"))) == bool(every)


def test_a_trained_model_is_not_overwritten(options: Options, tmp_path: Path) -> None:
    assemble.train(options(), Laptop())
    before = contents(tmp_path / "run")
    with refused("run.finished", f"--resume {tmp_path / 'run'}"):
        assemble.train(options(seed=3), Laptop())
    assert contents(tmp_path / "run") == before


def test_a_folder_with_other_files_is_left_alone(options: Options, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.bin").write_bytes(b"mine")
    with refused("run.not-empty", "(train.bin)"):
        assemble.train(options(), Laptop())
    assert (tmp_path / "run" / "train.bin").read_bytes() == b"mine"


@pytest.mark.parametrize("error", ["too long a row", "good"])
def test_input_inside_the_run_folder_survives(options: Options, tmp_path: Path, error: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("train.bin", "val.bin"):
        shard_with(tmp_path, np.arange(2000) % 300).rename(run / name)
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "main.log").write_text("precious\n")
    before = contents(run)
    with pytest.raises(LlmpyError):
        assemble.train(options(data=(run,), sequence_length=16 if error == "good" else 1000), Laptop())
    assert contents(run) == before


def test_a_new_run_removes_files_of_an_interrupted_save(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    # written by our own code, so that the names agree
    with monkeypatch.context() as killed:
        killed.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(LlmpyError):
            write_whole(run / "model.safetensors", half_written)
    assert [re.sub("[0-9]+", "N", p.name) for p in run.iterdir()] == [".model.safetensors.N.tmp"]
    assert assemble.train(options(), Laptop()) == 0
    assert not any(p.name.endswith(".tmp") for p in run.iterdir())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".notes.tmp").touch()  # not ours
    with refused("run.not-empty", "(.notes.tmp)"):
        assemble.train(options(out=tmp_path / "other"), Laptop())


def half_written(path: Path) -> None:
    """Write like a process that is killed while saving."""
    path.write_bytes(b"half")
    raise OSError("killed")


def test_a_name_that_is_too_long(options: Options, tmp_path: Path) -> None:
    with refused("run.unwritable", "File name too long"):
        assemble.train(options(out=tmp_path / ("x" * 300)), Laptop())


def test_an_empty_folder_is_welcome_and_stays_empty_after_a_refusal(options: Options, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(LlmpyError):
        assemble.train(options(data=(tmp_path / "missing.txt",)), Laptop())
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_cannot_be_made(options: Options, text: Path) -> None:
    for out in (text / "run", text):
        with refused("run.unwritable", out):
            assemble.train(options(out=out), Laptop())


def test_a_folder_that_cannot_be_written(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(_: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Lock, "take", read_only)
    with refused("run.unwritable", "Permission denied", "--out"):
        assemble.train(options(), Laptop())
    assert not (tmp_path / "run").exists()


def test_names_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "20261122-1503")
    runs = [RunFolder.open(None, "gpt3:c768") for _ in range(3)]
    names = [run.path.as_posix() for run in runs]
    for run in reversed(runs):
        run.discard()
    assert not (tmp_path / "runs").exists()
    assert names == [f"runs/gpt3-c768-20261122-1503{end}" for end in ("", "-2", "-3")]


def shard_with(tmp_path: Path, tokens: np.ndarray) -> Path:
    path = tmp_path / "tokens.bin"
    write_shard(path, tokens)
    return path


def bad_inputs() -> dict[str, tuple[Callable[[Path], dict[str, Any]], str]]:
    """Return bad inputs: a function that returns options with each, and text that the error must contain."""

    def file(content: bytes) -> Callable[[Path], dict[str, Any]]:
        def write(folder: Path) -> dict[str, Any]:
            (folder / "bad.txt").write_bytes(content)
            return {"data": (folder / "bad.txt",)}

        return write

    def shard(change: Callable[[bytearray], bytearray]) -> Callable[[Path], dict[str, Any]]:
        def write(folder: Path) -> dict[str, Any]:
            path = shard_with(folder, np.arange(2000) % 300)
            path.write_bytes(change(bytearray(path.read_bytes())))
            return {"data": (path,)}

        return write

    return {
        "empty": (file(b""), "bad.txt"),
        "tiny": (file(b"a few words"), "1,000"),
        "binary": (file(bytes(range(256)) * 40), "bad.txt"),
        "missing": (lambda f: {"data": (f / "nothing.txt",)}, "nothing.txt"),
        "dial": (lambda f: {"model": "d4x"}, "d4x"),
        "magic": (shard(lambda b: bytearray(4) + b[4:]), "tokens.bin"),
        "length": (shard(lambda b: b[:-2]), "tokens.bin"),
        "token": (shard(lambda b: b[:-2] + b"\xff\xff"), "tokens.bin"),
        "prompt": (lambda f: {"prompt": "\udcff"}, "UTF-8"),
        "prompt without tokenizer": (
            lambda f: {"prompt": "a", "data": (shard_with(f, np.arange(2000) % 300),), "vocab_size": 300},
            "--prompt",
        ),
        "row": (lambda f: {"sequence_length": 1025}, "-T 1024"),
        "batch": (lambda f: {"batch_size": 100_000}, "-B 291 -T 16"),
        "validation": (lambda f: {"sequence_length": 1024, "batch_size": 1}, "-T"),
        "vocabulary": (lambda f: {"vocab_size": 200}, "--vocab-size 257"),
    }


@pytest.mark.parametrize("name", bad_inputs())
def test_bad_input_is_one_error_and_leaves_nothing(options: Options, tmp_path: Path, name: str) -> None:
    make, text = bad_inputs()[name]

    class Unmeasured(Laptop):
        def measure_peak(self) -> float:
            raise AssertionError("this compiles a kernel")

    machine = Unmeasured()
    with pytest.raises(LlmpyError) as caught:
        assemble.train(options(**make(tmp_path)), machine)
    assert machine.warmed == 0
    assert text in str(caught.value)
    assert caught.value.hint
    assert not (tmp_path / "run").exists()


def test_too_little_memory(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PROGRAM_BYTES", 1 << 60)
    machine = Laptop()
    with refused("memory.insufficient", "-B", "-T", "--model"):
        assemble.train(options(), machine)
    assert machine.warmed == 0
    assert not (tmp_path / "run").exists()


def test_shards_without_a_tokenizer_train_and_sample_as_numbers(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shard_with(tmp_path, np.arange(2000) % 300)
    assert assemble.train(options(data=(path,)), Laptop()) == 0
    lines = capsys.readouterr().out.splitlines()
    ids = lines[lines.index("--- sample at step 4") + 1].split()
    assert len(ids) == 5
    assert all(0 <= int(i) < 300 for i in ids)
    with pytest.raises(LlmpyError, match=r"\brun\b.* tokenizer"):
        open_run(tmp_path / "run")


def test_default_options_are_settled() -> None:
    found = TrainOptions().settled(channels=768, tokens=51_300)
    assert (found.lr, found.steps, found.minutes) == (pytest.approx(2.5e-4), 1000, 3.5)
    found = TrainOptions(data=(Path("a"),), steps=3).settled(384, 51_300)
    assert (found.lr, found.steps, found.minutes) == (pytest.approx(1.2e-3), 3, None)
    found = TrainOptions(minutes=3, lr=0.1).settled(384, 10)
    assert (found.lr, found.steps, found.minutes) == (0.1, None, 3)
    assert TrainOptions().settled(768, 10).steps == 10
    assert TrainOptions().settled(768, 10).prompt == BUILTIN_PROMPT == "If the"
    assert TrainOptions(prompt="").settled(768, 10).prompt == ""
    assert TrainOptions(data=(Path("a"),)).settled(768, 10).prompt == ""


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"batch_size": 0}, "--batch-size 0"),
        ({"steps": 0}, "--steps 0"),
        ({"minutes": -1.0}, "--minutes -1"),
        ({"minutes": math.inf}, "--minutes inf"),
        ({"minutes": 1e307}, "--minutes 1e+307"),
        ({"steps": 10**400}, "2^62"),
        ({"warmup": 10**400}, "2^62"),
        ({"lr": math.nan}, "--lr nan"),
        ({"beta2": 1.0}, "--beta2 1.0"),
        ({"min_lr": 1.1}, "--min-lr 1.1"),
        ({"seed": 1 << 32}, "2^32 - 1"),
        ({"seed": -1}, "--seed -1"),
        ({"threads": 0}, "--threads 0"),
        ({"schedule": "step"}, "cosine"),
        ({"dtype": "int8"}, "--dtype int8"),
    ],
)
def test_invalid_options(options: Options, changes: dict[str, Any], name: str) -> None:
    with pytest.raises(LlmpyError, match=re.escape(name)):
        options(**changes)


def test_the_best_model_is_kept(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    worse = iter([1.0, 1.0, 1.0, 5.0, 6.0])  # at the evaluations of steps 0, 2, 4, 6, 8
    true_loss = GPT2.loss
    monkeypatch.setattr(GPT2, "loss", lambda self, *batch: next(worse) * true_loss(self, *batch))
    assert assemble.train(options(steps=8, eval_every=2, eval_batches=1, checkpoint_every=4, keep=0), Laptop()) == 0
    score = checkpoint.read_header(run / "best.safetensors").score
    losses = {r["step"]: r["val_loss"] for r in metrics(run) if "val_loss" in r}
    assert score is not None
    assert (score.step, score.val_loss) == (4, losses[4])
    of_step_4 = run / "checkpoints" / "step-00000004" / "model.safetensors"
    best, other = (load_file(path) for path in (run / "best.safetensors", of_step_4))
    assert all(np.array_equal(best[name], other[name]) for name in other)
    assert checkpoint.read_header(of_step_4).score is None
    out = capsys.readouterr().out
    assert f"best validation loss {losses[4]:.4f} at step 4: {run}/best.safetensors" in out
    # A resumed run keeps it until a better one replaces it.
    monkeypatch.setattr(GPT2, "loss", true_loss)
    assert assemble.train(TrainOptions(resume=run, steps=10, given=frozenset({"steps"})), Laptop()) == 0
    score = checkpoint.read_header(run / "best.safetensors").score
    assert score is not None
    assert (score.step, score.val_loss) == (10, metrics(run)[-1]["val_loss"])
    assert "best validation loss" not in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"sequence_length": 8}, {"eval_batches": 2}])
def test_the_best_model_on_another_text_is_not_compared(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    true_loss = GPT2.loss
    monkeypatch.setattr(GPT2, "loss", lambda self, *batch: true_loss(self, *batch) / 10)
    assert assemble.train(options(steps=4, eval_every=2, eval_batches=1), Laptop()) == 0
    monkeypatch.setattr(GPT2, "loss", true_loss)
    capsys.readouterr()
    changes = {"steps": 6, **changes}
    assert assemble.train(TrainOptions(resume=run, given=frozenset(changes), **changes), Laptop()) == 0
    out = capsys.readouterr().out
    assert re.search(r"validation now uses .*: replacing the best model, of step 4", out)
    assert "best validation loss" not in out
    score = checkpoint.read_header(run / "best.safetensors").score
    assert score is not None
    assert score.step == 6


def test_a_best_model_that_cannot_be_written_ends_no_run(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise LlmpyError("test.full", "cannot write best.safetensors: No space left on device")

    monkeypatch.setattr(checkpoint, "write_model", full)
    assert assemble.train(options(steps=2), Laptop()) == 0
    assert "warning: the best model is not saved: cannot write best.safetensors" in capsys.readouterr().out


def test_runs_inside_the_data_folder_are_ignored(
    options: Options, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's own folder, also when it resumes, and those of earlier runs."""
    texts = tmp_path / "texts"
    texts.mkdir()
    shutil.copy(text, texts)
    for name in ("one", "two"):
        assert assemble.train(options(data=(texts,), out=texts / "runs" / name, steps=2), Laptop()) == 0
        assert "1 file, 17," in capsys.readouterr().out
    shards = tmp_path / "shards"
    shards.mkdir()
    for part in ("train.bin", "val.bin"):
        shutil.copy(texts / "runs" / "one" / part, shards)
    assert assemble.train(options(data=(shards,), vocab_size=300, out=shards / "run", steps=2), Laptop()) == 0
    again = TrainOptions(resume=shards / "run", steps=4, given=frozenset({"steps"}))
    assert assemble.train(again, Laptop()) == 0
    assert metrics(shards / "run")[-1]["step"] == 4


def test_fine_tuning_defaults() -> None:
    """Those of llm.c, unless a recipe or flags override them."""
    found = TrainOptions.gather({"init": "gpt2"})
    assert (found.schedule, found.weight_decay, found.beta2, found.clip) == ("constant", 0.0, 0.999, 0.0)
    assert found.given == {"init"}
    assert found.settled(768, 1000).lr == 1e-4
    assert found.settled(1536, 1000).lr == 5e-5
    assert TrainOptions.gather({"data": (Path("d"),)}).settled(768, 1000).lr == 6e-4
    other = TrainOptions.gather({"init": "gpt2", "recipe": "gpt2_124M", "data": (Path("d"),), "clip": 2.0, "lr": 1.0})
    assert (other.schedule, other.clip, other.settled(768, 1000).lr, other.beta2) == ("cosine", 2.0, 1.0, 0.999)


@pytest.mark.skipif(os.name != "posix", reason="Windows does not truncate files in use")
@pytest.mark.parametrize("name", ["train.bin", "train.mask", "val.bin"])
def test_data_that_shrink_end_a_run_that_can_be_resumed(
    name: str, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = np.random.default_rng(0).integers(0, 300, 3000)
    data = tmp_path / "train.bin", tmp_path / "val.bin"
    for path in data:
        write_shard(path, tokens, counted=tokens > 100)
    before, step = (tmp_path / name).read_bytes(), trainer.Trainer.train_step

    def train_step(self: trainer.Trainer) -> Any:
        if self.done == 3:
            os.truncate(tmp_path / name, 1024 + 10)
        return step(self)

    given = options(data=data, steps=6, eval_every=1, checkpoint_every=2)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_writer, "Thread", AtOnce)
        patched.setattr(trainer.Trainer, "train_step", train_step)
        with refused("file.changed", tmp_path / name):
            assemble.train(given, Laptop())
    kept = checkpoint.listed(tmp_path / "run" / "checkpoints")
    assert kept[0].name == ("step-00000004" if name == "val.bin" else "step-00000002")
    (tmp_path / name).write_bytes(before)
    assert assemble.train(TrainOptions(resume=tmp_path / "run"), Laptop()) == 0
    assert metrics(tmp_path / "run")[-1]["step"] == 6
