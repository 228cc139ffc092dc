"""`llmpy completion SHELL`: the script that shtab makes of our parsers, told which values are sizes, names or files."""

from __future__ import annotations

import argparse
import zlib
from typing import Any

import shtab

from ..model.config import LADDER, NAMES
from ..options.fields import flags_of

FILES = {"PATH", "RUN", "FILE", "FILE.yaml", "FILE.png", "DIR", "MODEL", "IN", "OUT", "WHAT", "PYTHON"}  # metavars
SIZES = (*NAMES, *(f"d{depth}" for depth in range(1, max(LADDER) + 1)))  # no gpt3:c768: in bash a colon ends a word


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """Return what the shell sources."""
    mark(parser)
    return shtab.complete(parser, shell)


def mark(parser: argparse.ArgumentParser) -> None:
    """Attach to each action of a parser and of those below it what its values are, as shtab reads it."""
    kind = parser.get_default("options")
    names = {f.name: f.metadata["names"] for f in flags_of(kind)} if kind else {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                mark(child)
        elif action.choices is None and action.nargs != 0:
            words, files = names.get(action.dest, ()), action.metavar in FILES
            if action.dest == "model" and not files:
                words = SIZES
            if words or files:
                action.complete = values(words, files)  # type: ignore[attr-defined]


def values(words: tuple[str, ...], files: bool) -> Any:
    """Return how each shell completes one of these words, or a file as well."""
    if not words:
        return shtab.FILE
    listed, name = " ".join(words), f"_llmpy_{zlib.crc32(repr((words, files)).encode()):x}"
    bash = f"compgen -W '{listed}' -- \"$1\"" + '; compgen -f -- "$1"' * files
    zsh = f"_alternative 'names:name:({listed})'" + " 'files:file:_files'" * files
    return {
        "preamble": {"bash": f"{name}() {{ {bash}; }}\n", "zsh": f"{name}() {{ {zsh} }}\n"},
        "bash": name, "zsh": name, "tcsh": "f" if files else f"({listed})",
        "fish": listed + " (__fish_complete_path (commandline -ct))" * files,
    }  # fmt: skip
