"""Color is used on terminals only, unless it is turned off; foreign text has no effect there."""

from __future__ import annotations

import io
import sys

import pytest

from llmpy.system.terminal import aside, coloured, generated, paint, printable


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_color_only_on_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert paint("fine", "green", Screen()) == "\x1b[32mfine\x1b[0m"
    assert paint("fine", "green", io.StringIO()) == "fine"
    for name, value, shown in (("NO_COLOR", "1", False), ("NO_COLOR", "", True), ("TERM", "dumb", False)):
        monkeypatch.setenv(name, value)
        assert coloured(Screen()) is shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]52;c;aGk=\x07", r"\x1b]52;c;aGk=\x07"),  # writes the clipboard
        ("\x9b31mred", r"\x9b31mred"),  # C1, 8-bit
        ("a\nllmpy: all is well", r"a\nllmpy: all is well"),
        ("over\rwritten\b\x7f\0\x85\u2028", r"over\rwritten\x08\x7f\x00\x85\u2028"),
        ("\u202egpj.exe\u2066", r"\u202egpj.exe\u2066"),
        ("tab\tNo\u00a0break, é, 日本, \U0001f468\u200d\U0001f469, می\u200cخواهم, \\x1b", None),
    ],
)
def test_control_characters_are_escaped(
    text: str, shown: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = text if shown is None else shown
    assert printable(text) == shown and printable(shown) == shown
    aside(text)
    assert capsys.readouterr().err == shown + "\n"
    assert generated(text) == text  # to a file or a pipe
    monkeypatch.setattr(sys, "stdout", Screen())
    assert generated(text) == shown.replace(r"a\n", "a\n")  # a text has lines
