"""argparse for dataclasses of options: a flag for each field, and errors of one line that propose what was meant."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn

from ..options.fields import flag_of, flags_of
from ..options.llmc_letters import LETTERS
from ..system.words import asked, nearest
from .help_text import ELSEWHERE


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line that propose the nearest valid word."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def serve(self, verb: Any, options: Any) -> None:
        """Add the flags of a dataclass of options, which `verb` is called with."""
        self.set_defaults(verb=verb, options=options, parser=self)
        kinds = typing.get_type_hints(options)
        for field in flags_of(options):
            add_flag(self, field, kinds[field.name])

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help tells more)\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse ignores a failed write; help that was asked for and did not come is an error.
        if file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        # A wrong verb or choice; argparse lists all choices but proposes none before Python 3.14.
        if action.choices is not None and value not in action.choices:
            words = [str(c) for c in action.choices]
            what = "/".join(action.option_strings) or action.dest
            others = ELSEWHERE[""] if action.dest == "VERB" else {}
            hint = suggest(str(value), words, others) or f" — use {', '.join(words)}"
            self.error(f"{what} {value!r} is unknown{hint}")


def meant(verb: str, word: str, parser: Parser) -> str:
    """Return what to write for an argument that the verb does not know."""
    if verb == "train" and not word.startswith("-"):
        return f" — did you mean --data {word}?" if os.path.exists(word) else " — text is given with --data PATH"
    name = word.partition("=")[0]
    if verb == "train" and (hint := LETTERS.get(name)):
        return f" — use {hint}" if hint.startswith("--") else f" — {hint}"
    dashes = name[: len(name) - len(name.lstrip("-"))]
    flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith(dashes)]
    return suggest(name, flags, ELSEWHERE.get(verb, {}))


def suggest(word: str, known: Sequence[str], others: Mapping[str, str]) -> str:
    """Return ` — did you mean …?` with the nearest of the known words, or ` — use …` of the `others`; or ""."""
    close = [word.replace("_", "-")] if word.replace("_", "-") in others else nearest(word, [*known, *others])
    if close and close[0] in others:
        return f" — use {others[close[0]]}"
    return f" — {asked([c for c in close if c not in others])}" if close else ""


def add_flag(parser: Parser, field: dataclasses.Field[Any], kind: Any) -> None:
    """Add the flag of one field, or a word without flag; the field's type says how it is parsed."""
    if NoneType in typing.get_args(kind):
        kind = next(k for k in typing.get_args(kind) if k is not NoneType)
    about = field.metadata
    text = about["help"]
    if field.default is not None and field.default not in ("", False, (), Path()) and "default" not in text:
        text += f" (default: {shown(field.default)})"
    # What was not given is absent: a file of options may say it, or the run that is resumed.
    settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if kind is bool:
        action = argparse.BooleanOptionalAction if field.default else "store_true"
        parser.add_argument(flag_of(field.name), action=action, **settings)
        return
    if about["choices"]:
        settings["choices"], settings["metavar"] = about["choices"], about["metavar"] or None
    else:
        settings["metavar"] = about["metavar"] or {int: "N", float: "X"}.get(kind, "TEXT")
    inner, many = kind, typing.get_origin(kind) is tuple
    if many:
        inner = typing.get_args(kind)[0]
        settings |= {"action": "append"} if about["each"] else {"action": "extend", "nargs": "+"}
    settings["type"] = named if inner is Path else inner
    if about["word"]:
        settings |= {"nargs": "*"} if many else {}
        parser.add_argument(settings.pop("dest"), **settings)
    else:
        parser.add_argument(*about["flags"], flag_of(field.name), **settings)


def named(word: str) -> Path:
    """Return the path. Path("") is the current folder, which nobody means by a shell variable that is not set."""
    if not word:
        raise argparse.ArgumentTypeError("the name of a file or folder is empty")
    return Path(word)


def shown(value: Any) -> str:
    """Return a default as the user would type it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
