"""Each problem is found and printed with its fix; an error gives exit code 1."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.laptop import Laptop

from llmpy.cli import main as cli
from llmpy.errors import LlmpyError
from llmpy.model.config import ModelConfig
from llmpy.options.tools import DoctorOptions
from llmpy.options.train import DEFAULT_MODEL, TrainOptions
from llmpy.tools import doctor
from llmpy.tools.doctor import ERROR, NOTE, OK, Check
from llmpy.train.memory import memory_of
from llmpy.train.start import BUILTIN_VOCAB


class Meter(Laptop):
    """A laptop that scales with its threads."""

    def __init__(self, threads: int = 1) -> None:
        super().__init__()
        self.threads = threads

    def measure_peak(self) -> float:
        return 10.0 * self.threads


def load(name: str, threads: int | None = None, **_: Any) -> Any:
    return Meter(threads or 1)


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("LLMPY_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def test_every_check_is_made() -> None:
    checks = doctor.doctor(DoctorOptions(network=False), load)
    asked = ["program", "cpu", "threads", "peaks", "memory", "kernel cache", "data cache", "disk"]
    assert [check.name for check in checks] == asked
    assert all(check.state == (NOTE if check.fix else OK) for check in checks), checks


@pytest.mark.parametrize(("state", "code"), [(ERROR, 1), (OK, 0)])
def test_an_error_is_exit_code_1(
    state: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [Check("disk", state, "what was found", "make room"), Check("cpu", OK, "fine")]
    monkeypatch.setattr(doctor, "doctor", lambda _: checks)
    assert cli.main(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out) == {"can_train": not code, "checks": [asdict(c) for c in checks]}
    assert cli.main(["doctor"]) == code
    out = capsys.readouterr().out
    assert all(part in out for part in (state, "disk  what was found", "→ make room"))
    assert "\x1b" not in out


def test_a_machine_that_does_not_load() -> None:
    def broken(name: str, **_: Any) -> Any:
        raise LlmpyError("option.invalid", "2000 threads", "Use --threads 1024 or less")

    checks = doctor.doctor(DoctorOptions(network=False), broken)
    check = next(check for check in checks if check.name == "cpu")
    assert (check.state, check.fix) == (ERROR, "Use --threads 1024 or less")
    assert not doctor.record(checks)["can_train"]
    assert "disk" in [c.name for c in checks]  # the other checks are still made


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = ModelConfig.from_dial(DEFAULT_MODEL, vocab_size=BUILTIN_VOCAB)  # as in `llmpy train`
    needed = memory_of(TrainOptions(), trained, Meter())
    for free, state in ((needed << 4, OK), (needed + 1, NOTE), (needed - 1, ERROR)):
        monkeypatch.setattr(doctor, "available_memory", lambda free=free: free)
        check = doctor.memory(Meter())
        assert (check.state, check.numbers["default_training"]) == (state, needed)


def test_threads_that_cannot_all_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8)
    monkeypatch.setattr(doctor, "cores", lambda: 8)
    assert doctor.threads(Meter(8)).state == OK
    assert doctor.threads(Meter(4)).state == NOTE
    monkeypatch.setattr(doctor, "cores", lambda: 2)
    check = doctor.threads(Meter(8))
    assert (check.state, check.fix) == (NOTE, "Use --threads 2")


def test_cores_that_are_shared() -> None:
    class Half(Meter):
        def measure_peak(self) -> float:
            return 12.0

    check = doctor.peaks(Half(2), lambda *_, **__: Half(1))
    assert (check.state, check.numbers["gflops"]) == (NOTE, 12.0)
    assert "--threads 1" in check.fix
    assert doctor.peaks(Meter(2), load).state == OK


def test_the_kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o700)
    assert [check.state for check in doctor.kernel_cache()] == [OK]
    if os.name == "posix":
        folder.chmod(0o777)
        assert "chmod" in list(doctor.kernel_cache())[1].fix
    (tmp_path / "a file").touch()
    monkeypatch.setenv("LLMPY_CACHE_DIR", str(tmp_path / "a file"))
    check = next(doctor.kernel_cache())
    assert (check.state, "LLMPY_CACHE_DIR" in check.fix) == (NOTE, True)


@pytest.mark.parametrize(
    ("folder", "needed", "state"),
    [("runs", 1000, OK), ("runs", 1 << 60, ERROR), ("a file/runs", 0, NOTE), ("a file/runs", 1000, ERROR)],
)
def test_a_folder_that_is_full_or_cannot_be_written(tmp_path: Path, folder: str, needed: int, state: str) -> None:
    (tmp_path / "a file").touch()
    check = next(doctor.place("disk", lambda: tmp_path / folder, "use --out", needed))
    assert (check.state, check.fix) == (state, "" if state == OK else "use --out")


class Head(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), Head) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert next(doctor.network()).state == OK
    check = next(doctor.network())  # the server is down
    assert (check.state, "HF_ENDPOINT" in check.fix) == (NOTE, True)
    for address in ("no address", "http://127.0.0.1/a\tb", "http://127.0.0.1:port"):
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert next(doctor.network()).state == NOTE, address
