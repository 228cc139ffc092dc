"""What declares an option: a dataclass field with its flag, help and checks; a value of YAML as its field wants it."""

from __future__ import annotations

import math
import reprlib
import types
import typing
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import LlmpyError
from ..system.command import command
from ..system.inputs import regular
from ..system.words import did_you_mean

DTYPES = ("auto", "float32", "bfloat16")
DTYPE_TEXT = "arithmetic of the products (auto: bfloat16 where the CPU has it natively)"


def option(
    default: Any,
    text: str,
    *flags: str,
    choices: tuple[str, ...] = (),
    metavar: str = "",
    word: bool = False,
    each: bool = False,
    names: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that is also a flag, `--its-name`; `flags` are further spellings, a `word` goes without.

    Of a tuple's values a flag takes all that follow it, or with `each` one, and may come again. `names` are words that
    mean something, beside paths if `metavar` is one of those.
    """
    told = {"help": text, "flags": flags, "choices": choices, "metavar": metavar, "word": word, "each": each}
    return field(default=default, metadata=told | {"names": names})


@dataclass(frozen=True, kw_only=True)
class OnMachine:
    """What verbs that compute have in common; --help lists it last."""

    threads: int | None = option(None, "threads (default: one a core)")
    dtype: str = option("auto", DTYPE_TEXT, choices=DTYPES)

    def __post_init__(self) -> None:
        positive(self, "threads")
        known(self, "dtype", DTYPES)


@dataclass(frozen=True, kw_only=True)
class Reported(OnMachine):
    """What verbs that print a table have in common."""

    json: bool = option(False, "print one JSON object")


def flag(of: Field[Any]) -> str:
    """The field `batch_size` → `--batch-size`."""
    return flag_of(of.name)


def options_of(kind: Any) -> list[Field[Any]]:
    """Return the fields of a dataclass of options that are flags, those of mixins last."""
    return sorted((f for f in fields(kind) if f.metadata), key=lambda f: bool(f.kw_only))


def spelled(options: Any) -> list[str]:
    """The words of the command line that say what differs from the defaults."""
    words: list[str] = []
    for f in options_of(options):
        value = getattr(options, f.name)
        if value != f.default:
            words += [flag(f)] if value is True else [flag(f), str(value)]
    return words


def flag_of(name: str) -> str:
    """`batch_size` → `--batch-size`."""
    return "--" + name.replace("_", "-")


def plain(value: Any) -> Any:
    """A value as JSON and YAML have it."""
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def converted(options: type, name: str, value: Any) -> Any:
    """A value of JSON or YAML as the field wants it. Raises LlmpyError if it is of another kind."""
    hints = typing.get_type_hints(options)
    known_names = [f.name for f in options_of(options)]
    if name not in known_names:
        close = did_you_mean(name, known_names)
        raise LlmpyError(f"unknown option {name!r}", close or f"see {command('train', '--help')}")
    kinds = typing.get_args(hints[name]) if isinstance(hints[name], types.UnionType) else (hints[name],)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    try:
        if typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)[0]
            return tuple(inner(v) for v in (value if isinstance(value, list) else [value]))
        if kind is bool and not isinstance(value, bool):
            raise ValueError
        if kind is int and (isinstance(value, bool) or int(value) != float(value)):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        what = f"option {name}: {reprlib.repr(value)} is no {kind.__name__}"
        raise LlmpyError(what, "give it as for the flag") from None


def read_yaml(options: type, path: Path) -> dict[str, Any]:
    """The options that a YAML file names. Raises LlmpyError for a file that is no such thing."""
    import yaml

    try:
        found = yaml.safe_load(regular(path).read_text("utf-8")) or {}
    except OSError as fault:
        raise LlmpyError(f"cannot read {path}: {fault.strerror or fault}", "check --config") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as fault:
        raise LlmpyError(f"{path} is no YAML: {fault}", f"see {command('train', '--print-config')} for one") from None
    if not isinstance(found, dict):
        raise LlmpyError(f"{path} holds no options", f"write one a line, as {command('train', '--print-config')} does")
    named = {str(name).replace("-", "_"): value for name, value in found.items()}
    try:
        return {name: converted(options, name, value) for name, value in named.items() if name != "config"}
    except LlmpyError as fault:
        raise LlmpyError(f"{path}: {fault}") from None


def positive(options: Any, *names: str) -> None:
    """Raise LlmpyError unless each of these is above 0, or None where it may be left out."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise refusal(name, value, "use a number above 0")


def not_negative(options: Any, *names: str) -> None:
    """Raise LlmpyError unless each of these is 0 or above, or None where it may be left out."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 <= value < math.inf:
            raise refusal(name, value, "use 0 or a number above")


def below(options: Any, name: str, limit: int) -> None:
    """Raise LlmpyError unless the value is below the limit, a power of two, or None where it may be left out."""
    value = getattr(options, name)
    if value is not None and value >= limit:
        raise refusal(name, value, f"use a number below 2^{limit.bit_length() - 1}")


def known(options: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raise LlmpyError unless the value is one of the choices."""
    value = getattr(options, name)
    if value not in choices:
        raise refusal(name, value, f"{did_you_mean(str(value), choices)} use one of {', '.join(choices)}".lstrip())


def refusal(name: str, value: Any, hint: str) -> LlmpyError:
    return LlmpyError(f"{flag_of(name)} {value}", hint)
