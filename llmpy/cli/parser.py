"""argparse for dataclasses of options: one flag per field, one line per error."""

from __future__ import annotations

import argparse
import typing
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn

import shtab

from ..options.fields import FILES, flag_of, flags_of, path_of
from ..system.terminal import printable


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith("?") else "."
        self.exit(2, f"{self.prog}: error: {printable(message)}{end} Run {self.prog} --help\n")


def add_flags(parser: Parser, options: type) -> None:
    """Add the flags and positional arguments of a dataclass of options; a field's type selects its parser."""
    kinds = typing.get_type_hints(options)
    for field in flags_of(options):
        kind, about, names = kinds[field.name], field.metadata, [*field.metadata["flags"], flag_of(field.name)]
        if isinstance(kind, UnionType):
            kind = typing.get_args(kind)[0]
        text = about["help"]
        if field.default is not None and field.default not in ("", False, (), Path()) and "default" not in text:
            default = f"{field.default:g}" if type(field.default) is float else field.default
            text += f" (default: {'yes' if default is True else default})"
        # SUPPRESS: an absent flag may be set by --config, --recipe or the resumed run.
        settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction if field.default else "store_true"
            parser.add_argument(*names, **settings)
            continue
        settings["metavar"] = about["metavar"] or {int: "N", float: "X"}.get(kind, "TEXT")
        if about["choices"]:
            settings["choices"], settings["metavar"] = about["choices"], about["metavar"] or None
        if many := typing.get_origin(kind) is tuple:
            kind = typing.get_args(kind)[0]
            settings |= {"action": "append"} if about["each"] else {"action": "extend", "nargs": "+"}
        settings["type"] = _named if kind is Path else _expanded if about["metavar"] in FILES else kind
        if about["word"]:
            names = [settings.pop("dest")]
            settings |= {"nargs": "*"} if many else {}
        action = parser.add_argument(*names, **settings)
        if about["metavar"] in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]


def _named(word: str) -> Path:
    """Return the path, ~ expanded: a shell keeps that of `--data=~/x`.

    Raise for "", an unset shell variable, because Path("") is the current folder.
    """
    if not word:
        raise argparse.ArgumentTypeError("the path is empty")
    return path_of(word)


def _expanded(word: str) -> str:
    """Return a name or path, as text, with ~ expanded."""
    return str(path_of(word)) if word.startswith("~") else word
