"""Options in YAML: files for --config, and llm.c's scripts `run_*.sh` as recipes for --recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import LlmpyError, unreadable
from .fields import converted, flags_of

SCRIPTS = ("gpt2_124M", "gpt2_350M", "gpt2_774M", "gpt2_1558M", "gpt3_125M")  # recipes/NAME.yaml
SHORT = {name.removeprefix("gpt2_"): name for name in SCRIPTS if name.startswith("gpt2_")}
RECIPE_NAMES = (*SCRIPTS, *SHORT)


def read_yaml(options: type, path: Path) -> dict[str, Any]:
    """Return the options of a YAML file by name. Raises LlmpyError if it is unreadable or invalid."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text("utf-8")) or {}
    except OSError as error:
        raise unreadable(path, error) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        hint = "See llmpy train --print-config for an example"
        raise LlmpyError("config.not-yaml", f"{path} is not YAML: {error}", hint) from None
    if not isinstance(found, dict):
        hint = "Write one per line, as llmpy train --print-config does"
        raise LlmpyError("config.no-options", f"{path} contains no options", hint)
    named = {str(name).replace("-", "_"): value for name, value in found.items()}
    try:
        return {name: converted(options, name, value) for name, value in named.items() if name != "config"}
    except LlmpyError as error:
        raise LlmpyError("config.invalid-option", f"{path}: {error.message}", error.hint) from None


def read_recipe(options: type, name: str) -> dict[str, Any]:
    """Return the options of one of RECIPE_NAMES. Raises LlmpyError for another name."""
    return read_yaml(options, Path(__file__).with_name("recipes") / f"{SHORT.get(name, name)}.yaml")


def as_yaml(options: Any) -> str:
    """Return options as a file for --config, one per line, in the order of --help."""
    import yaml

    record = options.as_record()
    shown = {f.name: record[f.name] for f in flags_of(options) if f.name in record}
    return str(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True))
