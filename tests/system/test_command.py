"""Commands in messages can be pasted where they were printed."""

from __future__ import annotations

import shutil
import sys

import pytest

from llmpy.system.command import command, command_here


def test_a_program_that_the_shell_does_not_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [".venv/bin/llmpy", "train"])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert command_here("sample", "runs/my run") == ".venv/bin/llmpy sample 'runs/my run'"
    assert command("sample") == "llmpy sample"
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert command_here("sample") == "llmpy sample"
