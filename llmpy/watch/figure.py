"""What is drawn of runs, and plotly's figure of it, for the page and for `llmpy plot -o FILE.html`."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import LlmpyError
from ..options.options import CURVES
from ..system.command import install
from .curves import Curves, Line

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

COLOURS = ("#3b82f6", "#f97316", "#22a565", "#a855f7", "#d4a017", "#06a5b5", "#ec4899", "#8593a8")  # on light and dark
SKIPPED = "#e5484d"
POINTS = 2000  # of a curve, about twice the pixels of a chart
PERCENT = {"share_of_peak", "hellaswag"}
AXIS = {  # --x → title, and units: size and name, the largest first
    "steps": ("step", ((1, ""),)),
    "tokens": ("tokens", ((1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)"), (1, ""))),
    "time": ("training time", ((3600, " (hours)"), (60, " (minutes)"), (1, " (seconds)"))),
}
FIRST_ROW, ROW, BETWEEN = 330, 190, 60  # pixels: heights of charts, and what lies between
MARGINS = {"l": 52, "r": 12, "t": 34, "b": 30}
GRID, EDGE = "rgba(128,128,128,0.16)", "rgba(128,128,128,0.45)"
# The buttons are listed, for among plotly's own is one that uploads the chart.
CONFIG = {
    "displaylogo": False, "responsive": True, "plotlyServerURL": "",
    "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
}  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """A curve of a run, in a chart; where notes are given, as marks that tell them."""

    run: str
    name: str  # as metrics.jsonl has it: validation and skipped steps are drawn in the chart of the loss
    line: Line
    notes: tuple[str, ...] = ()


def charts(
    runs: Mapping[str, Curves], wanted: Sequence[str], axis: str, over: float | None, points: int
) -> tuple[str, dict[str, list[Drawn]]]:
    """The title of the x axis, and the curves of each chart that has one; in its units, and in percent."""
    title, units = AXIS[axis]
    largest = max((curves.end(axis) for curves in runs.values()), default=0.0)
    size, unit = next((u for u in units if largest >= 1.5 * u[0]), units[-1])
    found: dict[str, list[Drawn]] = {}
    for chart in wanted:
        also = ("val_loss",) if chart == "loss" else ()
        scale = 1 / size, 100 if chart in PERCENT else 1
        drawn = [
            Drawn(run, name, curves.line(name, axis, over, points).scaled(*scale))
            for run, curves in runs.items()
            for name in (chart, *also)
            if curves.has(name) and curves.has_axis(axis)
        ]
        drawn += [
            Drawn(run, "skipped", curves.skips(axis).scaled(*scale), tuple(curves.skipped.values()))
            for run, curves in runs.items()
            if also and curves.skipped and curves.has("loss") and curves.has_axis(axis)
        ]
        if drawn:
            found[chart] = drawn
    return title + unit, found


def figure(
    runs: Mapping[str, Curves], wanted: Sequence[str], axis: str, over: float | None, log: bool, columns: int,
    colours: Mapping[str, str], legend: bool = False,
) -> Figure:  # fmt: skip
    """A chart for each curve, the first as wide as all, the others in columns below."""
    from plotly.subplots import make_subplots

    title, drawn = charts(runs, wanted, axis, over, POINTS)
    rows = 1 + -(-max(0, len(drawn) - 1) // columns)
    heights = [FIRST_ROW] + [ROW] * (rows - 1)
    height = sum(heights) + BETWEEN * (rows - 1)
    made = make_subplots(
        rows, columns, specs=[[{"colspan": columns}] + [None] * (columns - 1)] + [[{}] * columns] * (rows - 1),
        row_heights=heights, vertical_spacing=BETWEEN / height, horizontal_spacing=0.12 / columns,
    )  # fmt: skip
    for n, (chart, curves) in enumerate(drawn.items()):
        place = {"row": 1, "col": 1} if n == 0 else {"row": 2 + (n - 1) // columns, "col": 1 + (n - 1) % columns}
        for curve in curves:
            for trace in traces(curve, colours[curve.run], legend=n == 0):
                made.add_trace(trace, **place)
        made.add_annotation(
            text=CURVES[chart], xref="x domain", yref="y domain", x=0, y=1, xanchor="left", yanchor="bottom",
            showarrow=False, **place,
        )  # fmt: skip
    made.update_xaxes(matches="x", title_text=title, title_standoff=6, row=1, col=1)
    made.update_xaxes(matches="x", gridcolor=GRID, linecolor=EDGE, zeroline=False)
    made.update_yaxes(type="log" if log else "linear", gridcolor=GRID, linecolor=EDGE, zeroline=False, nticks=6)
    clear = "rgba(0,0,0,0)"
    made.update_layout(
        template="none", height=height + MARGINS["t"] + MARGINS["b"], margin=MARGINS, hovermode="x unified",
        paper_bgcolor=clear, plot_bgcolor=clear, modebar={"bgcolor": clear, "color": EDGE}, uirevision=axis,
        showlegend=legend, legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"},
    )  # fmt: skip
    return made


def traces(curve: Drawn, colour: str, legend: bool) -> list[Any]:
    """A curve as plotly draws it: what was measured pale, its average over it."""
    from plotly.graph_objects import Scatter

    line, name = curve.line, html.escape(curve.run, quote=False)  # plotly reads some markup in names
    about: dict[str, Any] = {"legendgroup": name, "showlegend": False, "hovertemplate": "%{y:.5g}"}
    if curve.notes:
        notes = [html.escape(note, quote=False) for note in curve.notes]
        marker = {"symbol": "triangle-up", "size": 9, "color": SKIPPED}
        about |= {"text": notes, "hovertemplate": "skipped: %{text}"}
        return [Scatter(x=line.x, y=line.y, name=name, mode="markers", marker=marker, **about)]
    if curve.name == "val_loss":
        style = {"color": colour, "width": 1, "dash": "dot"}
        return [Scatter(x=line.x, y=line.y, name=f"{name} validation", mode="lines+markers", line=style, **about)]
    strong = {"color": colour, "width": 1.6}
    if line.average is None:
        return [Scatter(x=line.x, y=line.y, name=name, mode="lines", line=strong, **about | {"showlegend": legend})]
    pale = Scatter(
        x=line.x, y=line.y, name=name, mode="lines", line={"color": colour, "width": 1}, opacity=0.3, **about
    )
    about |= {"showlegend": legend, "hoverinfo": "skip", "hovertemplate": None}
    return [pale, Scatter(x=line.average.x, y=line.average.y, name=name, mode="lines", line=strong, **about)]


def need(package: str, purpose: str) -> None:
    """Raise LlmpyError if a package of the `plot` extra is missing."""
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise LlmpyError(f"{purpose} needs {package}", install("llmpy[plot]"))
