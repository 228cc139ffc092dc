"""The command line with verbs that do nothing but remember their options."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from typing import Any

import pytest

from llmpy.cli import main as cli

VERBS = (
    "train", "sample", "chat", "watch", "plot", "data", "plan", "convert", "doctor", "selftest", "bench", "bench_ops",
    "bench_decode", "bench_peers", "completion",
)  # fmt: skip


def hear(patch: pytest.MonkeyPatch) -> list[Any]:
    """Return the options that verbs are called with from now on."""
    heard: list[Any] = []

    def silent(verb: Any) -> Any:
        @functools.wraps(verb)  # --help shows its docstring
        def remember(options: Any) -> int:
            heard.append(options)
            return 0

        return remember

    for name in VERBS:
        patch.setattr(cli, name, silent(getattr(cli, name)))
    return heard


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Return the parser and those of all verbs below it."""
    yield parser
    for action in parser._actions:
        for child in action.choices.values() if isinstance(action, argparse._SubParsersAction) else ():
            yield from parsers(child)
