"""`llmpy plot`: the curves of runs as a picture (by matplotlib), as a page that needs no server, or as text."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LlmpyError
from ..options.watch import PlotOptions
from ..system.command import install
from ..system.durable import write_whole
from ..system.terminal import coloured
from .letters import Line, chart, legend
from .runs import Run, Runs, board

PAGE_POINTS = 4000  # of a curve on a page that cannot ask for more
TITLES = {
    "loss": "loss", "lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_s": "tokens a second",
    "share_of_peak": "% of peak", "val_bits_per_byte": "validation, bits a byte", "hellaswag": "HellaSwag, % right",
}  # fmt: skip
PERCENT = {"share_of_peak", "hellaswag"}
AXES = {"steps": "step", "tokens": "tokens", "time": "seconds"}  # of --x: as a picture calls it
BELOW = {  # an axis' title, and its units: size and name, the largest first
    "steps": ("step", ((1, ""),)),
    "tokens": ("tokens", ((1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)"), (1, ""))),
    "time": ("time in training steps", ((3600, " (hours)"), (60, " (minutes)"), (1, " (seconds)"))),
}
INK = ("#1f6fd1", "#d9620b", "#1b8a4b", "#a435b5", "#9a7009", "#0b8a93", "#c2185b", "#5b6573")


def plot(options: PlotOptions, say: Callable[[str], None]) -> None:
    """Draw. Raises LlmpyError, and writes no file, if there is no run, nothing to draw, or matplotlib is missing."""
    if options.out is not None and options.out.suffix.lower() != ".html":
        need_matplotlib()
    runs = Runs(options.runs or ())
    found = runs.all()
    if options.runs is None:
        found = dict(list(found.items())[:1])
    for run in found.values():
        run.metrics.read()
    wanted = options.curves or ("loss",)
    shown: tuple[str, ...] = (*wanted, "val_loss") if "loss" in wanted else tuple(wanted)
    if options.out is not None and options.out.suffix.lower() == ".html" and not options.terminal:
        shown = (*TITLES, "val_loss")  # a page shows all there is
    if not any(len(run.metrics.curves.curves[name]) for run in found.values() for name in shown):
        measured = " (train --hellaswag FILE measures that)" if "hellaswag" in wanted else ""
        raise LlmpyError(
            f"no {' or '.join(wanted)} in {', '.join(found)} yet",
            f"wait for the first step, or choose other --curves{measured}",
        )
    if options.x != "steps":
        for name, run in found.items():
            if not len(run.metrics.curves.clocks[AXES[options.x]]):
                raise LlmpyError(f"the metrics of {name} tell no {options.x}", "leave --x or that run out")
    if options.out is not None:
        if options.out.suffix.lower() == ".html":
            write_page(runs, list(found), options, options.out)
        else:
            draw(found, wanted, options, options.out)
        say(f"wrote {options.out}")
    if options.terminal or options.out is None:
        for line in text(found, wanted, options):
            say(line)


def write_page(runs: Runs, names: Sequence[str], options: PlotOptions, path: Path) -> None:
    """The page of `llmpy watch` with its numbers in it."""
    from .server import page

    over = None if options.smooth is None else float(options.smooth)
    data = board(runs, names, over=over, points=PAGE_POINTS)
    data["axis"] = AXES[options.x]
    data["runs"] = [row | {"trains": False} for row in data["runs"] if row["name"] in names]
    write_whole(path, lambda temporary: temporary.write_text(page(data), "utf-8"))


def pictures(runs: dict[str, Run], options: PlotOptions, points: int) -> tuple[dict[str, dict[str, Any]], str]:
    """Name → curves of each run, as `Run.picture`, each with `x`, where its points lie; and the title of that axis."""
    over, clock = None if options.smooth is None else float(options.smooth), AXES[options.x]
    drawn = {name: run.picture(-math.inf, math.inf, over, points)["curves"] for name, run in runs.items()}
    every = [(runs[name].metrics.curves, curve) for name, curves in drawn.items() for curve in curves.values()]
    for curves, curve in every:
        steps = np.array(curve["step"], float)
        curve["x"] = steps if options.x == "steps" else curves.along(clock, steps)
    largest = max((curve["x"][-1] for _, curve in every), default=0.0)
    title, units = BELOW[options.x]
    size, unit = next((u for u in units if largest >= 1.5 * u[0]), units[-1])
    for _, curve in every:
        curve["x"] /= size
    return drawn, title + unit


def need_matplotlib() -> None:
    """Raise LlmpyError, before anything is read, if no picture could be drawn."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise LlmpyError(
            "a picture needs matplotlib", f"{install('llmpy[plot]')}, or draw with -o FILE.html or --terminal"
        )


