"""Options as dataclass fields with a flag, help and a range; their checks and conversions to JSON and YAML."""

from __future__ import annotations

import contextlib
import math
import os
import textwrap
import types
import typing
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

from ..errors import LlmpyError
from ..system.words import did_you_mean


class Range(NamedTuple):
    """The range of a number, both ends included, and its text in errors."""

    low: float
    high: float
    text: str


POSITIVE = Range(math.ulp(0.0), 2.0**62, "a number above 0 and below 2^62")
NOT_NEGATIVE = Range(0, 2.0**62, "0, or a number above 0 and below 2^62")
SHARE = Range(0, 1, "a number from 0 to 1")
FILES = {"PATH", "RUN", "FILE", "FILE.yaml", "DIR", "MODEL", "IN", "OUT", "WHAT"}  # metavars of paths
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}  # of YAML
KINDS = {bool: "yes or no", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


def option(
    default: Any, text: str, *flags: str, choices: tuple[str, ...] = (), within: Range | None = None,
    special: int | None = None, metavar: str = "", word: bool = False, each: bool = False,
) -> Any:  # fmt: skip
    """Return a dataclass field that is also a flag, `--its-name`.

    A field without `text` belongs to records but is not a flag. `flags` are further spellings; a `word` is positional.
    A flag of a tuple takes all values that follow it or, with `each`, one value and can be repeated. Numbers must be
    `within` a range, or equal `special`.
    """
    about = {"help": text, "flags": flags, "choices": choices, "within": within, "special": special}
    return field(default=default, metadata=about | {"metavar": metavar, "word": word, "each": each})


class Options:
    """A dataclass of options that checks its values."""

    def __post_init__(self) -> None:
        """Raise LlmpyError for a value that is out of range or not one of its choices."""
        for f in options_of(self):
            value, within, choices = getattr(self, f.name), f.metadata["within"], f.metadata["choices"]
            if value is None:
                continue
            if within and value != f.metadata["special"] and not within.low <= value <= within.high:
                raise refusal(f.name, value, f"Use {within.text}")
            for word in (value if isinstance(value, tuple) else (value,)) if choices else ():
                if word not in choices:
                    raise refusal(f.name, word, f"Use one of {', '.join(choices)}")

    @classmethod
    def gather(cls, given: Mapping[str, Any]) -> Self:
        """Return the options of a command line, given its flags' values by name."""
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class OnMachine(Options):
    """Options of every verb that computes; last in --help."""

    threads: int | None = option(None, "CPU threads (default: one per core)", within=POSITIVE)
    dtype: str = option("auto", "type of products; auto: bfloat16 if native", choices=("auto", "float32", "bfloat16"))


@dataclass(frozen=True, kw_only=True)
class Generating(OnMachine):
    """Options of every verb that generates text."""

    dtype: str = option(
        "auto", "type of products; auto: bfloat16 if native; int8: weights of a byte, for generation",
        choices=("auto", "float32", "bfloat16", "int8"),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Reported(OnMachine):
    """Options of every verb that prints a table."""

    json: bool = option(False, "print one JSON object")


def options_of(kind: Any) -> list[Field[Any]]:
    """Return the fields of a dataclass of options that belong to records, those of mixins last."""
    return sorted((f for f in fields(kind) if f.metadata), key=lambda f: bool(f.kw_only))


def flags_of(kind: Any) -> list[Field[Any]]:
    """Return the fields that are flags or positional arguments, in the order of --help."""
    return [f for f in options_of(kind) if f.metadata["help"]]


def flag_of(name: str) -> str:
    """Return the flag of a field: `batch_size` → `--batch-size`."""
    return "--" + name.replace("_", "-")


def plain(value: Any) -> Any:
    """Return a value in the types of JSON and YAML."""
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def converted(options: type, name: str, value: Any) -> Any:
    """Return a value of JSON or YAML in the type of its field. Raises LlmpyError if it has another type."""
    known = [f.name for f in options_of(options)]
    if name not in known:
        raise LlmpyError("option.unknown", f"unknown option {name[:60]!r}", did_you_mean(name, known) or "See --help")
    declared = typing.get_type_hints(options)[name]
    kind, *others = typing.get_args(declared) if isinstance(declared, types.UnionType) else (declared,)
    if value is None and others:
        return None
    many = typing.get_origin(kind) is tuple
    kind = typing.get_args(kind)[0] if many else kind
    path = next(f for f in options_of(options) if f.name == name).metadata["metavar"] in FILES
    found = []
    for one in (value or [None]) if many and isinstance(value, list | tuple) else [value]:
        try:
            if path and "\0" in str(one):
                raise ValueError
            found.append(_one(kind, one))
        except (TypeError, ValueError, OverflowError):
            shown = {list: "a list", tuple: "a list", dict: "a nested value", type(None): ""}.get(type(one), one)
            what = f"option {name}: {textwrap.shorten(str(shown), 60) or 'an empty value'} is not "
            what += "a path" if path and isinstance(one, str) else KINDS[kind]
            raise LlmpyError("option.invalid", what, f"See {flag_of(name)} in --help") from None
    return tuple(found) if many else found[0]


def _one(kind: type, value: Any) -> Any:
    """Return a value in the type of an option; numbers and bools may be texts. Raises ValueError if it has another."""
    if kind is bool and isinstance(value, str):
        value = WORDS.get(value.lower())
    if kind is int and isinstance(value, str) and not value.lstrip("+-").isdecimal():
        value = float(value)  # 1e6
    wrong = value is None or isinstance(value, list | tuple | dict | set) or (kind is Path and value == "")
    if wrong or (kind is bool) != isinstance(value, bool):
        raise ValueError
    if kind is int and not isinstance(value, str) and int(value) != value:
        raise ValueError
    return kind(value)


def path_of(text: str) -> Path:
    """Return the path, its ~ expanded as by a shell unless a file has this very name."""
    if text.startswith("~") and not os.path.exists(text):
        with contextlib.suppress(RuntimeError):  # no such user, or no home folder
            return Path(text).expanduser()
    return Path(text)


def refusal(name: str, value: Any, hint: str) -> LlmpyError:
    """Return the error of an invalid value."""
    return LlmpyError("option.invalid", f"{flag_of(name)} {textwrap.shorten(str(value), 60)} is invalid", hint)
