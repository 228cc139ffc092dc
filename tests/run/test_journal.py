"""Lines go to the terminal and the log, the bar only to terminals; no error in either ends a run."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
from support.refused import refused

from llmpy.run.journal import Journal


class Terminal(io.StringIO):
    """A terminal that keeps its output."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_numbers_and_the_bar(terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    with Journal() as journal:
        journal.log("before")
        journal.open(tmp_path)
        journal.begin_progress()
        journal.progress(0.5, "step 1/2")
        journal.log("during")
        journal.record(step=1, loss=0.5)
        assert json.loads((tmp_path / "metrics.jsonl").read_text("utf-8")) == {"step": 1, "loss": 0.5}
        journal.end_progress()
        journal.log("after — ½")
    assert (tmp_path / "console.log").read_text("utf-8") == "before\nduring\nafter — ½\n"
    text = shown.getvalue()
    assert [w for w in ("before", "during", "after — ½") if w in text] == ["before", "during", "after — ½"]
    assert ("|" in text and "%" in text) == terminal


class Mortal(Terminal):
    """A terminal that can fail."""

    error: Exception | None = None

    def write(self, text: str) -> int:
        if self.error:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("error", [OSError(5, "EIO"), ValueError("closed file")])
@pytest.mark.parametrize("bar", [True, False])
def test_a_terminal_that_dies(bar: bool, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Mortal()
    monkeypatch.setattr(sys, "stdout", shown)
    with Journal() as journal:
        journal.open(tmp_path)
        if bar:
            journal.begin_progress()
        journal.log("seen")
        shown.error = error
        journal.progress(0.5, "half")
        journal.log("unseen")
        shown.error = None
        journal.begin_progress()
        journal.progress(0.6, "more")
        journal.log("still unseen")
        journal.record(step=1)
    assert (tmp_path / "console.log").read_text("utf-8") == "seen\nunseen\nstill unseen\n"
    assert (tmp_path / "metrics.jsonl").read_text("utf-8") == '{"step": 1}\n'
    assert "seen" in shown.getvalue()
    assert "unseen" not in shown.getvalue()


def test_it_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("precious\n", "utf-8")
    with Journal() as journal, refused("file.unwritable", tmp_path / "metrics.jsonl", "File exists"):
        journal.open(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text("utf-8") == "precious\n"


def test_a_resumed_run_is_truncated_to_its_checkpoint(tmp_path: Path) -> None:
    with Journal() as journal:
        journal.open(tmp_path)
        journal.record(step=1)
        journal.record_llmc("s:0 trl:1")
        journal.record_sample("--- step 1", "é")
        sizes = journal.sizes()
        journal.record(step=2)
        journal.record_llmc("s:1 trl:1")
        journal.log("first")
    with Journal() as journal:
        journal.open(tmp_path, sizes)
        assert journal.sizes() == sizes
        journal.record(step=3)
        journal.log("second")
        journal.sync()
    assert (tmp_path / "metrics.jsonl").read_text("utf-8") == '{"step": 1}\n{"step": 3}\n'
    assert (tmp_path / "main.log").read_text("utf-8") == "s:0 trl:1\n"
    assert (tmp_path / "samples.txt").read_text("utf-8") == "--- step 1\né\n\n"
    assert (tmp_path / "console.log").read_text("utf-8") == "first\nsecond\n"


def test_a_path_that_is_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Journal() as journal:
        journal.open(tmp_path)
        journal._show = lambda *_: None  # type: ignore[method-assign]  # the terminal is the command line's
        journal.log("run folder r\udcff")
    assert (tmp_path / "console.log").read_text("utf-8") == "run folder r?\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_warned_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Journal() as journal:
        journal.open(tmp_path)
        journal._files["metrics.jsonl"].close()
        journal._files["metrics.jsonl"] = open("/dev/full", "w", buffering=1)  # noqa: SIM115
        for step in range(3000):  # more than any buffer holds
            journal.record(step=step)
        journal.log("still there")
    warning = r"warning: cannot write /dev/full: No space left on device.*\nstill there\n"
    assert re.fullmatch(warning, capsys.readouterr().out)


def test_foreign_text_has_no_effect_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither now nor when console.log is shown; samples.txt is exact."""
    with Journal() as journal:
        journal.log("data \x1b]0;x\x07")
        journal.open(tmp_path)
        for line in ("a\tb\n\x9b2J", "\u202ec", ""):
            journal.log(line)
        journal.record_sample("--- step 1", "\x1b[1m")
    expected = "data \\x1b]0;x\\x07\na\tb\\n\\x9b2J\n\\u202ec\n\n"
    assert capsys.readouterr().out == (tmp_path / "console.log").read_text("utf-8") == expected
    assert (tmp_path / "samples.txt").read_text("utf-8") == "--- step 1\n\x1b[1m\n\n"
