"""`llmpy report`: a run as one page of Markdown and the picture of its loss, so that a reader can repeat it.

Its numbers are those of the model card and of `llmpy plot`. Of local paths it has the last names only.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from ..errors import LlmpyError
from ..formats.model_card import RESULTS, cell, commands, facts, in_memory, table
from ..model.config import ModelConfig
from ..options.watch import ReportOptions
from ..run.folder import CONFIG_FILE, MODEL_FILE, read_record, starts_of
from ..system.durable import write_whole
from ..system.terminal import printable
from ..system.words import count_of, duration
from .curves import Curves, Line
from .figure import COLOURS
from .runs import Run, Runs

POINTS = 600  # of a curve, about the pixels of the picture
WIDTH, HEIGHT, LEFT, TOP = 620, 300, 50, 30  # of the curves and their margins
SAMPLES = 3
PATHS = "Paths are shortened to their last names."
FREE: dict[str, Any] = dict.fromkeys((  # what the bits do not depend on
    "threads", "platform", "keep", "track", "checkpoint_every", "eval_every", "eval_batches", "hellaswag",
    "sample_every", "sample_tokens", "prompt", "verify_every",
))  # fmt: skip


def report(options: ReportOptions, log: Callable[[str], None]) -> None:
    """Write the page of a run and its picture. Raises LlmpyError, and writes nothing, if the run has no record."""
    run = next(iter(Runs((options.run,)).all().values()))
    curves, out = run.curves(), options.out or run.folder / "report.md"
    lines = [line for name in ("loss", "val_loss") if (line := curves.line("", name, "steps", None, POINTS))]
    picture = out.with_suffix(".svg")
    try:
        text = "\n".join(page(run, curves, picture.name if lines else ""))
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        what = f"{run.folder / CONFIG_FILE} is incomplete: {error!r}"
        raise LlmpyError("run.bad-config", what, "Report a run that has started to train") from None

    def write(temporary: Path) -> None:  # the page appears after its picture
        temporary.write_text(text, "utf-8", errors="replace")  # a path may not be UTF-8
        if lines:
            write_whole(picture, lambda to: to.write_text(drawing(lines), "utf-8"))

    write_whole(out, write)
    log(f"wrote {out}{f' and {picture}' if lines else ''}")


def page(run: Run, curves: Curves, picture: str) -> Iterator[str]:
    """Yield the lines of the page. Raises what an invalid config.json causes."""
    folder = run.folder.resolve()
    about = read_record(folder / CONFIG_FILE)
    starts = starts_of(about)
    rows = {"model": str(ModelConfig.from_record(about["model"]))} | facts(folder, about, folder / MODEL_FILE)
    steps, total = rows[RESULTS["step"]] or "0", about["options"].get("steps")
    rows[RESULTS["step"]] = steps + (f" of {total} (in training)" if run.trains() else f" of {total}" if total else "")
    if (found := curves.points("val_loss")).size:
        rows["lowest validation loss"] = f"{found[1].min():.4f} at step {found[0, found[1].argmin()]:.0f}"
    if curves.points("ms", "tokens_per_s").size:
        bounds = np.array([*(start["step"] for start in starts), int(steps)], float)
        tokens, seconds = (np.diff(curves.along(axis, bounds)) for axis in ("tokens", "time"))
        cores = seconds @ [start["ranks"] * int(start["machine"]["threads"]) for start in starts]
        rows["training tokens"] = f"{tokens.sum():,.0f}"
        rows["time of training steps"] = f"{duration(seconds.sum())}; {cores / 3600:.3g} core-hours"
    finished = (folder / MODEL_FILE).is_file() and not run.trains() and int(steps) >= int(total or 0)
    if finished:
        with (folder / MODEL_FILE).open("rb") as file:
            rows["SHA-256 of model.safetensors"] = hashlib.file_digest(file, "sha256").hexdigest()
    yield from table(folder.name, rows)
    if picture:
        yield from ("", f"![Loss by step]({quote(picture)})")
    promise = verdict(starts, about["options"], finished, complete="starts" in about)
    yield from ("", "## How to repeat it", "", promise)
    for start, (_, line) in zip(starts, commands(about, folder.name), strict=True):
        machine = start["machine"]
        named = [f"{name} {machine[name]}" for name in ("python", "numpy", "numba", "llvmlite") if name in machine]
        cores = f"{count_of(start['ranks'], 'rank')} of {count_of(int(machine['threads']), 'thread')}"
        words = f"llm.py {start['llmpy']}", cores, machine["isa"], machine["dtype"], *named, machine.get("platform", "")
        weights = f", weights of hash {start['weights']}" if "weights" in start else ""
        yield from ("", f"From step {start['step']}{weights}: {cell(', '.join(filter(None, words)))}")
        yield from fenced(line) if line else ()
    for n, sample in enumerate(reversed(run.samples()[:SAMPLES])):
        yield from (*([] if n else ["", "## Samples"]), "", f"Step {sample['step']}:")
        yield from fenced("\n".join(map(printable, sample["text"].split("\n"))))
    yield ""


def verdict(starts: list[dict[str, Any]], options: dict[str, Any], finished: bool, complete: bool = True) -> str:
    """Return whether the command gives the same bits again, and if not, why. `complete`: all starts are known."""
    if in_memory(options):
        return "The run started from a model in memory: no command repeats it."
    if any(start["options"].get("minutes") for start in starts):
        return "`--minutes` makes the learning rate depend on the clock: a repeated run differs. `--steps` does not."
    if not finished:
        return "The run has not finished, and its model is that of its last checkpoint. The command trains to the end."
    if not complete or starts[0]["step"] and not options.get("init_state"):
        return "Not all starts of the run were recorded: ranks, options or machine may have been others before."
    parts = [[s["llmpy"], s["ranks"], s["options"] | FREE, s["machine"] | FREE] for s in starts]
    changes = [(now["options"]["steps"], then["step"]) for i, (now, then) in enumerate(itertools.pairwise(starts))
               if parts[i] != parts[i + 1]]  # fmt: skip
    if any(planned != step for planned, step in changes):
        return "Options or machine changed after an interruption. No command stops at that step: none repeats the run."
    if changes:
        return f"Options or machine changed on resume: the commands, one after another, repeat the run. {PATHS}"
    return (
        f"On the same data{' and base model' * bool(options.get('init'))}, with these versions and this instruction "
        "set, the first command gives the same model, bit for bit, also if it is stopped and resumed. The number of "
        f"threads does not matter. {PATHS}"
    )


def fenced(text: str) -> list[str]:
    """Return the lines of a code block that the text cannot close."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return ["", fence + "text", *text.split("\n"), fence]


