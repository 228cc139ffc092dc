"""The command line with verbs that do nothing but remember their options."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import pytest

from llmpy.cli import main as cli


def hear(patch: pytest.MonkeyPatch) -> list[Any]:
    """Return the options that verbs are called with from now on."""
    heard: list[Any] = []
    patch.setattr(cli, "VERBS", [verb._replace(call=lambda options: heard.append(options) or 0) for verb in cli.VERBS])
    return heard


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Return the parser and those of all verbs below it."""
    yield parser
    for action in parser._actions:
        for child in action.choices.values() if isinstance(action, argparse._SubParsersAction) else ():
            yield from parsers(child)
