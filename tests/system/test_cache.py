"""Where the cache is: without a home folder, in a home that cannot be written to, where a variable says."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest
from support.refused import refused

from llmpy.options.tools import DoctorOptions
from llmpy.system import cache, download
from llmpy.tools.doctor import doctor

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="homes of POSIX")


def absent(*_: object, **__: object) -> None:
    raise OSError


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder for temporary files of a user without HOME and passwd entry."""
    import pwd

    def unknown(*_: object) -> None:
        raise KeyError

    for name in ("HOME", "XDG_CACHE_HOME", "LLMPY_CACHE_DIR", "LLMPY_DATA", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)
    monkeypatch.setattr(sys, "platform", "linux")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cache, "_temporary", cache._temporary.__wrapped__)
    return tmp_path / "tmp"


@pytest.mark.parametrize("home", [None, "/proc/none", "/dev/null", "/proc"])
def test_a_private_temporary_folder(
    homeless: Path, home: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if home:
        monkeypatch.setenv("HOME", home)
        monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(("/proc", "/dev")))
    folder = cache.user_cache()
    assert folder == homeless / f"llmpy-{os.getuid()}" and folder.stat().st_mode & 0o777 == 0o700
    assert "LLMPY_CACHE_DIR" in capsys.readouterr().err
    assert cache.data_cache() == folder / "data"
    download._place_library()
    assert os.environ.pop("HF_HOME") == str(folder / "huggingface")
    assert not Path("~").exists()
    found = {check.name: check for check in doctor(DoctorOptions(network=False), absent)[-2:]}
    assert found["data cache"].numbers["folder"] == str(folder / "data")


@pytest.mark.parametrize("other", ["mode", "link", "file", "missing"])
def test_somebody_elses_temporary_folder_is_refused(
    homeless: Path, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = homeless / f"llmpy-{os.getuid()}"
    if other == "mode":
        place.mkdir(mode=0o777)
        place.chmod(0o777)
    elif other == "link":
        place.symlink_to(homeless)
    elif other == "file":
        place.touch()
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(homeless / "none"))
    with refused("cache.no-folder", "LLMPY_CACHE_DIR"):
        cache.user_cache()


def test_variables_win(homeless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.user_cache() == tmp_path / "xdg" / "llmpy"
    monkeypatch.setenv("LLMPY_CACHE_DIR", "relative")
    assert cache.data_cache() == Path("relative/data")
    monkeypatch.setenv("LLMPY_DATA", "~nobody-here/x")
    with refused("cache.no-folder", "LLMPY_DATA=~nobody-here/x"):
        cache.data_cache()
    monkeypatch.setenv("LLMPY_CACHE_DIR", "~/x")
    with refused("cache.no-folder", "LLMPY_CACHE_DIR=~/x"):
        cache.user_cache()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.user_cache() == tmp_path / "x"
