"""Each problem is found where it is made, and is told with its fix; what prevents training ends with exit code 1."""

from __future__ import annotations

import importlib.metadata
import json
import os
import threading
from collections.abc import Iterator
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
from llmpy.system.command import install
from llmpy.system.resources import container_cores, container_memory
from llmpy.tools import doctor
from llmpy.tools.doctor import FAULT, NOTE, OK, Check
from llmpy.train.memory import memory_of


class Meter(Laptop):
    """A laptop whose threads all help."""

    def __init__(self, threads: int = 1) -> None:
        super().__init__()
        self.threads = threads

    def measure_peak(self) -> float:
        return 10.0 * self.threads


def load(name: str, threads: int | None = None, **_: Any) -> Any:
    return Meter(threads or 1)


def named(checks: list[Check] | Iterator[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("LLMPY_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def test_everything_is_looked_at(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    checks = doctor.doctor(DoctorOptions(network=False), load)
    names = [check.name for check in checks]
    for name in (
        "program",
        "packages",
        "cpu",
        "threads",
        "peaks",
        "memory",
        "kernel cache",
        "data cache",
        "disk",
        "MPI",
    ):
        assert name in names
    assert "network" not in names
    assert all(check.state in (OK, NOTE) for check in checks), checks
    assert all(check.fix for check in checks if check.state == NOTE and check.name != "kernels")
    monkeypatch.setattr(doctor, "doctor", lambda _: checks)
    assert cli.main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["can_train"] is True
    assert [check["name"] for check in told["checks"]] == names
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "this machine can train" in out
    assert "\x1b" not in out


def test_a_fault_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        doctor, "doctor", lambda _: [Check("disk", FAULT, "full", "make room"), Check("cpu", OK, "fine")]
    )
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "fault  disk  full" in out
    assert "→ make room" in out
    assert "faults that prevent training: 1" in out


def test_a_machine_that_does_not_load() -> None:
    def broken(name: str, **_: Any) -> Any:
        raise LlmpyError("2000 threads", "use --threads between 1 and 1024")

    checks = doctor.doctor(DoctorOptions(network=False), broken)
    check = named(checks, "cpu")
    assert (check.state, check.fix) == (FAULT, "use --threads between 1 and 1024")
    assert not doctor.record(checks)["can_train"]
    assert "disk" in [c.name for c in checks]  # the rest is looked at all the same


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = doctor.memory(Meter())
    assert check.state == OK
    trained = ModelConfig.from_dial(DEFAULT_MODEL, vocab_size=512)  # as `llmpy train` takes for its own text
    assert check.numbers["default_training"] == memory_of(TrainOptions(), trained, Meter())
    monkeypatch.setattr(doctor, "container_memory", lambda: (100 << 20, 50 << 20))
    (check,) = doctor.memory(Meter())
    assert check.state == FAULT
    assert "the container may take 0.1 GB" in check.found
    needed = check.numbers["default_training"]
    monkeypatch.setattr(doctor, "container_memory", lambda: (needed + 1, 0))
    assert next(doctor.memory(Meter())).state == NOTE


def test_threads_that_cannot_all_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda _: 0.0)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(doctor, "container_cores", lambda: None)
    assert next(doctor.threads(Meter(8))).state == OK
    assert next(doctor.threads(Meter(4))).state == NOTE
    monkeypatch.setattr(doctor, "container_cores", lambda: 2.5)
    check = next(doctor.threads(Meter(8)))
    assert (check.state, check.fix) == (NOTE, "use --threads 2")
    monkeypatch.setattr(psutil, "cpu_percent", lambda _: 50.0)
    assert named(doctor.threads(Meter(8)), "other programs").numbers == {"busy_cores": 4.0}


def test_cores_that_are_shared() -> None:
    class Half(Meter):
        def measure_peak(self) -> float:
            return 12.0

    check = next(doctor.peaks(Half(2), lambda *_, **__: Half(1)))
    assert (check.state, check.numbers["gflops"]) == (NOTE, 12.0)
    assert "--threads 1" in check.fix
    assert next(doctor.peaks(Meter(2), load)).state == OK


def test_limits_of_containers(tmp_path: Path) -> None:
    assert container_cores(tmp_path) is None
    assert container_memory(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "memory").mkdir()
    for name, text in (("quota", "150000"), ("period", "100000")):
        (tmp_path / "cpu" / f"cpu.cfs_{name}_us").write_text(text)
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("5000\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("40\n")
    assert container_cores(tmp_path) == 1.5
    assert container_memory(tmp_path) == (5000, 40)
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1")
    assert container_cores(tmp_path) is None
    (tmp_path / "cpu.max").write_text("300000 100000\n")
    (tmp_path / "memory.max").write_text("7000\n")
    (tmp_path / "memory.current").write_text("70\n")
    assert container_cores(tmp_path) == 3
    assert container_memory(tmp_path) == (7000, 70)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert container_cores(tmp_path) is None
    assert container_memory(tmp_path) == (5000, 40)


def test_the_kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache" / "kernels"
    check = next(doctor.kernel_cache())
    assert (check.state, check.numbers["bytes"]) == (OK, 0)
    (folder / "build").mkdir()
    (folder / "build" / "kernel.nbc").write_bytes(bytes(1000))
    check = next(doctor.kernel_cache())
    assert (check.numbers["bytes"], check.numbers["builds"]) == (1000, 1)
    monkeypatch.setattr(doctor, "CACHE_LARGE", 999)
    assert "remove the folder" in next(doctor.kernel_cache()).fix
    if os.name == "posix":
        folder.chmod(0o777)
        assert "can be written by others" in next(doctor.kernel_cache()).found
    (tmp_path / "a file").touch()
    monkeypatch.setenv("LLMPY_CACHE_DIR", str(tmp_path / "a file"))
    check = next(doctor.kernel_cache())
    assert (check.state, "LLMPY_CACHE_DIR" in check.fix) == (NOTE, True)


def test_a_disk_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    assert next(doctor.disk()).state == OK
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    check = next(doctor.disk())
    assert (check.state, "--out" in check.fix) == (FAULT, True)


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy>=2.0", "no_such_thing>=3", 'nor_this>=1; extra == "plot"', 'psutil>=1; extra == "gguf"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: wanted)
    checks = {check.name: check for check in doctor.packages()}
    assert checks["packages"].state == FAULT
    assert checks["packages"].fix == install("no_such_thing>=3")
    assert checks["extra plot"].state == NOTE
    assert "pip install nor_this" in checks["extra plot"].fix
    assert (checks["extra gguf"].state, checks["extra gguf"].found) == (OK, f"psutil {psutil.__version__}")

    def uninstalled(_: str) -> None:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "requires", uninstalled)
    assert next(doctor.packages()).state == NOTE


def test_what_mpi_lacks_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy>=2.0", 'mpi4py>=4; extra == "mpi"', 'mpich>=4.3; sys_platform != "win32" and extra == "mpi"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: wanted)
    monkeypatch.setattr(doctor, "version", lambda name: "2.0" if name == "numpy" else "")
    about = [check for check in (*doctor.packages(), *doctor.mpi()) if "pip install" in check.fix]
    assert [check.name for check in about if "mpi" in check.fix] == ["MPI"]
    assert about[-1].fix.endswith(install("llmpy[mpi]"))


def test_mpi_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda _: "4.0")
    monkeypatch.setattr(doctor, "MPI", "raise SystemExit('cannot load libmpi.so')")
    check = next(doctor.mpi())
    assert (check.state, "cannot load libmpi.so" in check.found) == (NOTE, True)
    monkeypatch.setattr(doctor, "MPI", "print('An MPI 4')")
    monkeypatch.setattr(doctor.launch, "find_mpiexec", lambda: "/bin/mpiexec")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    check = next(doctor.mpi())
    assert (check.state, "SLURM_NTASKS=4" in check.found) == (OK, True)
    monkeypatch.setattr(doctor, "MPI_SECONDS", 0.01)
    assert "does not load" in next(doctor.mpi()).found


class Head(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Gibberish(Head):
    def do_HEAD(self) -> None:
        self.wfile.write(b"no status line\r\n\r\n")


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), Head) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert next(doctor.network()).state == OK
    check = next(doctor.network())  # nobody listens any more
    assert (check.state, "HF_ENDPOINT" in check.fix) == (NOTE, True)
    for address in ("no address", "http://127.0.0.1/a\tb", "http://127.0.0.1:port"):
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert next(doctor.network()).state == NOTE, address
    with HTTPServer(("127.0.0.1", 0), Gibberish) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        check = next(doctor.network())
    assert (check.state, "no status line" in check.found) == (NOTE, True)
