"""Curves in a terminal: dots of braille, two across and four down in a letter; letters where dots will not do.

With colours, or for one curve alone, a letter U+2800 + Σ 2^bit stands for eight dots, of bits

0 3
1 4
2 5
6 7
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

BITS = np.array([[0, 3], [1, 4], [2, 5], [6, 7]])  # (row, column) of a letter → its bit
COLOURS = (34, 33, 32, 35, 36, 31)  # of ANSI: blue, yellow, green, magenta, cyan, red
LETTERS = "*+xo#@"  # for curve after curve where dots do not do
LEAST_WIDTH, HEIGHT = 20, 16  # columns and rows of letters, without what is written beside them

Line = tuple[np.ndarray, np.ndarray]  # places along the axis below, and values


def chart(
    lines: Sequence[Line], width: int, tell: Callable[[float], str], colour: bool, braille: bool, log: bool = False,
    below: str = "step",
) -> list[str]:  # fmt: skip
    """Rows of text, as wide as `width` if that leaves room to draw, with both axes; `tell` writes a value.

    Every line has a point. `below` is the title of the axis below.
    """
    places = np.concatenate([line[0] for line in lines])
    levels = [np.log10(np.maximum(values, 1e-30)) if log else values for _, values in lines]
    first, last = float(places.min()), float(places.max())
    low, high = float(min(v.min() for v in levels)), float(max(v.max() for v in levels))
    if low == high:
        low, high = low - 0.5, high + 0.5
    named = {row: tell(level(low, high, row, log)) for row in range(0, HEIGHT, 5)}
    margin = max(map(len, named.values()))
    columns = max(LEAST_WIDTH, width - margin - 2)
    dots = by_dots(lines, colour, braille)
    across, down = (2, 4) if dots else (1, 1)
    owner = np.full((HEIGHT, columns), -1)  # which curve a letter shows: the last one drawn there
    bits = np.zeros((HEIGHT, columns), int)
    for n, ((at, _), values) in enumerate(zip(lines, levels, strict=True)):
        x = (np.asarray(at, float) - first) / ((last - first) or 1.0) * (across * columns - 1)
        y = (high - values) / (high - low) * (down * HEIGHT - 1)
        for column, row in joined(x, y):
            place = row // down, column // across
            owner[place] = n
            bits[place] |= 1 << int(BITS[row % 4, column % 2])
    rows = []
    for row in range(HEIGHT):
        cells = [
            " " if n < 0 else painted(chr(0x2800 + bit) if dots else LETTERS[n % len(LETTERS)], n, colour)
            for n, bit in zip(owner[row].tolist(), bits[row].tolist(), strict=True)
        ]
        edge = ("┤" if row in named else "│") if braille else "|"
        rows.append(f"{named.get(row, ''):>{margin}} {edge}" + "".join(cells).rstrip())
    ends = [f"{end:,.0f}" if end >= 100 or end.is_integer() else f"{end:.3g}" for end in (first, last)]
    middle = f" {below} ".center(columns - len(ends[0]) - len(ends[1]))
    return [*rows, " " * (margin + 2) + ends[0] + middle + ends[1]]


def legend(names: Sequence[str], colour: bool, braille: bool) -> list[str]:
    """A row for each curve of a `chart`, with how it is drawn."""
    dots = by_dots(names, colour, braille)
    marks = ["──" if dots else 2 * LETTERS[n % len(LETTERS)] for n in range(len(names))]
    return [f"{painted(mark, n, colour)} {name}" for n, (mark, name) in enumerate(zip(marks, names, strict=True))]


def by_dots(curves: Sequence[object], colour: bool, braille: bool) -> bool:
    """Whether dots tell these curves apart."""
    return braille and (colour or len(curves) == 1)


def level(low: float, high: float, row: int, log: bool) -> float:
    """The value in the middle of a row of letters."""
    value = high - (high - low) * row / (HEIGHT - 1)
    return 10**value if log else value


def joined(x: np.ndarray, y: np.ndarray) -> set[tuple[int, int]]:
    """The dots of points and of the straight lines between them, as (column, row)."""
    if len(x) == 1:
        return {(round(x[0]), round(y[0]))}
    found = set()
    for (a, b), (c, d) in zip(zip(x[:-1], y[:-1], strict=True), zip(x[1:], y[1:], strict=True), strict=True):
        count = 1 + math.ceil(max(abs(c - a), abs(d - b)))
        for t in np.linspace(0, 1, count + 1).tolist():
            found.add((round(a + t * (c - a)), round(b + t * (d - b))))
    return found


def painted(text: str, n: int, colour: bool) -> str:
    """The text in the colour of curve `n`, if colours are wanted."""
    return f"\x1b[{COLOURS[n % len(COLOURS)]}m{text}\x1b[0m" if colour else text
