"""Run folders: locked by one process, and never overwritten."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.refused import refused

from llmpy.run.folder import HELD, MODEL_FILE, RunFolder
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
