"""Colour is for people who look at a terminal and did not refuse it."""

from __future__ import annotations

import io
import os

import pytest

from llmpy.system.terminal import coloured, paint


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_is_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert paint("fine", "green", Screen()) == "\x1b[32mfine\x1b[0m"
    assert paint("fine", "green", io.StringIO()) == "fine"
    monkeypatch.setenv("NO_COLOR", "1")
    assert not coloured(Screen())
    monkeypatch.setenv("NO_COLOR", "")  # empty: as if it were not there
    assert coloured(Screen())
    monkeypatch.setenv("TERM", "dumb")
    assert not coloured(Screen())


def test_a_stream_that_is_closed_has_no_colour() -> None:
    with open(os.devnull, encoding="utf-8") as file:
        pass
    assert not coloured(file)
