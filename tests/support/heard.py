"""The command line with verbs that only record their options, and a user who types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llmpy.cli import main as cli


def hear(patch: pytest.MonkeyPatch) -> list[Any]:
    """Replace the verbs; return the list of options that they are called with."""
    heard: list[Any] = []
    patch.setattr(cli, "VERBS", [verb._replace(call=lambda options: heard.append(options) or 0) for verb in cli.VERBS])
    return heard


def lines(*typed: str) -> Callable[[], str]:
    """Return a user who types these lines, then Ctrl-D."""
    left = iter(typed)

    def ask() -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return ask
