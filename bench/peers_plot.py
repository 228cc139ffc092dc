"""Plot the output of `llmpy bench peers --json FILE`: a box of all step times per program. Requires matplotlib.

python bench/peers_plot.py bench/results/CPU-WORK.json docs/peers.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from llmpy.bench.peers import work_of

COLOURS = {"float32": "#7aa6c2", "bfloat16": "#e0a458"}


def draw(numbers: dict[str, Any], path: Path) -> None:
    peers = numbers["peers"]
    figure = Figure(figsize=(2 + 1.3 * len(peers), 5), layout="constrained")
    axes = figure.subplots()
    boxes = axes.boxplot([p["step_ms"] for p in peers], widths=0.6, patch_artist=True)
    for n, (box, median, peer) in enumerate(zip(boxes["boxes"], boxes["medians"], peers, strict=True), 1):
        box.set_facecolor(COLOURS[peer["dtype"]])
        median.set_color("black")
        text, place = f"{peer['median_ms']:,.0f}", (n, max(peer["step_ms"]))
        axes.annotate(text, place, (0, 4), textcoords="offset points", ha="center")
    axes.set_xticks(range(1, len(peers) + 1), [p["name"] for p in peers], rotation=25, ha="right")
    axes.set_ylim(0, 1.08 * max(max(p["step_ms"]) for p in peers))  # room for the numbers above the boxes
    axes.set_ylabel("ms a token" if numbers["decoding"] else "ms a step")
    axes.legend(handles=[Patch(color=COLOURS[t], label=t) for t in sorted({p["dtype"] for p in peers})])
    axes.grid(axis="y", alpha=0.3)
    axes.set_title(f"{work_of(numbers)}, {numbers['threads']} threads ({numbers['machine']['cpu']})", size=10)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text("utf-8")), Path(sys.argv[2]))
