"""A place in the data, as the arrays and the manifest of a checkpoint hold it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.loader import Position
from ..rng import MT19937, MTState
from . import checkpoint
from .checkpoint import STATE


def arrays(position: Position) -> dict[str, np.ndarray]:
    """What a manifest cannot hold of a place in the data: the orders may have a million entries."""
    return {
        "shard_order": np.asarray(position.shard_order, np.int32),
        "sample_order": np.asarray(position.sample_order, np.int32),
        "generator": np.asarray(position.rng.key, np.uint32),
    }


def position_of(manifest: dict[str, Any], others: dict[str, np.ndarray]) -> Position:
    """The place in the data that a checkpoint was made at."""
    place = manifest["data"]
    rng = MTState(others["generator"], place["generator_used"])
    return Position(place["shard"], place["sample"], others["shard_order"], others["sample_order"], rng)


def places(position: Position) -> dict[str, np.ndarray]:
    """A place in the data as arrays alone, for the file of one of several ranks."""
    return {"place": np.asarray([position.shard, position.sample, position.rng.pos], np.int64), **arrays(position)}


def place_of(path: Path, manifest: dict[str, Any], rank: int, ranks: int, seed: int) -> Position:
    """The place in the data at which one of `ranks` goes on from a checkpoint of any number of them.

    Of as many it is its own. Else all take the first one's place and order, for their own belong to another division of
    the text, and keep their own generators; further ranks get the generator that they would have begun with.
    """
    before = manifest.get("ranks", 1)

    def of(q: int) -> Position:
        if before == 1:
            return position_of(manifest, checkpoint.load_arrays(path / STATE))
        found = checkpoint.load_arrays(path / checkpoint.shard_name(q, before))
        shard, sample, used = found["place"].tolist()
        return Position(shard, sample, found["shard_order"], found["sample_order"], MTState(found["generator"], used))

    if before == ranks:
        return of(rank)
    rng = of(rank).rng if rank < before else MT19937(seed + rank).state
    return replace(of(0), rng=rng)
