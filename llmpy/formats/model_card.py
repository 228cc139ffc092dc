"""README.md of an exported model: what it was trained from, how and on what, as far as its run recorded it.

It may become public, so of local paths it has the last names only.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from ..errors import LlmpyError
from ..options.fields import flag_of
from ..options.train import FINE_TUNING, TrainOptions
from ..run import checkpoint
from ..run.folder import BEST_FILE, CONFIG_FILE, METRICS, read_record
from ..system.command import command
from ..version import __version__
from . import hub
from .source import Source

TAIL = 1 << 17  # bytes of metrics.jsonl read, from its end
RESULTS = {
    "step": "steps", "loss": "training loss (nats per token)", "val_loss": "validation loss (nats per token)",
    "val_bits_per_byte": "validation loss (bits per byte)", "hellaswag": "HellaSwag accuracy",
}  # fmt: skip
PATHS = ("data", "val", "init", "hellaswag")


def model_card(source: Source) -> str:
    """Return the text of the card."""
    path, rows = source.path.absolute(), {"model": str(source.config)}
    name, base = path.name, hub.repository(path)
    for run in (path.parent, path.parent.parent.parent) if path.is_file() else ():  # the latter of a checkpoint
        with contextlib.suppress(LlmpyError):  # the folder of no run
            about = read_record(run / CONFIG_FILE)
            name, base = run.name, hub.repository(about["options"].get("init") or "")
            rows |= {"command": command_of(about["options"])} | facts(run, about, path)
    library = "peft" if source.config.lora else "transformers"
    head = {"library_name": library, "pipeline_tag": "text-generation", "tags": ["llmpy"]}
    lines = [f"{key}: {json.dumps(value)}" for key, value in (head | ({"base_model": base} if base else {})).items()]
    return "\n".join(["---", *lines, "---", "", *table(name, rows), ""])


def table(name: str, rows: dict[str, str]) -> list[str]:
    """Return the lines of a page with this title and the rows that are not empty."""
    lines = [f"# {cell(name)}", "", f"Written by llm.py {__version__}.", "", "| | |", "|---|---|"]
    return lines + [f"| {what} | {cell(x)} |" for what, x in rows.items() if x]


def facts(run: Path, about: dict[str, Any], model: Path) -> dict[str, str]:
    """Return what a run recorded of its model, given its config.json: base, data, numbers up to the model's step."""
    init = about["options"].get("init") or ""
    rows = {"base model": hub.repository(init) or Path(init).name}
    if about["options"].get("data") is None:
        rows["text"] = "the documentation of Python and NumPy"
    for part, marks in (about.get("data") or {}).items():
        shown = (f"{m['name']} ({m['tokens']:,} tokens, blake2b {m['blake2b']})" for m in marks)
        rows[f"{part} data"] = ", ".join(shown)
    numbers = _numbers(run, model)
    return rows | {what: numbers.get(key, "") for key, what in RESULTS.items()}


def _numbers(run: Path, model: Path) -> dict[str, str]:
    """Return the newest numbers in metrics.jsonl up to the step of the model."""
    last: float = float("inf")
    if found := checkpoint.NAME.fullmatch(model.parent.name):
        last = int(found[1])
    elif model.name == BEST_FILE and (score := checkpoint.read_header(model).score):
        last = score.step
    rows = [row for row in _last_rows(run / METRICS) if type(row.get("step")) is int and row["step"] <= last]
    values = {key: value for row in rows for key, value in row.items()}
    return {key: f"{value:.4f}" if type(value) is float else str(value) for key, value in values.items()}


def command_of(options: dict[str, Any], *resume: str, before: dict[str, Any] | None = None) -> str:
    """Return the command of a run: the options that are not the defaults, or not those `before` it was resumed."""
    tuned = options.get("init") and not options.get("init_state")
    words, defaults = ["train", *resume], before or TrainOptions().as_record() | (FINE_TUNING if tuned else {})
    for name, value in options.items():
        if value in ("", None) or name == "model" and options.get("init"):  # the base model has its shape
            continue
        if isinstance(value, bool) and value != defaults.get(name):
            words.append(flag_of(name if value else f"no_{name}"))
        elif value != defaults.get(name):
            listed = value if isinstance(value, list) else [value]
            values = [f"{v:.12g}" if isinstance(v, float) else str(v) for v in listed]
            words += [flag_of(name), *((hub.repository(v) or Path(v).name) if name in PATHS else v for v in values)]
    return command(*words)


def cell(value: str) -> str:
    """Return text that stays within a cell of a table."""
    return "".join(c if c.isprintable() else " " for c in value).replace("|", "\\|").replace("<", "&lt;")


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects in the last lines of a file."""
    found = []
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - TAIL))
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):  # cut off
                found.append(json.loads(line))
    return [row for row in found if isinstance(row, dict)]
