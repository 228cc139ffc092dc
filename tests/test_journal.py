"""Lines go to the terminal and the log alike; the bar is for terminals only."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from llmpy.journal import Journal


class Terminal(io.StringIO):
    """A terminal that remembers."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_numbers_and_the_bar(terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    with Journal(tmp_path) as journal:
        journal.say("before")
        journal.begin_progress()
        journal.progress(0.5, "step 1/2")
        journal.say("during")
        journal.record(step=1, loss=0.5)
        assert json.loads((tmp_path / "metrics.jsonl").read_text("utf-8")) == {"step": 1, "loss": 0.5}
        journal.end_progress()
        journal.say("after — ½")
    assert (tmp_path / "main.log").read_text("utf-8") == "before\nduring\nafter — ½\n"
    text = shown.getvalue()
    assert [w for w in ("before", "during", "after — ½") if w in text] == ["before", "during", "after — ½"]
    assert ("|" in text and "%" in text) == terminal
