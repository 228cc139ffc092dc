"""Finding runs, whether they are training, and reading their folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.refused import refused

from llmpy.system.lock import Lock
from llmpy.watch.runs import Run, Runs


def line(step: int) -> str:
    return json.dumps({"step": step, "loss": 10 / (step + 1)}) + "\n"


def run_folder(path: Path, age: float = 0.0) -> Path:
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(map(line, range(1, 6))))
    os.utime(path / "metrics.jsonl", (time.time() - age,) * 2)
    return path


def test_which_runs_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with refused("run.missing", "no run in runs"):
        Runs([])
    new, old, oldest = (run_folder(Path("runs", name), age) for name, age in (("a", 100), ("b", 200), ("c", 300)))
    Path("runs", "no run").mkdir()
    runs = Runs([])
    assert [*runs.all()] == [str(new), str(old), str(oldest)]
    assert runs.chosen(runs.all()) == [str(new)]
    lock = Lock(old / "run.lock")
    assert lock.take() and runs.chosen(runs.all()) == [str(old)]
    lock.drop()
    indices = {name: run.index for name, run in runs.all().items()}
    started = run_folder(Path("runs", "started since"))
    assert [*runs.all()][0] == str(started)
    assert {name: run.index for name, run in runs.all().items()} == indices | {str(started): 3}  # colours stay
    both = Runs([oldest, new])
    assert both.chosen(both.all()) == [str(oldest), str(new)]
    with refused("run.missing", "nothing"):
        Runs([Path("nothing")])


def test_files_are_read_again_when_they_change(tmp_path: Path) -> None:
    run = Run(run_folder(tmp_path / "run"), 0)
    path, curves, state = run.folder / "metrics.jsonl", run.curves(), run.state()
    assert run.curves() is curves and run.state() == state
    whole = line(6)
    for text, last in ((whole[:9], 5), (whole[9:], 6)):  # an incomplete line counts once it is complete
        with path.open("a") as file:
            file.write(text)
        assert (run.curves().points("loss")[0, -1], run.numbers()["step"]) == (last, last)
    assert run.state() != state
    path.write_text(line(1) + line(2))  # truncated, as by --resume
    assert run.curves().points("loss")[0].tolist() == [1, 2]
    path.unlink()
    assert run.curves().points("loss").size == 0 and run.numbers() == {}


def test_the_newest_numbers_come_from_the_end_of_the_file(tmp_path: Path) -> None:
    path = run_folder(tmp_path / "run") / "metrics.jsonl"
    path.write_text("".join(map(line, range(1, 10_001))) + '{"step": 10000, "val_loss": 1.5}\n' + line(10_001))
    assert Run(path.parent, 0).numbers() == {"step": 10_001, "loss": 10 / 10_002, "val_loss": 1.5}


def test_a_run_trains_while_its_lock_is_held(tmp_path: Path) -> None:
    """Not because a process, perhaps another one, has the number in it, nor because its metrics are new."""
    folder = run_folder(tmp_path / "run")
    run, path = Run(folder, 0), folder / "run.lock"
    assert not run.trains()
    for holder in (f"\n{os.getpid()}\n", f"{os.getppid()}\n", "1", "", "x"):
        path.write_text(holder)
        assert not run.trains() and path.read_text() == holder
    lock = Lock(path)
    assert lock.take() and run.trains() and run.trains()
    lock.drop()
    assert not run.trains()
    path.symlink_to("metrics.jsonl")
    assert not run.trains()
    path.unlink()
    program = (
        "import sys; from pathlib import Path; from llmpy.system.lock import Lock\n"
        "lock = Lock(Path(sys.argv[1])); print(lock.take(), flush=True); input()"
    )
    other = subprocess.Popen([sys.executable, "-c", program, str(path)], stdin=-1, stdout=-1)
    assert other.stdout is not None and other.stdout.readline() == b"True\n" and run.trains()
    other.kill()
    other.communicate()
    assert path.exists() and not run.trains()


def test_samples_newest_first(tmp_path: Path) -> None:
    run = Run(run_folder(tmp_path / "run"), 0)
    text = "".join(f"--- step {n}\n<b>{n}</b>\n\nmore\n\n" for n in range(1, 30))
    (run.folder / "samples.txt").write_text(text + "--- step 30\nhalf wri")
    assert run.samples()[:2] == [{"step": 30, "text": "half wri"}, {"step": 29, "text": "<b>29</b>\n\nmore"}]
    assert len(run.samples()) == 8


@pytest.mark.parametrize(
    ("config", "described"),
    [
        ('{"options": {"model": "d3", "lr": 0.001}, "machine": {"threads": 2}}', "d3 · lr 0.001 · threads 2"),
        ("[" * 10_000, ""), ("[]", ""), ('{"options": [], "machine": 3}', ""), ("{}", ""), ("\0", ""),
    ],
)  # fmt: skip
def test_the_description_of_a_run(tmp_path: Path, config: str, described: str) -> None:
    run = Run(run_folder(tmp_path / "run"), 0)
    (run.folder / "config.json").write_text(config)
    assert run.described() == described


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a pipe")
def test_pipes_and_devices_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "metrics.jsonl")
    (tmp_path / "samples.txt").symlink_to("/dev/zero")
    run = Run(tmp_path, 0)
    assert (run.curves().points("loss").size, run.numbers(), run.samples()) == (0, {}, [])
