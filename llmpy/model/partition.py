"""Which parameters travel together between ranks, and which rank updates which: arithmetic on the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .arena import Tensor

BUCKET = 8 << 20  # elements of a bucket: 32 MB of gradients, long against a network's latency, short against a step
LINE = 16  # elements: parts begin on a cache line
END = -1  # the "layer" whose gradients are done last, and whose weights are needed first: the embeddings
Range = tuple[int, int]  # start and end in the flat arenas


@dataclass(frozen=True)
class Bucket:
    """Parameters that travel together: `ranges` of the flat arenas, ascending, so that matrices come before vectors."""

    first: int  # lowest and highest layer in it; END: embeddings
    last: int
    ranges: tuple[Range, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return sum(stop - start for start, stop in self.ranges)

    def part(self, rank: int, ranks: int) -> list[Range]:
        """What of it one rank updates: equal parts but for the last ones, in whole cache lines."""
        each = -(-self.size // (ranks * LINE)) * LINE
        return cut(self.ranges, rank * each, (rank + 1) * each)


def cut(ranges: Sequence[Range], low: int, high: int) -> list[Range]:
    """The elements low … high of the ranges put together."""
    found, before = [], 0
    for start, stop in ranges:
        a, b = max(low - before, 0), min(high - before, stop - start)
        if a < b:
            found.append((start + a, start + b))
        before += stop - start
    return found


def buckets(table: Sequence[Tensor], layers: int, limit: int = BUCKET) -> list[Bucket]:
    """All parameters in the order in which backward finishes them: the last layers first, the embeddings last."""
    where, offset = {}, 0
    for t in table:
        where[t.name] = (offset, t)
        offset += t.size
    ends = {"wte", "wpe", "ln_f_w", "ln_f_b"}

    def of_layers(first: int, last: int) -> list[Range]:
        stacked = [(at, t.size // layers) for name, (at, t) in where.items() if name not in ends]
        ranges = [(at + first * each, at + (last + 1) * each) for at, each in stacked]
        if last == layers - 1:
            ranges += [(at, at + t.size) for at, t in (where["ln_f_w"], where["ln_f_b"])]
        return ranges

    found: list[Bucket] = []
    last = layers - 1
    for first in reversed(range(layers)):
        ranges = of_layers(first, last)
        # the next layer would not fit any more, or there is none
        if first == 0 or sum(b - a for a, b in of_layers(first - 1, last)) > limit:
            found += _pieces(first, last, ranges, limit)
            last = first - 1
    (wte, size), (_, wpe) = (where["wte"][0], where["wte"][1].size), where["wpe"]
    return found + _pieces(END, END, [(wte, wte + size + wpe.size)], limit)


def _pieces(first: int, last: int, ranges: Sequence[Range], limit: int) -> list[Bucket]:
    """One bucket, or as many equal ones as it takes."""
    whole = Bucket(first, last, tuple(ranges))
    count = -(-whole.size // limit)
    each = -(-whole.size // count)
    return [Bucket(first, last, tuple(cut(ranges, i * each, (i + 1) * each))) for i in range(count)]


def most_kept(table: Sequence[Tensor], layers: int, ranks: int) -> tuple[int, int]:
    """Elements of the parts that the first rank keeps, which has most, and of its largest one."""
    found = buckets(table, layers)
    parts = [length(b.part(0, ranks)) for b in found]
    return sum(parts), max(parts)


def length(ranges: Sequence[Range]) -> int:
    """Elements of all ranges."""
    return sum(stop - start for start, stop in ranges)


def pack(out: np.ndarray, flat: np.ndarray, ranges: Sequence[Range]) -> None:
    """out := the ranges of a flat array, one after another."""
    at = 0
    for start, stop in ranges:
        out[at : at + stop - start] = flat[start:stop]
        at += stop - start


def unpack(flat: np.ndarray, ranges: Sequence[Range], packed: np.ndarray) -> None:
    """The opposite of `pack`."""
    at = 0
    for start, stop in ranges:
        flat[start:stop] = packed[at : at + stop - start]
        at += stop - start
