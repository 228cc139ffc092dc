"""README.md of an exported model: what it was trained from, how and on what, as far as its run recorded it.

It may become public, so of local paths it has the last names only.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import LlmpyError
from ..options.fields import flag_of
from ..options.train import DROPPED, FINE_TUNING, TrainOptions
from ..run import checkpoint
from ..run.folder import BEST_FILE, CHECKPOINTS, CONFIG_FILE, METRICS, OURS, START_FILE, read_record, starts_of
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
            made = commands(about, run.name) if "machine" in about else ()  # else it has been prepared, not started
            lines = [f"from step {step}: {line}" if step else line for step, line in made if line]
            rows |= {"command": "; ".join(lines)} | facts(run, about, path)
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
    init = about["options"].get("init")
    rows = {"base model": "" if in_memory(about["options"]) else _public(init)}
    if about["options"].get("data") is None:
        rows["text"] = "the documentation of Python and NumPy"
    for part, marks in (about.get("data") or {}).items():
        shown = (f"{m['name']} ({m['tokens']:,} tokens, blake2b {m['blake2b']})" for m in marks)
        rows[f"{part} data"] = ", ".join(shown)
    numbers = _numbers(run, model)
    return rows | {what: numbers.get(key, "") for key, what in RESULTS.items()}


def _numbers(run: Path, model: Path) -> dict[str, str]:
    """Return the newest numbers in metrics.jsonl up to the step of the model."""
    last, best = float("inf"), {}
    if found := checkpoint.NAME.fullmatch(model.parent.name):
        last = int(found[1])
    elif model.name == BEST_FILE and (score := checkpoint.read_header(model).score):
        last, best = score.step, {"val_loss": score.val_loss, "step": f"{score.step} (lowest validation loss)"}
    elif written := checkpoint.listed(run / CHECKPOINTS):  # training may be ahead of the last one
        last = int(written[0].name.removeprefix("step-"))
    rows = [row for row in _last_rows(run / METRICS) if type(row.get("step")) is int and row["step"] <= last]
    values = {key: value for row in rows for key, value in row.items()}
    values |= best or ({} if last == float("inf") else {"step": last})
    return {key: f"{value:.4f}" if type(value) is float else str(value) for key, value in values.items()}


def commands(about: dict[str, Any], name: str) -> Iterator[tuple[int, str]]:
    """Yield the first step and the command of each start of a run of this name, given its config.json.

    Each resumes the run of the one before. The type is the one used, as `auto` may be another elsewhere. Empty if the
    run started from a model in memory.
    """
    starts, before = starts_of(about), None
    for start in starts:
        options = start["options"] | {"dtype": start["machine"]["dtype"]}
        options |= {} if start["ranks"] == 1 else {"ranks": start["ranks"]}
        where = _flagged("out" if before is None else "resume", name) if len(starts) > 1 else []
        yield start["step"], "" if in_memory(options) else _command(options, where, before)
        before = start["options"]


def in_memory(options: dict[str, Any]) -> bool:
    """Return whether a run with these options started from a model in memory, of which it kept a file for a while."""
    return Path(options.get("init") or "").name == START_FILE


def _command(options: dict[str, Any], where: list[str], before: dict[str, Any] | None) -> str:
    """Return the command of a start: the options that are not the defaults, or not those `before` it was resumed."""
    init, resumed = options.get("init"), options.get("init_state")  # the latter from a checkpoint of llm.c
    words = ["train", *(_flagged("resume", _public(init)) if resumed and before is None else []), *where]
    defaults = before or TrainOptions().as_record() | (FINE_TUNING if init and not resumed else {}) | dict(DROPPED)
    for name, value in options.items():
        if value in ("", None) or value == defaults.get(name) or resumed and name in ("init", "init_state"):
            continue
        if name == "model" and init:  # the base model has its shape
            continue
        if isinstance(value, bool):
            words.append(flag_of(name if value else f"no_{name}"))
        else:
            listed = value if isinstance(value, list) else [value]
            words += _flagged(name, *(_public(v) if name in PATHS else str(v) for v in listed))
    return command(*words)


def _flagged(name: str, *values: str) -> list[str]:
    """Return the words of an option; a value that looks like a flag must be within that of its own."""
    return [f"{flag_of(name)}={values[0]}"] if values[0].startswith("-") else [flag_of(name), *values]


def _public(path: str | None) -> str:
    """Return the name of a hub model, or the last names of a path: with its run, if it is a file of one."""
    if not path:
        return ""
    name = Path(path).name
    kept = 3 if checkpoint.NAME.fullmatch(name) else 2 if name in OURS else 1
    shown = hub.repository(path) or Path(*Path(path).parts[-kept:]).as_posix()
    return f"./{shown}" if shown.startswith("-") else shown


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