def ticks(low: float, high: float) -> list[float]:
    """Return two to six round numbers from `low` to `high`."""
    unit = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= (high - low) / 5)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def drawing(lines: list[Line]) -> str:
    """Return an SVG of the loss by step: every step pale, the average strong, validation as dots."""
    xs, ys = (np.concatenate([getattr(line, axis).astype(float) for line in lines]) for axis in "xy")
    (left, right), (low, high) = ((v.min(), max(v.max(), v.min() + 1e-6 * max(1, abs(v.min())))) for v in (xs, ys))

    def place(x: Any, y: Any) -> tuple[Any, Any]:
        return LEFT + WIDTH * (x - left) / (right - left), TOP + HEIGHT * (high - y) / (high - low)

    parts = ['<rect width="100%" height="100%" fill="white"/>']
    for tick in ticks(left, right):
        x, y = place(tick, low)
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{tick:g}</text>')
    for tick in ticks(low, high):
        x, y = place(left, tick)
        parts.append(f'<path d="M{x:.1f} {y:.1f}h{WIDTH}" stroke="#dddddd"/>')
        parts.append(f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for line in lines:
        if line.name == "val_loss":
            dots = zip(*place(line.x, line.y), strict=True)
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{COLOURS[1]}"/>' for x, y in dots]
            continue
        drawn = [(*place(line.x, line.y), f'opacity="{0.35 if line.average else 1}"')]
        drawn += [(*place(*line.average), 'stroke-width="2"')] if line.average else []
        for x_of, y_of, look in drawn:
            pairs = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(x_of, y_of, strict=True))
            parts.append(f'<polyline points="{pairs}" fill="none" stroke="{COLOURS[0]}" {look}/>')
    for n, line in enumerate(lines):
        text = "validation loss" if line.name == "val_loss" else "training loss"
        parts.append(f'<text x="{LEFT + 150 * n}" y="18" fill="{COLOURS[line.name == "val_loss"]}">{text}</text>')
    parts.append(f'<text x="{LEFT + WIDTH}" y="18" text-anchor="end">by step</text>')
    size = f'viewBox="0 0 {LEFT + WIDTH + 20} {TOP + HEIGHT + 30}" font-family="sans-serif" font-size="13"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n' + "\n".join(parts) + "\n</svg>\n"
