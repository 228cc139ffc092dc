"""README.md of an exported model: what it was trained from, how and on what, as far as its run says.

A model card is public, so only the last names of local paths are in it.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any

from ..options.fields import flag_of, options_of, plain
from ..options.train import TrainOptions
from ..run import checkpoint
from ..run.folder import BEST_FILE, CONFIG_FILE, METRICS, is_run
from ..system.command import command
from ..version import __version__
from . import hub
from .source import Source

TAIL = 1 << 17  # bytes of metrics.jsonl read, from its end


def model_card(source: Source, family: str) -> str:
    """Return the text of the card."""
    folders = source.path.absolute().parents[:3] if source.path.is_file() else ()
    run = next((folder for folder in (*folders[:1], *folders[2:]) if is_run(folder)), None)  # 2: of a checkpoint
    about = _object((run / CONFIG_FILE).read_text("utf-8", "replace")) if run and (run / CONFIG_FILE).is_file() else {}
    options = about.get("options") or {}
    base = hub.repository(options.get("init")) if run else hub.repository(source.path)
    rows = {"model": f"{family}: {source.config}", "base model": base or options.get("init") and _last(options["init"])}
    if run is not None:
        rows["command"] = _command(options)
        for part, marks in (about.get("data") or {}).items():
            rows[f"data, {part}"] = ", ".join(f"{m['name']} ({m['tokens']:,} tokens, {m['blake2b']})" for m in marks)
        numbers = _numbers(run, source.path)
        rows |= {what: numbers.get(key) for key, what in RESULTS.items()}
    lines = [f"| {what} | {_cell(value)} |" for what, value in rows.items() if value not in (None, "")]
    head = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["llmpy"]}
    head |= {"base_model": base} if base else {}
    matter = [f"{key}: {json.dumps(value)}" for key, value in head.items()]
    name = run.name if run else base or source.path.name
    text = f"Written by [llm.py](https://pypi.org/project/llmpy/) {__version__}."
    return "\n".join(["---", *matter, "---", "", f"# {_cell(name)}", "", text, "", "| | |", "|---|---|", *lines, ""])


RESULTS = {
    "step": "steps", "loss": "training loss, nats per token", "val_loss": "validation loss, nats per token",
    "val_bits_per_byte": "validation, bits per byte",
}  # fmt: skip


def _numbers(run: Path, model: Path) -> dict[str, Any]:
    """Return the newest numbers in metrics.jsonl up to the step of the model."""
    last: float = float("inf")
    if found := checkpoint.NAME.fullmatch(model.parent.name):
        last = int(found[1])
    elif model.name == BEST_FILE and (score := checkpoint.read_header(model).score):
        last = score.step
    numbers: dict[str, Any] = {}
    try:
        with (run / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            rows = map(_object, file.read().decode("utf-8", "replace").splitlines())
            for row in rows:
                if type(row.get("step")) is int and row["step"] <= last:
                    numbers |= row
    except OSError:  # no logs
        pass
    return {key: f"{value:.4f}" if isinstance(value, float) else value for key, value in numbers.items()}


def _command(options: dict[str, Any]) -> str:
    """Return the command of a run: the options that are not the defaults."""
    words: list[object] = ["train"]
    for field in options_of(TrainOptions):
        value = options.get(field.name, default := _default(field))
        if value == default:
            continue
        flag = flag_of(field.name)
        if isinstance(value, bool):
            words.append(flag if value else flag_of(f"no_{field.name}"))
        else:
            values = value if isinstance(value, list) else [value]
            words += [flag, *(_last(v) if field.name in ("data", "val", "init", "hellaswag") else v for v in values)]
    return command(*words)


def _default(field: Field[Any]) -> Any:
    return plain(field.default if field.default is not MISSING else None)


def _last(path: object) -> str:
    """Return the last name of a path, or the name of a hub model."""
    return hub.repository(path) or Path(str(path)).name


def _cell(value: object) -> str:
    """Return text that stays within a cell of a table."""
    return "".join(c if c.isprintable() else " " for c in str(value)).replace("|", "\\|").replace("<", "&lt;")


def _object(line: str) -> dict[str, Any]:
    """Return the object in a line of JSON, {} if there is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
