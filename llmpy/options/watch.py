"""Options of `llmpy watch` and `llmpy plot`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .fields import below, known, not_negative, option, positive, refusal

CURVES = ("loss", "lr", "grad_norm", "tokens_per_s", "share_of_peak", "val_bits_per_byte", "hellaswag")
AXES = ("steps", "tokens", "time")
PICTURES = (".png", ".svg", ".pdf", ".html")


@dataclass(frozen=True)
class WatchOptions:
    """`llmpy watch [RUN …]`."""

    runs: tuple[Path, ...] | None = option(
        None, "run folders, or folders of them, where new runs appear by themselves (default: runs)", metavar="RUN",
        word=True,
    )  # fmt: skip
    port: int = option(8642, "where the page is, or the next free one")
    open: bool = option(False, "show it in the browser")

    def __post_init__(self) -> None:
        positive(self, "port")
        below(self, "port", 1 << 16)


@dataclass(frozen=True)
class PlotOptions:
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
        None, "steps to smooth over, 0: not (default: about a hundredth of the run)", metavar="STEPS"
    )
    x: str = option(
        "steps", "what curves lie along; time is that of the steps alone, and like tokens adds up over restarts",
        choices=AXES,
    )  # fmt: skip
    log: bool = option(False, "a logarithmic axis, that of the values")

    def __post_init__(self) -> None:
        known(self, "x", AXES)
        not_negative(self, "smooth")
        below(self, "smooth", 1 << 53)
        for curve in self.curves or ():
            if curve not in CURVES:
                raise refusal("curves", curve, "use some of " + ", ".join(CURVES))
        if self.out is not None and self.out.suffix.lower() not in PICTURES:
            raise refusal("out", self.out, "use a name that ends in " + ", ".join(PICTURES))
