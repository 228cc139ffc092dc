"""Interactive plotly figures of curves, for the page and for `llmpy plot -o FILE.html`."""

from __future__ import annotations

import html
import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import LlmpyError
from ..options.watch import AXES, CURVES
from ..system.command import install
from .curves import Curves, Line, charts

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

COLOURS = ("#3b82f6", "#f97316", "#22a565", "#a855f7", "#d4a017", "#06a5b5", "#ec4899", "#8593a8")  # on light and dark
POINTS = 2000  # per curve, about twice the pixels of a chart
FIRST_ROW, ROW, BETWEEN = 330, 190, 66  # pixels: heights of charts, and the gap between
MARGINS = {"l": 52, "r": 12, "t": 34, "b": 30}
CLEAR, GRID, EDGE = (f"rgba(128,128,128,{opacity})" for opacity in (0, 0.16, 0.45))
# Buttons are listed explicitly: one of plotly's default buttons uploads the chart.
CONFIG = {
    "displaylogo": False, "responsive": True, "plotlyServerURL": "",
    "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
}  # fmt: skip


def figure(
    runs: Mapping[str, Curves], selected: Sequence[str], axis: str, over: float | None, log: bool, columns: int,
    colours: Mapping[str, str],
) -> Figure:  # fmt: skip
    """Return a figure with a chart for each curve: the first in full width, the others in columns below."""
    from plotly.subplots import make_subplots

    drawn = charts(runs, selected, axis, over, POINTS)
    rows = 1 + -(-max(0, len(drawn) - 1) // columns)
    heights = [FIRST_ROW] + [ROW] * (rows - 1)
    height = sum(heights) + BETWEEN * (rows - 1)
    fig = make_subplots(
        rows, columns, specs=[[{"colspan": columns}] + [None] * (columns - 1)] + [[{}] * columns] * (rows - 1),
        row_heights=heights, vertical_spacing=BETWEEN / height, horizontal_spacing=0.12 / columns,
    )  # fmt: skip
    for n, (chart, curves) in enumerate(drawn.items()):
        place = {"row": 1, "col": 1} if n == 0 else {"row": 2 + (n - 1) // columns, "col": 1 + (n - 1) % columns}
        for line in curves:
            for trace in traces(line, colours[line.run]):
                fig.add_trace(trace | {"showlegend": n == 0 and trace["showlegend"]}, **place)
        fig.add_annotation(
            text=CURVES[chart], xref="x domain", yref="y domain", x=0, y=1, xanchor="left", yanchor="bottom",
            showarrow=False, **place,
        )  # fmt: skip
    lines = {"gridcolor": GRID, "linecolor": EDGE, "zeroline": False}
    fig.update_xaxes(lines, matches="x", spikecolor=EDGE, spikethickness=1, spikedash="solid")
    fig.update_xaxes(title={"text": AXES[axis][0], "standoff": 4, "font": {"size": 12}}, row=1, col=1)
    fig.update_yaxes(lines, type="log" if log else "linear", nticks=6)
    fig.update_layout(
        template="none", height=height + MARGINS["t"] + MARGINS["b"], margin=MARGINS, hovermode="x unified",
        paper_bgcolor=CLEAR, plot_bgcolor=CLEAR, uirevision=axis, showlegend=False,
        modebar={"bgcolor": CLEAR, "color": EDGE, "activecolor": COLOURS[0]},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"},
    )  # fmt: skip
    return fig


def traces(line: Line, colour: str) -> list[dict[str, Any]]:
    """Return plotly's traces of a curve: the points pale, their average on top."""
    name = html.escape(line.run, quote=False)  # plotly interprets some markup in names
    drawn = {
        "x": line.x, "y": line.y, "name": name, "legendgroup": name, "mode": "lines", "hovertemplate": "%{y:.5g}",
        "line": {"color": colour, "width": 1.6}, "showlegend": True,
    }  # fmt: skip
    if line.name == "val_loss":
        dotted = {"mode": "lines+markers", "marker": {"size": 5}, "line": {"color": colour, "width": 1, "dash": "dot"}}
        return [drawn | dotted | {"name": f"{name} validation", "showlegend": False}]
    if line.average is None:
        return [drawn]
    pale = {"line": {"color": colour, "width": 1}, "opacity": 0.25, "showlegend": False}
    x, y = line.average
    return [drawn | pale, drawn | {"x": x, "y": y, "hoverinfo": "skip", "hovertemplate": None}]


def need(package: str, purpose: str) -> None:
    """Raise LlmpyError if a package of the `plot` extra is missing."""
    if importlib.util.find_spec(package) is None:
        raise LlmpyError("package.missing", f"{purpose} needs {package}", f"Install it: {install('llmpy[plot]')}")
