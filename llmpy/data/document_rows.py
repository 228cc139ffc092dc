"""Documents → rows of T tokens, to fine-tune: several in a row, and none crosses rows unless it is longer than T.

A document longer than T takes whole rows, and its end starts a row that shorter ones fill up. Within a window of
documents the longest is placed first, where the least room is left (best fit decreasing); then rows and the documents
of each are put back into their order. The rest of a row is EOT, each a document of its own.

The last token of a document learns EOT where it does in the stream: if the next document there starts with EOT that
counts. It learns no other first token, and padding learns nothing.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .shards import COUNTED, START

WINDOW = 512  # rows: memory is bounded, and less than a row is lost at its end


def pack(
    ids: np.ndarray, counted: np.ndarray | None, starts: np.ndarray, T: int, eot: int, path: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens and mask of whole rows and a last target, mapped from files; and the lengths of the documents.

    ids, counted (n,): the stream, with documents at `starts`, in order; counted: bool, None for all.
    """
    starts = np.unique(np.append(0, starts[starts < len(ids)]))
    lengths = np.diff(starts, append=len(ids))
    heads = ids[starts] == eot if counted is None else (ids[starts] == eot) & counted[starts]
    learned = np.append(heads[1:], False)  # whether the end of each is
    marks, learns = path.with_suffix(".marks"), False
    with path.open("wb") as tokens, marks.open("wb") as mask:
        for group in groups(lengths, T):
            size = -(-int(lengths[group].sum()) // T) * T
            row, mark, at = np.full(size, eot, ids.dtype), np.full(size, START, np.uint8), 0
            for i in group:
                part = slice(starts[i], starts[i] + lengths[i])
                here = slice(at, at + lengths[i])
                row[here], mark[here] = ids[part], COUNTED if counted is None else counted[part]
                mark[at] = START | COUNTED * (learns and row[at] == eot)
                at, learns = here.stop, learned[i]
            if at < size:
                mark[at] |= COUNTED * learns
                learns = False
            tokens.write(row.tobytes())
            mask.write(mark.tobytes())
        tokens.write(np.array([eot], ids.dtype).tobytes())
        mask.write(bytes([START | COUNTED * learns]))
    return np.memmap(path, ids.dtype, "r"), np.memmap(marks, np.uint8, "r"), lengths


def groups(lengths: np.ndarray, T: int) -> Iterator[list[int]]:
    """Yield the documents of whole rows, one or, if the first is longer than T, several; all by number, in order."""
    ends, first = np.cumsum(lengths), 0
    while first < len(lengths):
        most = ends[first] - lengths[first] + WINDOW * T
        last = max(first + 1, int(np.searchsorted(ends, most, "right")))
        yield from sorted(_best_fit(lengths[first:last].tolist(), first, T), key=min)
        first = last


def _best_fit(lengths: list[int], first: int, T: int) -> list[list[int]]:
    """Return groups of the documents numbered from `first`."""
    found: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # tokens left and number of each group, sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if (at := bisect_left(rooms, (lengths[i], 0))) < len(rooms):
            room, group = rooms.pop(at)
            found[group].append(first + i)
        else:
            room, group = -(-lengths[i] // T) * T, len(found)
            found.append([first + i])
        if room > lengths[i]:
            insort(rooms, (room - lengths[i], group))
    return [group[:1] + sorted(group[1:]) if lengths[group[0] - first] > T else sorted(group) for group in found]


def described(lengths: np.ndarray, rows: int, T: int) -> str:
    """Return a line on the padding of documents of these lengths in so many rows."""
    tokens, alone = int(lengths.sum()), int((-(-lengths // T)).sum())
    share, instead = (1 - tokens / (count * T) for count in (rows, alone))
    long = f"; longer than a row (-T): {n:,}" if (n := int((lengths > T).sum())) else ""
    return (
        f"packing  {len(lengths):,} documents in {rows:,} rows of {T}: {share:.1%} padding "
        f"({instead:.1%} with one document per row){long}"
    )
