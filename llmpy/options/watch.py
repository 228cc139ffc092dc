"""Options of `llmpy watch` and `llmpy plot`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .fields import NOT_NEGATIVE, Options, Range, option, refusal

CURVES = ("loss", "lr", "grad_norm", "tokens_per_s", "share_of_peak", "val_bits_per_byte", "hellaswag")
AXES = ("steps", "tokens", "time")
PICTURES = (".png", ".svg", ".pdf", ".html")


@dataclass(frozen=True)
class WatchOptions(Options):
    """`llmpy watch [RUN …]`."""

    runs: tuple[Path, ...] | None = option(
        None, "run folders, or folders of them, where new runs appear by themselves (default: runs)", metavar="RUN",
        word=True,
    )  # fmt: skip
    port: int = option(
        8642, "where the page is, or the next free one", within=Range(1, 65535, "a port from 1 to 65535")
    )
    open: bool = option(False, "show it in the browser")


@dataclass(frozen=True)
class PlotOptions(Options):
    """`llmpy plot [RUN …]`."""

    runs: tuple[Path, ...] | None = option(
        None, "run folders (default: the newest below runs)", metavar="RUN", word=True
    )
    out: Path | None = option(
        None, "draw into this file: .png, .svg, .pdf, or .html, which is the page of llmpy watch", "-o", metavar="FILE"
    )
    terminal: bool = option(False, "draw with letters, as it does without -o")
    curves: tuple[str, ...] | None = option(None, "what to draw (default: loss; .html has all)", choices=CURVES)
    smooth: int | None = option(
        None,
        "steps to smooth over, 0: not (default: about a hundredth of the run)",
        metavar="STEPS",
        within=NOT_NEGATIVE,
    )
    x: str = option(
        "steps", "what curves lie along; time is that of the steps alone, and like tokens adds up over restarts",
        choices=AXES,
    )  # fmt: skip
    log: bool = option(False, "a logarithmic axis, that of the values")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out is not None and self.out.suffix.lower() not in PICTURES:
            raise refusal("out", self.out, "use a name that ends in " + ", ".join(PICTURES))
