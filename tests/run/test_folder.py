"""Run folders: locked by one process, and never overwritten."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.refused import refused

from llmpy.options.train import TrainOptions
from llmpy.run import checkpoint
from llmpy.run.folder import HELD, MODEL_FILE, RunFolder, is_ours, write_config
from llmpy.run.journal import Journal
from llmpy.system.lock import Lock

CLAIM = (
    "import sys; from pathlib import Path; from llmpy.run.folder import RunFolder\n"
    "folder = RunFolder.open(Path(sys.argv[1]), ''); print('mine', flush=True); sys.stdin.read(); folder.discard()"
)


def test_a_suggested_command_can_be_pasted(tmp_path: Path) -> None:
    run = tmp_path / "my run"
    run.mkdir()
    (run / MODEL_FILE).write_bytes(b"")
    with refused("run.finished", f"--resume '{run}'"):
        RunFolder.open(run, "d1")
    assert [path.name for path in run.iterdir()] == [MODEL_FILE]


def test_a_pipe_named_config_is_no_run(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    assert not is_ours(tmp_path)


def test_one_of_many_processes_has_the_folder(tmp_path: Path) -> None:
    """The others are refused, naming its process; a run that never started leaves no file."""
    run = tmp_path / "new" / "run"
    command = [sys.executable, "-c", CLAIM, str(run)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    tried = [subprocess.Popen(command, encoding="utf-8", **pipes) for _ in range(4)]  # type: ignore[call-overload]
    (mine,) = (process for process in tried if process.stdout.readline() == "mine\n")
    for process in tried:
        if process is not mine:
            assert f"process {mine.pid}" in process.communicate()[1]
    with refused("run.in-use", run, f"process {mine.pid}"):
        RunFolder.open(run, "")
    mine.communicate("")
    assert not list(run.glob("*"))


def test_a_lock_of_a_dead_process_is_no_lock(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", CLAIM, str(tmp_path)], stdin=-1, stdout=-1, encoding="utf-8")
    assert process.stdout is not None and process.stdout.readline() == "mine\n"
    process.kill()
    process.communicate()
    assert (tmp_path / "run.lock").read_text() == f"\n{process.pid}\n"
    RunFolder.open(tmp_path, "").discard()
    assert list(tmp_path.iterdir()) == [] and HELD == []


def test_a_run_that_never_started_leaves_nothing(tmp_path: Path) -> None:
    """Neither its files nor temporary ones; other files stay."""
    folder = RunFolder.open(tmp_path / "new" / "run", "")
    for name in (MODEL_FILE, f".{MODEL_FILE}.123.tmp"):
        (folder / name).write_bytes(b"")
    folder.discard()
    assert list(tmp_path.iterdir()) == []
    folder = RunFolder.open(tmp_path / "run", "")
    (folder / "notes.txt").write_text("")
    folder.discard()
    assert [path.name for path in folder.path.iterdir()] == ["notes.txt"]


def test_waiting_for_a_lock_names_its_holder(tmp_path: Path, said: list[str]) -> None:
    lock = Lock(tmp_path / "a.lock")
    with lock.waited(said.append, "makes a"):
        assert said == []
        other = Lock(lock.path)
        assert not other.take()
        log = lambda line: (said.append(line), lock.drop())  # noqa: E731
        with other.waited(log, "makes a"):
            assert said == [f"waiting for process {os.getpid()}, which makes a"]
    assert not lock.path.exists()


NAMES = ("run.lock", "metrics.jsonl", "console.log", "main.log", "samples.txt", "config.json", "model.safetensors",
         "best.safetensors", "tokenizer.json", "start.safetensors", "checkpoints", "events", "wandb")  # fmt: skip


def tree(folder: Path) -> dict[str, object]:
    return {str(p): p.read_bytes() if p.is_file() else os.path.islink(p) for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("to", ["out", "within", "dangling"])
def test_links_in_a_run_folder_are_refused(name: str, to: str, tmp_path: Path) -> None:
    """Before anything is written, to resume it or to start in it, also if the run would be refused anyway."""
    run, out = tmp_path / "run", tmp_path / "elsewhere"
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    write_config(run, TrainOptions())
    if to != "dangling":
        out.mkdir() if "." not in name else out.write_text("precious")
    inside = (run / "kept") if to == "within" else out
    if to == "within":
        out.rename(inside)
    if (run / name).is_dir():
        (run / name).rename(run / "was")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(inside)
    before = tree(tmp_path)
    for options in (TrainOptions(resume=run), TrainOptions(out=run), TrainOptions(out=run, auto_resume=True)):
        with refused("run.symlink", run / name):
            RunFolder.claim(options)
        assert tree(tmp_path) == before and HELD == []


def test_links_outside_of_a_run_folder_are_followed(tmp_path: Path) -> None:
    """The folder itself may be on another disk, and tokens, which are only read."""
    real, run = tmp_path / "disk", tmp_path / "run"
    real.mkdir()
    run.symlink_to(real)
    folder = RunFolder.open(run, "")
    assert (real / "run.lock").is_file()
    write_config(run, TrainOptions())
    (run / "train.bin").symlink_to(tmp_path / "tokens")
    folder.keep()
    folder.discard()
    RunFolder.reopen(run).discard()
    assert sorted(os.listdir(real)) == ["config.json", "train.bin"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "main.log", "samples.txt", "console.log"])
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
@pytest.mark.parametrize("sizes", [None, {}])
def test_links_made_after_the_start(name: str, kind: str, sizes: dict[str, int] | None, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    if kind == "link":
        out.write_text("precious")
    if kind == "pipe":
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to(out)
    with Journal() as journal, refused("file.unwritable", run / name):
        journal.open(run, sizes)
    assert out.read_text() == "precious" if kind == "link" else not out.exists()


def test_files_that_are_replaced_follow_no_link(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    out.write_text("precious")
    for name in ("config.json", f".config.json.{os.getpid()}.tmp"):
        (run / name).symlink_to(out)
    write_config(run, TrainOptions())
    assert not (run / "config.json").is_symlink() and out.read_text() == "precious"
    (run / "checkpoints").symlink_to(tmp_path)
    with pytest.raises(NotADirectoryError, match="symbolic link"):
        checkpoint.make_room_for(run / "checkpoints", 5)
    (run / "made").mkdir()
    (run / "made" / ".step-00000005.tmp").symlink_to(tmp_path)
    checkpoint.make_room_for(run / "made", 5)
    assert not (run / "made" / ".step-00000005.tmp").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "run"]


@pytest.mark.parametrize("to", ["file", "nothing", "folder"])
def test_a_lock_is_no_link(to: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    if to != "nothing":
        target.write_text("precious") if to == "file" else target.mkdir()
    (tmp_path / "a.lock").symlink_to(target)
    with refused("lock.symlink", tmp_path / "a.lock"), Lock(tmp_path / "a.lock").waited(print, "makes a"):
        raise AssertionError
    assert not Lock(tmp_path / "a.lock").held()
    assert target.read_text() == "precious" if to == "file" else target.is_dir() == (to == "folder")


def test_asking_whether_a_lock_is_held_changes_nothing(tmp_path: Path) -> None:
    lock, path = Lock(tmp_path / "a.lock"), tmp_path / "a.lock"
    assert not lock.held() and not path.exists()
    path.write_text(f"\n{os.getpid()}\n")  # of a process that is gone, whose number is ours now
    assert not lock.held()
    assert lock.take()
    content = path.read_bytes()
    assert Lock(path).held() and lock.held() and path.read_bytes() == content
    lock.drop()
    assert not lock.held() and not path.exists()
    os.mkfifo(path)
    assert not lock.held()


@pytest.mark.skipif(os.name != "posix", reason="flock")
def test_a_lock_can_be_taken_while_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    path = tmp_path / "a.lock"
    path.touch()
    with path.open("rb") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        monkeypatch.setattr("time.sleep", lambda _: fcntl.flock(asking, fcntl.LOCK_UN))
        lock = Lock(path)
        assert lock.take()
        lock.drop()
