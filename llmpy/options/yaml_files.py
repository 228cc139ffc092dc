"""Options in YAML: files for --config, and llm.c's scripts `run_*.sh` as such files, for --recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import LlmpyError
from .fields import converted, flags_of

SCRIPTS = ("gpt2_124M", "gpt2_350M", "gpt2_774M", "gpt2_1558M", "gpt3_125M")  # recipes/NAME.yaml
SHORT = {name.removeprefix("gpt2_"): name for name in SCRIPTS if name.startswith("gpt2_")}
RECIPE_NAMES = (*SCRIPTS, *SHORT)


def read_yaml(options: type, path: Path) -> dict[str, Any]:
    """Return the options that a YAML file sets. Raises LlmpyError if it is unreadable or invalid."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text("utf-8")) or {}
    except OSError as error:
        raise LlmpyError("options.x", f"cannot read {path}: {error.strerror or error}", "Check the name") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise LlmpyError("options.x", f"{path} is no YAML: {error}", "See llmpy train --print-config for one") from None
    if not isinstance(found, dict):
        raise LlmpyError(
            "options.x", f"{path} holds no options", "Write one a line, as llmpy train --print-config does"
        )
    named = {str(name).replace("-", "_"): value for name, value in found.items()}
    try:
        return {name: converted(options, name, value) for name, value in named.items() if name != "config"}
    except LlmpyError as error:
        raise LlmpyError("options.x", f"{path}: {error}") from None


def read_recipe(options: type, name: str) -> dict[str, Any]:
    """Return the options of one of RECIPE_NAMES. Raises LlmpyError for another name."""
    return read_yaml(options, Path(__file__).with_name("recipes") / f"{SHORT.get(name, name)}.yaml")


def as_yaml(options: Any) -> str:
    """Return options as a file for --config, one a line, in the order of --help."""
    import yaml

    record = options.as_record()
    shown = {f.name: record[f.name] for f in flags_of(options) if f.name in record}
    return str(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True))
