"""README.md of an exported model: what it was trained from, how and on what, as far as its run recorded it.

It may become public, so of local paths it has the last names only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..options.fields import flag_of
from ..options.train import TrainOptions
from ..run import checkpoint
from ..run.folder import BEST_FILE, CONFIG_FILE, METRICS
from ..system.command import command
from ..version import __version__
from . import hub
from .source import Source

TAIL = 1 << 17  # bytes of metrics.jsonl read, from its end
RESULTS = {
    "step": "steps", "loss": "training loss (nats per token)", "val_loss": "validation loss (nats per token)",
    "val_bits_per_byte": "validation loss (bits per byte)",
}  # fmt: skip
PATHS = ("data", "val", "init", "hellaswag")


def model_card(source: Source) -> str:
    """Return the text of the card."""
    path, rows = source.path.absolute(), {"model": str(source.config)}
    name, base = path.name, hub.repository(path)
    for run in (path.parent, path.parent.parent.parent) if path.is_file() else ():  # the latter of a checkpoint
        about = next(iter(_objects(run / CONFIG_FILE, whole=True)), {})
        if isinstance(options := about.get("options"), dict):
            init = options.get("init") or ""
            name, base = run.name, hub.repository(init)
            rows |= {"base model": base or Path(init).name, "command": _command(options)}
            for part, marks in (about.get("data") or {}).items():
                shown = (f"{m['name']} ({m['tokens']:,} tokens, blake2b {m['blake2b']})" for m in marks)
                rows[f"{part} data"] = ", ".join(shown)
            numbers = _numbers(run, path)
            rows |= {what: numbers.get(key, "") for key, what in RESULTS.items()}
    library = "peft" if source.config.lora else "transformers"
    head = {"library_name": library, "pipeline_tag": "text-generation", "tags": ["llmpy"]}
    lines = [f"{key}: {json.dumps(value)}" for key, value in (head | ({"base_model": base} if base else {})).items()]
    top = ["---", *lines, "---", "", f"# {_cell(name)}", "", f"Written by llm.py {__version__}.", ""]
    return "\n".join([*top, "| | |", "|---|---|", *(f"| {what} | {_cell(x)} |" for what, x in rows.items() if x), ""])


def _numbers(run: Path, model: Path) -> dict[str, str]:
    """Return the newest numbers in metrics.jsonl up to the step of the model."""
    last: float = float("inf")
    if found := checkpoint.NAME.fullmatch(model.parent.name):
        last = int(found[1])
    elif model.name == BEST_FILE and (score := checkpoint.read_header(model).score):
        last = score.step
    rows = [row for row in _objects(run / METRICS) if type(row.get("step")) is int and row["step"] <= last]
    values = {key: value for row in rows for key, value in row.items()}
    return {key: f"{value:.4f}" if type(value) is float else str(value) for key, value in values.items()}


def _command(options: dict[str, Any]) -> str:
    """Return the command of a run: the options that are not the defaults."""
    words, defaults = ["train"], TrainOptions().as_record()
    for name, value in options.items():
        if value == "" or name == "model" and options.get("init"):  # the base model has its shape
            continue
        if isinstance(value, bool) and value != defaults.get(name):
            words.append(flag_of(name if value else f"no_{name}"))
        elif value != defaults.get(name):
            listed = value if isinstance(value, list) else [value]
            values = [f"{v:.12g}" if isinstance(v, float) else str(v) for v in listed]
            words += [flag_of(name), *((hub.repository(v) or Path(v).name) if name in PATHS else v for v in values)]
    return command(*words)


def _cell(value: str) -> str:
    """Return text that stays within a cell of a table."""
    return "".join(c if c.isprintable() else " " for c in value).replace("|", "\\|").replace("<", "&lt;")


def _objects(path: Path, whole: bool = False) -> list[dict[str, Any]]:
    """Return the JSON objects in the last lines of a file, or the one that is the `whole` file."""
    found = []
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            for line in [file.read()] if whole else file:
                try:
                    found.append(json.loads(line))
                except (ValueError, RecursionError):  # cut off
                    continue
    except OSError:
        pass
    return [about for about in found if isinstance(about, dict)]