def draw(runs: dict[str, Run], wanted: Sequence[str], options: PlotOptions, path: Path) -> None:
    """A panel for each curve; equal runs give equal files, byte for byte."""
    import matplotlib
    from matplotlib.figure import Figure

    drawn, title = pictures(runs, options, 2000)
    with matplotlib.rc_context({"svg.hashsalt": "llmpy", "path.simplify": False}):
        figure = Figure(figsize=(7, 3.2 * len(wanted) + 0.8), layout="constrained")
        panels = figure.subplots(len(wanted), 1, squeeze=False)[:, 0]
        for axes, name in zip(panels, wanted, strict=True):
            scale = 100 if name in PERCENT else 1
            for n, (run, curves) in enumerate(drawn.items()):
                label = run.replace("$", r"\$")  # which begins an equation
                ink = INK[n % len(INK)]
                if name in curves:
                    panel(axes, curves[name], scale, ink, label)
                if name == "loss" and "val_loss" in curves:
                    also = curves["val_loss"]
                    told = f"{label}, validation"
                    axes.plot(also["x"], also["mean"], "o--", color=ink, markersize=3.5, linewidth=1, label=told)
            if options.log:
                axes.set_yscale("log")
            axes.set_ylabel(TITLES[name])
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize="small")
        panels[-1].set_xlabel(title)
        kind = path.suffix[1:].lower()
        undated: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
        write_whole(path, lambda to: figure.savefig(to, format=kind, dpi=160, metadata=undated.get(kind)))


def panel(axes: Any, curve: dict[str, Any], scale: float, ink: str, label: str) -> None:
    """One curve: what is smooth over what was measured."""
    x = curve["x"]
    rows = {name: scale * np.array(curve[name]) for name in ("mean", "least", "largest", "smooth") if name in curve}
    if "least" in rows:
        axes.fill_between(x, rows["least"], rows["largest"], color=ink, alpha=0.18, linewidth=0)
    if "smooth" in rows:
        axes.plot(x, rows["mean"], color=ink, alpha=0.3, linewidth=0.7)
        axes.plot(x, rows["smooth"], color=ink, linewidth=1.6, label=label)
    else:
        axes.plot(x, rows["mean"], color=ink, linewidth=1.4, label=label, marker="." if len(x) < 40 else "")


def text(runs: dict[str, Run], wanted: Sequence[str], options: PlotOptions) -> list[str]:
    """The curves as lines of text, as wide as the terminal; in colours only on one, and not against NO_COLOR."""
    colour = coloured(sys.stdout)
    braille = "utf" in (sys.stdout.encoding or "").lower()
    width = shutil.get_terminal_size().columns - 1
    drawn, title = pictures(runs, options, 400)
    rows: list[str] = []
    for name in wanted:
        scale = 100 if name in PERCENT else 1
        lines: list[Line] = []
        named = []
        for run, curves in drawn.items():
            for key in (name, "val_loss") if name == "loss" else (name,):
                if key in curves:
                    curve = curves[key]
                    values = curve["smooth" if "smooth" in curve else "mean"]
                    lines.append((curve["x"], scale * np.array(values)))
                    which = ", validation" if key == "val_loss" else ""
                    newest = runs[run].metrics.curves.curves[key].values[-1]  # the curve may end in a bucket's mean
                    named.append(f"{run}{which}: {scale * newest:.4g}")
        if lines:
            shown = chart(lines, width, lambda value: f"{value:.4g}", colour, braille, options.log, title)
            rows += [TITLES[name], *shown, *legend(named, colour, braille), ""]
    return rows[:-1]
