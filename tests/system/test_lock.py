"""Locks on file systems that have none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from support.refused import refused

from llmpy.options.train import TrainOptions
from llmpy.run.folder import LOCK, RunFolder
from llmpy.system.lock import Lock

fcntl = pytest.importorskip("fcntl")


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def lockless(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every flock fail, as on a network file system without a lock service."""

    def flock(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("lockless")
def test_a_run_is_protected_without_locks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = TrainOptions(out=tmp_path / "run")
    run = RunFolder.claim(options)
    err = capsys.readouterr().err
    assert err.count("\n") <= 1
    with refused("run.in-use", f"process {os.getpid()}"):
        RunFolder.claim(options)
    run.discard()
    assert not list(tmp_path.iterdir())
    RunFolder.claim(options).discard()


def test_who_holds_it_is_named_and_the_dead_are_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    pid = os.fork()
    if not pid:
        lock = Lock(tmp_path / LOCK)
        os._exit(0 if lock.take() else 1)  # killed: the file remains
    assert os.waitpid(pid, 0)[1] == 0
    held = tmp_path / f"{LOCK}.held"
    assert held.read_text("utf-8").startswith(f"{pid}\n")
    lock = Lock(tmp_path / LOCK)
    assert lock.take()
    assert "without locks" in capsys.readouterr().err
    lock.drop()
    assert not list(tmp_path.iterdir())
    held.write_text("12\nanother-host\n5\n", "utf-8")
    assert not lock.take()
    assert lock.holder() == f"process 12 on another-host (if it has ended, remove {held})"


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.ESTALE])
def test_other_errors_are_reported(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with refused("run.unwritable", os.strerror(number)):
        RunFolder.claim(TrainOptions(out=tmp_path / "run"))
