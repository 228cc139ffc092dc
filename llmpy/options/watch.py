"""Options of `llmpy watch`, `llmpy plot` and `llmpy report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .fields import NOT_NEGATIVE, Options, Range, option, refusal

CURVES = {  # names in metrics.jsonl → titles
    "loss": "loss", "lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_s": "tokens per second",
    "share_of_peak": "share of peak (%)", "val_bits_per_byte": "validation bits per byte",
    "hellaswag": "HellaSwag accuracy (%)",
}  # fmt: skip
AXES = {  # title and unit of the x axis
    "steps": ("step", 1), "tokens": ("tokens (millions)", 1e6), "time": ("training time (minutes)", 60),
}  # fmt: skip
PICTURES = (".png", ".svg", ".pdf", ".html")


# fmt: off
@dataclass(frozen=True)
class WatchOptions(Options):
    """`llmpy watch [RUN …]`."""

    runs: tuple[Path, ...] | None = option(None, "runs, or folders of runs (default: runs)", metavar="RUN", word=True)
    port: int = option(8642, "port, or the next free one", within=Range(1, 65535, "a port from 1 to 65535"))
    open: bool = option(False, "open the page in the browser")


@dataclass(frozen=True)
class PlotOptions(Options):
    """`llmpy plot [RUN …]`."""

    runs: tuple[Path, ...] | None = option(None, "run folders (default: the newest in runs)", metavar="RUN", word=True)
    out: Path | None = option(None, "output file: .png, .svg, .pdf or .html (interactive)", "-o", metavar="FILE")
    terminal: bool = option(False, "plot in the terminal (default without -o)")
    curves: tuple[str, ...] | None = option(
        None, f"{', '.join(CURVES)} (default: loss; .html: all)", metavar="CURVE", choices=tuple(CURVES)
    )
    smooth: int | None = option(None, "steps to average (default: 1 % of all)", metavar="STEPS", within=NOT_NEGATIVE)
    x: str = option("steps", "x axis; time and tokens include those before a resume", choices=tuple(AXES))
    log: bool = option(False, "logarithmic y axis")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out is not None and self.out.suffix.lower() not in PICTURES:
            raise refusal("out", self.out, "Use a name that ends in " + ", ".join(PICTURES))


@dataclass(frozen=True)
class ReportOptions(Options):
    """`llmpy report RUN`."""

    run: Path = option(Path(), "run folder, or a folder of runs: the newest", metavar="RUN", word=True)
    out: Path | None = option(
        None, "output file, .md; the curve is the .svg next to it (default: report.md in RUN)", "-o", metavar="FILE"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out is not None and self.out.suffix.lower() != ".md":
            raise refusal("out", self.out, "Use a name that ends in .md")
# fmt: on
