"""Divide the parameters into buckets for communication, and each bucket between the ranks that update it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .arena import Tensor

BUCKET = 8 << 20  # elements of a bucket, 32 MB of gradients: large against a network's latency, small against a step
LINE = 16  # elements: parts start on a cache line
EMBEDDINGS = ("wte", "wpe")  # adjacent in the tables
END = -1  # the "layer" of the embeddings: gradients ready last, weights needed first
Range = tuple[int, int]  # start and end in the flat arenas


@dataclass(frozen=True)
class Bucket:
    """Parameters communicated together: ascending `ranges` of the flat arenas, so matrices precede vectors."""

    first: int  # lowest and highest layer; END: embeddings
    last: int
    ranges: tuple[Range, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return sum(stop - start for start, stop in self.ranges)

    def part(self, rank: int, ranks: int) -> list[Range]:
        """Return the ranges that a rank updates: equal parts in whole cache lines; the last may be shorter."""
        each = -(-self.size // (ranks * LINE)) * LINE
        return cut(self.ranges, rank * each, (rank + 1) * each)


def cut(ranges: Sequence[Range], low: int, high: int) -> list[Range]:
    """Return the elements low … high − 1 of the concatenated ranges."""
    found, before = [], 0
    for start, stop in ranges:
        a, b = max(low - before, 0), min(high - before, stop - start)
        if a < b:
            found.append((start + a, start + b))
        before += stop - start
    return found


def buckets(table: Sequence[Tensor], layers: int, limit: int = BUCKET) -> list[Bucket]:
    """Return all parameters in the order of backward: the last layers first, the embeddings last."""
    starts = list(itertools.accumulate((t.size for t in table), initial=0))
    stacked = [(at, t.size // layers) for at, t in zip(starts, table, strict=False) if t.per_layer]
    others = [(at, t) for at, t in zip(starts, table, strict=False) if not t.per_layer]
    embeddings = [(at, at + t.size) for at, t in others if t.name in EMBEDDINGS]
    final = [(at, at + t.size) for at, t in others if t.name not in EMBEDDINGS]  # done before the layers

    def of_layers(first: int, last: int) -> list[Range]:
        ranges = [(at + first * each, at + (last + 1) * each) for at, each in stacked]
        return sorted(ranges + final if last == layers - 1 else ranges)

    found: list[Bucket] = []
    last = layers - 1
    for first in reversed(range(layers)):
        ranges = of_layers(first, last)
        # the next layer does not fit or does not exist
        if first == 0 or sum(b - a for a, b in of_layers(first - 1, last)) > limit:
            found += _pieces(first, last, ranges, limit)
            last = first - 1
    together = [(embeddings[0][0], embeddings[-1][1])] if embeddings else []
    return found + _pieces(END, END, together, limit)


def _pieces(first: int, last: int, ranges: Sequence[Range], limit: int) -> list[Bucket]:
    """Return one bucket, or several equal ones if it exceeds `limit`."""
    whole = Bucket(first, last, tuple(ranges))
    count = -(-whole.size // limit)
    each = -(-whole.size // max(1, count))
    return [Bucket(first, last, tuple(cut(ranges, i * each, (i + 1) * each))) for i in range(count)]


def most_kept(table: Sequence[Tensor], layers: int, ranks: int) -> tuple[int, int]:
    """Return the elements of all parts of rank 0, which has the most, and of its largest part."""
    found = buckets(table, layers)
    parts = [length(b.part(0, ranks)) for b in found]
    return sum(parts), max(parts)


def length(ranges: Sequence[Range]) -> int:
    """Return the number of elements in the ranges."""
    return sum(stop - start for start, stop in ranges)


def pack(out: np.ndarray, flat: np.ndarray, ranges: Sequence[Range]) -> None:
    """out := the concatenated ranges of a flat array."""
    at = 0
    for start, stop in ranges:
        out[at : at + stop - start] = flat[start:stop]
        at += stop - start


def unpack(flat: np.ndarray, ranges: Sequence[Range], packed: np.ndarray) -> None:
    """Undo `pack`: the ranges of a flat array := packed."""
    at = 0
    for start, stop in ranges:
        flat[start:stop] = packed[at : at + stop - start]
        at += stop - start
