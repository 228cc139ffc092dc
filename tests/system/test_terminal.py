"""Color is used on terminals only, unless it is turned off."""

from __future__ import annotations

import io

import pytest

from llmpy.system.terminal import coloured, paint


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
