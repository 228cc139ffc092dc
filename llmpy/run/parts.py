"""Checkpoint parts: one file per rank, from which any number of ranks can resume.

state-00002-of-00004.safetensors   m, v      (n,) float32     AdamW moments of the ranges that rank 2 updates
                                   ranges    (r, 2) int64     their starts and ends in the flat arenas
                                   place     (3,) int64       shard, sample and words consumed of the generator
                                   shard_order, sample_order int32, generator uint32: the rest of the data position

llmpy 0.1.0 wrote state.safetensors: m.NAME and v.NAME per parameter in table order, with `place` in the manifest.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..data.loader import Position
from ..model.partition import Range
from ..rng import MT19937, MTState
from ..system.stored import Stored
from . import checkpoint

OLD_STATE = "state.safetensors"  # of llmpy 0.1.0


class Moments(Protocol):
    """The interface of an optimizer to checkpoints. Its buffers may hold a part of the flat arenas."""

    m: Any  # float32 (n,): the `owned` ranges, concatenated
    v: Any
    master: Any  # float32 weights, like m and v
    updates: int

    @property
    def owned(self) -> Sequence[Range]:
        """Return the ranges of the flat arenas that this rank updates."""

    def weights(self, room: np.ndarray) -> np.ndarray:
        """Return all float32 weights, flat, on rank 0; gathered into `room` if needed. Collective."""

    def adopt_weights(self) -> None:
        """Copy the float32 weights from the model's parameters after they were loaded."""


@dataclass(frozen=True)
class Part:
    """One rank's part of a checkpoint: m and v (n,) float32 in its file."""

    ranges: Sequence[Range]
    m: Stored
    v: Stored
    position: Position


def part_name(rank: int, ranks: int) -> str:
    """Return the file name of a checkpoint part."""
    return f"state-{rank:05}-of-{ranks:05}.safetensors"


def part_pieces(ranges: Sequence[Range], moments: checkpoint.Pieces, position: Position) -> checkpoint.Pieces:
    """Return the contents of a part's file; `moments`: m, then v, in one array or two."""
    others: dict[str, np.ndarray] = {
        "ranges": np.asarray(ranges, np.int64).reshape(-1, 2),
        "place": np.asarray([position.shard, position.sample, position.rng.pos], np.int64),
        "shard_order": np.asarray(position.shard_order, np.int32),
        "sample_order": np.asarray(position.sample_order, np.int32),
        "generator": np.asarray(position.rng.key, np.uint32),
    }
    half = (sum(x.size for x in moments) // 2,)
    entries: list[tuple[str, tuple[int, ...], str]] = [("m", half, "float32"), ("v", half, "float32")]
    entries += [(name, x.shape, x.dtype.name) for name, x in others.items()]
    return [checkpoint.file_header(entries), *moments, *others.values()]


def read_parts(path: Path, manifest: Mapping[str, Any]) -> list[Part]:
    """Return the parts, by rank, of a checkpoint that `checkpoint.verify` accepted."""
    ranks = manifest.get("ranks", 1)
    names = [OLD_STATE] if OLD_STATE in manifest["files"] else [part_name(rank, ranks) for rank in range(ranks)]
    return [_read(path / name, manifest["data"]) for name in names]


def _read(path: Path, data: Mapping[str, Any]) -> Part:
    with checkpoint.opened(path) as file:
        found = {n: file.get_tensor(n) for n in file.keys() if n.split(".")[0] not in ("m", "v")}  # noqa: SIM118, no dict
    about, start = checkpoint.tensors_of(path)
    size = sum(math.prod(entry["shape"]) for name, entry in about.items() if name.split(".")[0] == "m")
    flat = Stored(path, np.float32, start, 2 * size)
    ranges = found["ranges"].tolist() if "ranges" in found else [(0, size)]
    old = "shard", "sample", "generator_used"
    shard, sample, used = found["place"].tolist() if "place" in found else [int(data[key]) for key in old]
    position = Position(shard, sample, found["shard_order"], found["sample_order"], MTState(found["generator"], used))
    return Part(ranges, flat.part(0, size), flat.part(size, 2 * size), position)


def load_moments(parts: Sequence[Part], ranges: Sequence[Range], m: np.ndarray, v: np.ndarray) -> None:
    """m and v (n,) := the moments of these ranges of the flat arenas, concatenated, from any division into parts."""
    pieces: list[tuple[int, int, int, Part]] = []  # start, end, offset in the part, part
    for part in parts:
        at = 0
        for start, stop in part.ranges:
            pieces.append((start, stop, at, part))
            at += stop - start
    pieces.sort(key=lambda piece: piece[:2])
    starts = [piece[0] for piece in pieces]
    at = 0
    for start, stop in ranges:
        for first, end, there, part in pieces[bisect.bisect(starts, start) - 1 : bisect.bisect_left(starts, stop)]:
            low, high = max(start, first), min(stop, end)
            here, there = slice(at + low - start, at + high - start), there + low - first
            part.m.read(there, m[here])
            part.v.read(there, v[here])
        at += stop - start


def position_for(parts: Sequence[Part], rank: int, ranks: int, seed: int) -> Position:
    """Return the data position from which one of `ranks` resumes.

    With as many ranks as before, each resumes at its own. Otherwise all use rank 0's place and order, since the
    division of the text differs. Each keeps its generator; additional ranks seed new ones from `seed`.
    """
    if len(parts) == ranks:
        return parts[rank].position
    rng = parts[rank].position.rng if rank < len(parts) else MT19937(seed + rank).state
    return replace(parts[0].position, rng=rng)
