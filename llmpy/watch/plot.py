"""`llmpy plot`: curves of runs as an image (matplotlib), an interactive page (plotly) or text (plotext)."""

from __future__ import annotations

import itertools
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import LlmpyError
from ..options.watch import AXES, CURVES, PlotOptions
from ..system.durable import write_whole
from ..system.terminal import coloured
from .curves import Line, charts
from .figure import COLOURS, CONFIG, POINTS, figure, need
from .runs import Runs

ANSI = ("blue", "orange", "green", "magenta", "cyan", "red")  # of plotext
LETTERS = "*+xo#@"  # markers of several curves without color
ROWS, TEXT_POINTS = 18, 400  # of a text chart
NOTHING_LOADS = (  # the page includes plotly's script and loads nothing else
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data: blob:\">"
)


def plot(options: PlotOptions, log: Callable[[str], None]) -> None:
    """Draw curves of runs. Raises LlmpyError, without writing a file, if a run, its curves or a package is missing."""
    kind = options.out.suffix[1:].lower() if options.out else ""
    in_terminal = options.terminal or not kind
    if kind:
        need("plotly" if kind == "html" else "matplotlib", f"a .{kind} file")
    if in_terminal:
        need("plotext", "a plot in the terminal")
    found = list(Runs(options.runs or ()).all().items())
    runs = {name: run.curves() for name, run in (found if options.runs else found[:1])}
    selected = options.curves or (tuple(CURVES) if kind == "html" else ("loss",))
    drawn = charts(runs, selected, options.x, options.smooth, POINTS)
    if not drawn:
        what = f"no {' or '.join(options.curves or ['loss'])} in {', '.join(runs)} yet"
        raise LlmpyError("watch.no-curves", what, "Wait until it is recorded, or choose other --curves")
    if options.out is not None:
        colours = dict(zip(runs, itertools.cycle(COLOURS), strict=False))
        if kind == "html":
            fig = figure(runs, selected, options.x, options.smooth, options.log, 2, colours)
            page = fig.update_layout(showlegend=True).to_html(config=CONFIG, div_id="figure")
            page = page.replace("<head>", f"<head>{NOTHING_LOADS}", 1)
            write_whole(options.out, lambda temporary: temporary.write_text(page, "utf-8"))
        else:
            write_picture(drawn, options, colours, options.out)
        log(f"wrote {options.out}")
    if in_terminal:
        for chart in text_of(charts(runs, selected, options.x, options.smooth, TEXT_POINTS), options):
            log(chart)


def write_picture(drawn: dict[str, list[Line]], options: PlotOptions, colours: dict[str, str], path: Path) -> None:
    """Write an image with a panel for each curve; equal runs give identical files."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "llmpy", "path.simplify": False}):
        fig = Figure(figsize=(7, 3.2 * len(drawn) + 0.8), layout="constrained")
        panels = fig.subplots(len(drawn), 1, squeeze=False)[:, 0]
        for axes, (name, lines) in zip(panels, drawn.items(), strict=True):
            for line in lines:
                label = line.run.replace("$", r"\$")  # "$" starts an equation
                ink = colours[line.run]
                if line.name == "val_loss":
                    axes.plot(line.x, line.y, "o--", color=ink, markersize=3, linewidth=1, label=f"{label}, validation")
                    continue
                if line.average:
                    axes.plot(line.x, line.y, color=ink, alpha=0.3, linewidth=0.7)
                axes.plot(*(line.average or (line.x, line.y)), color=ink, linewidth=1.5, label=label)
            axes.set_yscale("log" if options.log else "linear")
            axes.set_ylabel(CURVES[name])
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        panels[-1].set_xlabel(AXES[options.x][0])
        kind = path.suffix[1:].lower()
        undated: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
        write_whole(path, lambda to: fig.savefig(to, format=kind, dpi=160, metadata=undated.get(kind)))


def text_of(drawn: dict[str, list[Line]], options: PlotOptions) -> Iterator[str]:
    """Yield the charts as text in the width of the terminal, colored if `coloured` allows it."""
    import plotext

    colour = coloured(sys.stdout)
    for chart, lines in drawn.items():
        dots = colour or len(lines) == 1
        plotext.clear_figure()
        plotext.theme("clear")
        plotext.limitsize(False, False)
        plotext.plotsize(shutil.get_terminal_size().columns - 1, ROWS)
        log = options.log and max(line.y.max() for line in lines) > 0  # else plotext fails
        plotext.yscale("log" if log else "linear")
        plotext.title(CURVES[chart])
        plotext.xlabel(AXES[options.x][0])
        for n, line in enumerate(lines):
            also = ", validation" if line.name == "val_loss" else ""
            marker = "braille" if dots else LETTERS[n % len(LETTERS)]
            x, y = line.average or (line.x, line.y)
            label = f"{line.y[-1]:.4g} {line.run}{also}"  # plotext truncates long labels: the value comes first
            shown = y > (0 if log else -math.inf)
            plotext.plot(x[shown].tolist(), y[shown].tolist(), color=ANSI[n % len(ANSI)], marker=marker, label=label)
        yield plotext.build() if colour else plotext.uncolorize(plotext.build())
