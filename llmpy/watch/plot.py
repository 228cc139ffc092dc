"""`llmpy plot`: the curves of runs as a picture (matplotlib), an interactive page (plotly) or text (plotext)."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import LlmpyError
from ..options.options import CURVES, PlotOptions
from ..system.durable import write_whole
from ..system.terminal import coloured
from .curves import Curves
from .figure import COLOURS, CONFIG, PERCENT, POINTS, charts, figure, need
from .runs import Runs

ANSI = ("blue", "orange", "green", "magenta", "cyan", "red")  # of plotext
LETTERS = "*+xo#@"  # for curve after curve where neither colour nor dots tell them apart
FRAME = str.maketrans("┌┐└┘─│┬┤", "++++-|+|")  # for a console without Unicode
ROWS = 18  # of a chart of text
NOTHING_LOADS = (  # a page from a file asks no one
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data: blob:\">"
)


def plot(options: PlotOptions, say: Callable[[str], None]) -> None:
    """Draw. Raises LlmpyError, and writes no file, if there is no run, nothing to draw, or a package is missing."""
    kind = "" if options.out is None else options.out.suffix[1:].lower()
    text = options.terminal or not kind
    if kind:
        need("plotly" if kind == "html" else "matplotlib", f"a .{kind} file")
    if text:
        need("plotext", "a plot in the terminal")
    found = Runs(options.runs or ()).all()
    if options.runs is None:
        found = dict(list(found.items())[:1])
    runs = {name: run.curves() for name, run in found.items()}
    wanted = options.curves or ("loss",)
    shown = tuple(CURVES) if kind == "html" and not options.curves else wanted
    if not any(
        curves.has(name) for curves in runs.values() for name in (*shown, *(["val_loss"] if "loss" in shown else []))
    ):
        measured = " (train --hellaswag FILE measures that)" if "hellaswag" in wanted else ""
        raise LlmpyError(
            f"no {' or '.join(wanted)} in {', '.join(runs)} yet",
            f"wait for the first step, or choose other --curves{measured}",
        )
    for name, curves in runs.items():
        if not curves.has_axis(options.x):
            raise LlmpyError(f"the metrics of {name} tell no {options.x}", "leave --x or that run out")
    if options.out is not None:
        if kind == "html":
            write_page(runs, shown, options, options.out)
        else:
            write_picture(runs, wanted, options, options.out)
        say(f"wrote {options.out}")
    if text:
        for chart in text_of(runs, wanted, options):
            say(chart)


def write_page(runs: dict[str, Curves], wanted: Sequence[str], options: PlotOptions, path: Path) -> None:
    """One file that needs no server and no network: plotly's script is in it."""
    colours = {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(runs)}
    made = figure(runs, wanted, options.x, options.smooth, options.log, 2, colours, legend=True)
    page = made.to_html(config=CONFIG, div_id="figure").replace("<head>", f"<head>{NOTHING_LOADS}", 1)
    write_whole(path, lambda temporary: temporary.write_text(page, "utf-8"))


def write_picture(runs: dict[str, Curves], wanted: Sequence[str], options: PlotOptions, path: Path) -> None:
    """A panel for each curve; equal runs give equal files, byte for byte."""
    import matplotlib
    from matplotlib.figure import Figure

    title, drawn = charts(runs, wanted, options.x, options.smooth, POINTS)
    inks = {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(runs)}
    with matplotlib.rc_context({"svg.hashsalt": "llmpy", "path.simplify": False}):
        made = Figure(figsize=(7, 3.2 * len(drawn) + 0.8), layout="constrained")
        panels = made.subplots(len(drawn), 1, squeeze=False)[:, 0]
        for axes, (name, curves) in zip(panels, drawn.items(), strict=True):
            for curve in curves:
                label = curve.run.replace("$", r"\$")  # which begins an equation
                ink, line = inks[curve.run], curve.line
                if curve.notes:
                    axes.plot(line.x, line.y, "^", color="red", markersize=5, label=f"{label}, skipped")
                elif curve.name == "val_loss":
                    axes.plot(
                        line.x, line.y, "o--", color=ink, markersize=3.5, linewidth=1, label=f"{label}, validation"
                    )
                else:
                    if line.average:
                        axes.plot(line.x, line.y, color=ink, alpha=0.3, linewidth=0.7)
                    axes.plot((line.average or line).x, (line.average or line).y, color=ink, linewidth=1.5, label=label)
            axes.set_yscale("log" if options.log else "linear")
            axes.set_ylabel(CURVES[name])
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        panels[-1].set_xlabel(title)
        kind = path.suffix[1:].lower()
        undated: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
        write_whole(path, lambda to: made.savefig(to, format=kind, dpi=160, metadata=undated.get(kind)))


def text_of(runs: dict[str, Curves], wanted: Sequence[str], options: PlotOptions) -> list[str]:
    """The charts as text, as wide as the terminal; in colours only on one, and not against NO_COLOR."""
    import plotext

    title, drawn = charts(runs, wanted, options.x, options.smooth, 400)
    colour, unicode = coloured(sys.stdout), "utf" in (sys.stdout.encoding or "").lower()
    found = []
    for chart, curves in drawn.items():
        curves = [curve for curve in curves if not curve.notes]
        dots = unicode and (colour or len(curves) == 1)
        plotext.clear_figure()
        plotext.theme("clear")
        plotext.limitsize(False, False)
        plotext.plotsize(shutil.get_terminal_size().columns - 1, ROWS)
        for n, curve in enumerate(curves):
            name = ", validation" if curve.name == "val_loss" else ""
            newest = runs[curve.run].newest(curve.name) * (100 if chart in PERCENT else 1)
            line = curve.line.average or curve.line
            plotext.plot(
                line.x.tolist(), line.y.tolist(), color=ANSI[n % len(ANSI)],
                marker="braille" if dots else LETTERS[n % len(LETTERS)], label=f"{curve.run}{name}: {newest:.4g}",
            )  # fmt: skip
        plotext.yscale("log" if options.log else "linear")
        plotext.title(CURVES[chart])
        plotext.xlabel(title)
        drawing = plotext.build() if colour else plotext.uncolorize(plotext.build())
        found.append(drawing if unicode else drawing.translate(FRAME))
    return found
