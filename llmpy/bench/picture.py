"""A picture of `bench peers`: one box per program, of all its steps. Needs matplotlib (`llmpy[plot]`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ..errors import LlmpyError
from ..system.command import install
from ..system.durable import write_whole

COLOURS = {"float32": "#7aa6c2", "bfloat16": "#e0a458"}


def check(path: Path) -> None:
    """Raise LlmpyError, before anything is measured, if no picture could be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise LlmpyError("--plot needs matplotlib", install("llmpy[plot]"))
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise LlmpyError(f"--plot {path}", "use a name that ends in .png, .svg or .pdf")


def draw(numbers: dict[str, Any], path: Path) -> None:
    """Write the picture of what `bench_peers` measured; the format follows from the name."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    peers = [p for p in numbers["peers"] if p["step_ms"]]
    figure = Figure(figsize=(2 + 1.3 * len(peers), 5), layout="constrained")
    axes = figure.subplots()
    boxes = axes.boxplot([p["step_ms"] for p in peers], widths=0.6, patch_artist=True)
    for box, median, peer in zip(boxes["boxes"], boxes["medians"], peers, strict=True):
        box.set_facecolor(COLOURS[peer["dtype"]])
        median.set_color("black")
    for n, peer in enumerate(peers, 1):
        label = f"{peer['median_ms']:,.0f}"
        axes.annotate(label, (n, max(peer["step_ms"])), (0, 4), textcoords="offset points", ha="center")
    names = [p["name"] for p in peers]
    axes.set_xticks(range(1, len(names) + 1), names, rotation=25, ha="right")
    axes.set_ylim(0, 1.08 * max(max(p["step_ms"]) for p in peers))  # room for the numbers above the boxes
    axes.set_ylabel("ms a step")
    axes.legend(handles=[Patch(color=COLOURS[t], label=t) for t in sorted({p["dtype"] for p in peers})])
    axes.grid(axis="y", alpha=0.3)
    work = f"{numbers['model']}, {numbers['batch_size']} x {numbers['sequence_length']} tokens"
    axes.set_title(f"A training step of {work}, {numbers['threads']} threads ({numbers['machine']['cpu']})", size=10)
    write_whole(path, lambda to: figure.savefig(to, format=path.suffix[1:].lower(), dpi=150))
