"""Format durations, sizes, counts, suggestions and tables."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def duration(seconds: float) -> str:
    """Return a duration: 45 s, 2 min 30 s, 3 h 20 min, 12 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400:,} d {whole % 86400 // 3600} h"


def gigabytes(count: int) -> str:
    """Return a size: 1.2 GB (10⁹ bytes)."""
    return f"{count / 1e9:.1f} GB"


def count_of(n: int, one: str, many: str = "") -> str:
    """Return a count: 1 step, 2 steps. `many`: an irregular plural."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `Did you mean A or B?` with known words that start with `word`, else the most similar one; or ""."""
    known = [*known]
    started = [k for k in known if len(word) > 2 and k.startswith(word)][:3]
    near = started or difflib.get_close_matches(word, known, 1, 0.7)
    return f"Did you mean {' or '.join(near)}?" if near else ""


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as text, the first column left-aligned, the others right-aligned."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(c.rjust(w) if n else c.ljust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    )
