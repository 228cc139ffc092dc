"""Options in YAML: files for --config, and llm.c's scripts `run_*.sh` as recipes for --recipe."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ..errors import LlmpyError, unreadable
from .fields import FILES, converted, flags_of, options_of, path_of

SCRIPTS = ("gpt2_124M", "gpt2_350M", "gpt2_774M", "gpt2_1558M", "gpt3_125M")  # recipes/NAME.yaml
SHORT = {name.removeprefix("gpt2_"): name for name in SCRIPTS if name.startswith("gpt2_")}
RECIPE_NAMES = (*SCRIPTS, *SHORT)
MOST = 1 << 17  # bytes of a file: PyYAML reads about 100 kB a second
NESTED = 8  # levels: PyYAML takes time proportional to their square


def read_yaml(options: type, path: Path) -> dict[str, Any]:
    """Return the options of a YAML file by name. Raises LlmpyError if it is unreadable or invalid."""
    import yaml

    hint = "Write one option per line, NAME: VALUE, as llmpy train --print-config does"
    try:
        with path.open("rb") as file:
            text = file.read(MOST + 1)
        level = 0
        for token in yaml.scan(text[:MOST], yaml.SafeLoader):
            level += ("Start" in (kind := type(token).__name__)) - ("End" in kind)
            if level > NESTED or len(text) > MOST:
                raise LlmpyError("config.not-yaml", f"{path} is not a file of options: too long or too deep", hint)
        root = yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise unreadable(path, error) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise LlmpyError("config.not-yaml", f"{path}{where} is not YAML", hint) from None
    if not isinstance(root, yaml.MappingNode):
        raise LlmpyError("config.no-options", f"{path} contains no options", hint)
    paths = [f.name for f in options_of(options) if f.metadata["metavar"] in FILES]
    found: dict[str, Any] = {}
    for key, node in root.value:
        where = f"{path}, line {key.start_mark.line + 1}"
        name = str(key.value).replace("-", "_") if isinstance(key, yaml.ScalarNode) else ""
        if name in found or name == "config":
            what = f"{where}: option {name} is given twice" if name in found else f"{where}: a file cannot name another"
            raise LlmpyError("config.invalid-option", what, "Remove one of them" if name in found else "Use one file")
        value_of = partial(_text, path=name in paths)
        try:
            value = [*map(value_of, node.value)] if isinstance(node, yaml.SequenceNode) else value_of(node)
            found[name] = converted(options, name, value)
            options(**{name: found[name]})  # checks its range and choices
        except LlmpyError as error:
            raise LlmpyError("config.invalid-option", f"{where}: {error.message}", error.hint) from None
        except UnicodeDecodeError:
            what = f"{where}: option {name[:60]!r} has half a surrogate pair"
            raise LlmpyError("config.invalid-option", what, "Write the character itself") from None
    return found


def _text(node: Any, path: bool) -> Any:
    """Return a value as it is written: 2024 may be a path. None for null, {} for what no option can be."""
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind not in ("null", "bool", "int", "float", "timestamp", "str", "value", "merge"):
        return {}
    text = node.value.encode("utf-16", "surrogatepass").decode("utf-16")  # joins JSON's pairs, as in "\\ud83d\\ude42"
    return None if kind == "null" else str(path_of(text)) if path and text[:1] == "~" else text


def read_recipe(options: type, name: str) -> dict[str, Any]:
    """Return the options of one of RECIPE_NAMES. Raises LlmpyError for another name."""
    return read_yaml(options, Path(__file__).with_name("recipes") / f"{SHORT.get(name, name)}.yaml")


def as_yaml(options: Any) -> str:
    """Return options as a file for --config, one per line, in the order of --help."""
    import yaml

    record = options.as_record()
    shown = {f.name: record[f.name] for f in flags_of(options) if f.name in record}
    return str(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True))
