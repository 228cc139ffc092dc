"""Commands that work when pasted."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llmpy.cli.main import main
from llmpy.system.command import called, command, install

needs_posix = pytest.mark.skipif(os.name != "posix", reason="of names without .exe")


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of our name, started by its path from the folder above; nothing is on the PATH."""
    path = tmp_path / "an env" / "llmpy"
    path.parent.mkdir()
    path.write_text(f"#!{sys.executable}\nfrom llmpy.cli.main import main\nraise SystemExit(main())\n")
    path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["an env/llmpy"])
    return path


@needs_posix
def test_the_path_where_the_name_is_not_found(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("train", "--resume", Path("my run")) == "'an env/llmpy' train --resume 'my run'"
    monkeypatch.setenv("PATH", str(program.parent))
    assert command("train") == "llmpy train"
    monkeypatch.setattr(sys, "argv", [str(program)])  # as the system names what it found
    assert command("train") == "llmpy train"
    other = program.parent.with_name("other") / "llmpy"
    other.parent.mkdir()
    other.symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(other.parent))
    assert called() == f"'{program}'"


def test_other_ways_to_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pytest"])
    assert called() == "llmpy"
    monkeypatch.setattr(sys, "argv", ["/lib/llmpy/cli/main.py"])
    assert called() == f"{shlex.quote(sys.executable)} -m llmpy"
    monkeypatch.setattr(sys, "argv", ["/lib/llmpy/__main__.py"])
    assert called() == f"{shlex.quote(sys.executable)} -m llmpy"
    monkeypatch.setattr(sys, "argv", ["/lib/other/__main__.py"])
    assert called() == "llmpy"


@needs_posix
def test_what_is_told_can_be_pasted(program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "runs/none"]) == 1
    told = capsys.readouterr().err.rpartition("train one: ")[2].strip()
    assert told == "'an env/llmpy' train"
    pasted = subprocess.run(["/bin/sh", "-c", f"{told} --print-config"], capture_output=True, cwd=tmp_path, check=False)
    assert pasted.returncode == 0, pasted.stderr
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "  'an env/llmpy' data tinyshakespeare" in capsys.readouterr().out


def test_no_message_names_the_program_itself() -> None:
    """Messages ask `command` for it: what follows the name in a string is then a word of a call."""
    package = Path(__file__).parents[2] / "llmpy"
    verbs = ("train", "data", "sample", "convert", "selftest", "bench")
    for path in package.rglob("*.py"):
        for line in path.read_text("utf-8").splitlines():
            told = any(f": llmpy {verb}" in line or f":  llmpy {verb}" in line for verb in verbs)
            assert not told or "made by" in line, f"{path}: {line}"


def test_packages_are_installed_for_this_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whichever Python the shell would find."""
    python = tmp_path / "py thon"
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install("llmpy[plot]") == f"'{python}' -m pip install 'llmpy[plot]'"
    own = tmp_path / "python"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(own))
    assert install("a", "b>=1") == "python -m pip install a 'b>=1'"
