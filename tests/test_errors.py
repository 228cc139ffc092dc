"""Errors: copied as multiprocessing pickles them, one full stop between sentences, one code for a kind."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmpy.cli import main as cli
from llmpy.errors import Diverged, LlmpyError, Stopped, unreadable


@pytest.mark.parametrize("error", [LlmpyError("a.b", "wrong", "Fix it"), Diverged("a.b", "wrong"), Stopped(15)])
def test_copies(error: LlmpyError) -> None:
    for again in (copy.copy(error), copy.deepcopy(error)):  # as pickle does it
        assert (type(again), str(again)) == (type(error), str(error))
        assert (again.code, again.hint, again.exit_code) == (error.code, error.hint, error.exit_code)


def test_one_full_stop_between_message_and_hint() -> None:
    assert str(LlmpyError("a.b", "the library failed.", "Try again")) == "the library failed. Try again"
    assert str(LlmpyError("a.b", "no\nfile\u2028x\n", "Try again")) == "no file x. Try again"


def test_a_missing_file_is_not_an_unreadable_one() -> None:
    codes = [unreadable(Path("x"), error).code for error in (FileNotFoundError(2, "gone"), PermissionError(13, "no"))]
    assert codes == ["file.missing", "file.unreadable"]


@pytest.mark.parametrize(
    ("body", "code", "named"),
    [
        ("int(os.environ['BROKEN_TIMEOUT'])", "environment.invalid", "broken cannot be used with BROKEN_TIMEOUT=ten s"),
        ("raise KeyError(os.environ['BROKEN_TIMEOUT'])", "environment.invalid", "BROKEN_TIMEOUT"),
        ("def f(): raise TypeError('odd')\nf()", "package.unusable", "broken cannot be imported: TypeError: odd"),
        ("raise ImportError('libx.so: no such file')", "package.unusable", "libx.so"),
        ("raise MemoryError('1 TB')", "memory.exhausted", "1 TB"),
        ("import llmpy.errors as e\nraise e.LlmpyError('a.b', 'ours')", "a.b", "ours"),
    ],
)
def test_a_library_that_cannot_be_imported(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    body: str,
    code: str,
    named: str,
) -> None:
    (tmp_path / "broken.py").write_text(f"import os\n{body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("BROKEN_TIMEOUT", "ten s")
    monkeypatch.setattr(cli, "run", lambda _: __import__("broken"))
    assert cli.main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith("llmpy: error: ") and error.endswith(f"[{code}]\n") and named in error


def test_an_error_of_our_own_is_not_blamed_on_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKEN_TIMEOUT", "ten s")
    monkeypatch.setattr(cli, "run", lambda _: int("ten s"))
    with pytest.raises(ValueError, match="ten s"):
        cli.main([])


@pytest.mark.parametrize(
    ("module", "setting"),
    [
        ("tqdm", "TQDM_MININTERVAL=abc"), ("huggingface_hub.constants", "HF_HUB_DOWNLOAD_TIMEOUT=abc"),
        ("matplotlib", "MPLBACKEND=nonsense"),
    ],
)  # fmt: skip
def test_settings_of_libraries(module: str, setting: str) -> None:
    pytest.importorskip(module)
    program = f"import sys\nfrom llmpy.cli import main as cli\ncli.run = lambda _: __import__({module!r})\n"
    program += "sys.exit(cli.main([]))"
    environment = os.environ | dict([setting.split("=")])
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    text = f"{module.split('.')[0]} cannot be used with {setting}. Correct or unset it [environment.invalid]\n"
    assert (ended.returncode, ended.stderr) == (1, f"llmpy: error: {text}")
