"""Numbers, counts, suggestions and tables as text."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

SUGGESTIONS = 3  # at most


def duration(seconds: float) -> str:
    """45 s, 2 min 30 s, 3 h 20 min, 12 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400:,} d {whole % 86400 // 3600} h"


def gigabytes(count: int) -> str:
    """1.2 GB (10⁹ bytes)."""
    return f"{count / 1e9:.1f} GB"


def count_of(n: int, one: str, many: str = "") -> str:
    """1 step, 2 steps; `many`: where that is not `one` with an s."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean …?` with the `nearest` of the known words, or ""."""
    return asked(nearest(word, known))


def asked(words: Sequence[str]) -> str:
    """`did you mean A, B or C?`; "" of none."""
    return f"did you mean {' or '.join(filter(None, (', '.join(words[:-1]), words[-1])))}?" if words else ""


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """The known words that the word may stand for: those that start with it, else the most similar ones."""

    def plain(w: str) -> str:
        return w.lower().replace("_", "-").strip("-")

    word, by_plain = plain(word), {plain(k): k for k in known}
    started = [k for p, k in by_plain.items() if len(word) > 1 and p.startswith(word)]
    alike = {p: difflib.SequenceMatcher(None, p, word).ratio() for p in by_plain}
    best = max(0.7, *alike.values(), 0.0) - 0.1
    return (started or [by_plain[p] for p in difflib.get_close_matches(word, alike, SUGGESTIONS, best)])[:SUGGESTIONS]


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text: the first column to the left, the others to the right."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(c.rjust(w) if n else c.ljust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    )
