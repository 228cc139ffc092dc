"""What an option is: a dataclass field with its flag, help and range; checks, and values of JSON and YAML."""

from __future__ import annotations

import math
import reprlib
import types
import typing
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

from ..errors import LlmpyError
from ..system.words import did_you_mean


class Range(NamedTuple):
    """The numbers that an option takes: lowest and highest, and how an error names them."""

    low: float
    high: float
    text: str


POSITIVE = Range(math.ulp(0.0), 2.0**62, "a number above 0, below 2^62")
NOT_NEGATIVE = Range(0, 2.0**62, "0 or a number above, below 2^62")
SHARE = Range(0, 1, "a number from 0 to 1")


def option(
    default: Any, text: str, *flags: str, choices: tuple[str, ...] = (), within: Range | None = None,
    special: int | None = None, metavar: str = "", word: bool = False, each: bool = False,
) -> Any:  # fmt: skip
    """Return a dataclass field that is also a flag, `--its-name`.

    Without `text` it is no flag, only part of records. `flags` are further spellings; a `word` has none. A flag of a
    tuple takes all values that follow it, or one with `each`, which may be repeated. Numbers are `within` a range, or
    `special`.
    """
    about = {"help": text, "flags": flags, "choices": choices, "within": within, "special": special}
    return field(default=default, metadata=about | {"metavar": metavar, "word": word, "each": each})


class Options:
    """A dataclass of options, checked when it is made."""

    def __post_init__(self) -> None:
        """Raise LlmpyError for a value that is out of its range or no choice."""
        for f in options_of(self):
            value, within, choices = getattr(self, f.name), f.metadata["within"], f.metadata["choices"]
            if value is None:
                continue
            if within and value != f.metadata["special"] and not within.low <= value <= within.high:
                raise refusal(f.name, value, f"use {within.text}")
            for word in (value if isinstance(value, tuple) else (value,)) if choices else ():
                if word not in choices:
                    raise refusal(f.name, word, f"use one of {', '.join(choices)}")

    @classmethod
    def gather(cls, given: Mapping[str, Any]) -> Self:
        """Return the options of a command line, from the values of its flags by name."""
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class OnMachine(Options):
    """What verbs that compute have in common; --help lists it last."""

    threads: int | None = option(None, "threads (default: one a core)", within=POSITIVE)
    dtype: str = option("auto", "of the products (auto: bfloat16 if native)", choices=("auto", "float32", "bfloat16"))


@dataclass(frozen=True, kw_only=True)
class Reported(OnMachine):
    """What verbs that print a table have in common."""

    json: bool = option(False, "print one JSON object")


def options_of(kind: Any) -> list[Field[Any]]:
    """Return the fields of a dataclass of options that a record holds, those of mixins last."""
    return sorted((f for f in fields(kind) if f.metadata), key=lambda f: bool(f.kw_only))


def flags_of(kind: Any) -> list[Field[Any]]:
    """Return the fields that are flags, in the order of --help."""
    return [f for f in options_of(kind) if f.metadata["help"]]


def flag_of(name: str) -> str:
    """`batch_size` → `--batch-size`."""
    return "--" + name.replace("_", "-")


def plain(value: Any) -> Any:
    """Return a value as JSON and YAML have it."""
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def converted(options: type, name: str, value: Any) -> Any:
    """Return a value of JSON or YAML as the field has it. Raises LlmpyError if it is of another kind."""
    known = [f.name for f in options_of(options)]
    if name not in known:
        raise LlmpyError("options.x", f"unknown option {name!r}", did_you_mean(name, known) or "See llmpy train --help")
    hint = typing.get_type_hints(options)[name]
    kind, *others = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and others:
        return None
    try:
        if typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)[0]
            return tuple(inner(v) for v in (value if isinstance(value, list) else [value]))
        if (kind is bool) != isinstance(value, bool) or (kind is int and int(value) != float(value)):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        what = f"option {name}: {reprlib.repr(value)} is no {kind.__name__}"
        raise LlmpyError("options.x", what, "Give it as for the flag") from None


def refusal(name: str, value: Any, hint: str) -> LlmpyError:
    """Return the error of an option's value."""
    return LlmpyError("options.x", f"{flag_of(name)} {value}", hint)
