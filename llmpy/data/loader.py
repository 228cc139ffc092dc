"""Batches of shards in llm.c's order (`llmc/dataloader.h`).

With P ranks, sample i of a shard is the B·T·P tokens from i·B·T·P on. Rank r reads its r-th part and the next token.
Row b continues row b − 1. Shuffling permutes the shards at each epoch, starting from the previous order, and the
samples of a shard when it is opened. Each rank has its own generator; an epoch still covers every sample once. Where
a token does not count by the mask of its shard, the target is −1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import LlmpyError
from ..rng import MT19937, MTState
from .shards import COUNTED, START, Shard


@dataclass(frozen=True)
class Position:
    """The state of a loader, enough to resume with the next batch."""

    shard: int  # index into shard_order
    sample: int  # index into sample_order
    shard_order: np.ndarray  # int32 (shards,)
    sample_order: np.ndarray  # int32 (samples of the open shard,)
    rng: MTState


class Loader:
    """Endless batches of (B, T) for one rank of `ranks`."""

    def __init__(
        self, shards: Sequence[Shard], B: int, T: int, shuffle: bool, seed: int = 42, rank: int = 0, ranks: int = 1,
        vocab_size: int | None = None,
    ) -> None:  # fmt: skip
        """If `vocab_size` is given, check every batch against it: files may change after they were opened."""
        self.shards = tuple(shards)
        self.B, self.T, self.rank, self.ranks = B, T, rank, ranks
        self.shuffle, self.vocab_size = shuffle, vocab_size
        for shard in self.shards:
            self._check_length(shard)
        self._rng = MT19937(seed + rank)
        self._shard_order = np.arange(len(self.shards), dtype=np.int32)
        self._inputs = np.empty((B, T), np.int32)
        self._targets = np.empty((B, T), np.int32)
        self._positions = np.empty((B, T), np.int32)
        # Of the last batch, int32 (B, T): counted from 0 in each document of a row; None: in each row.
        self.positions: np.ndarray | None = None
        self.reset()

    @property
    def batches_per_epoch(self) -> int:
        """Batches per rank and epoch."""
        return sum(self._samples(shard) for shard in self.shards)

    def reset(self) -> None:
        """Start an epoch. If shuffling, draw new orders rather than repeat the old ones (as llm.c)."""
        self._shard = 0
        if self.shuffle:
            self._rng.permutation(self._shard_order)
        self._open()

    def next(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the next tokens and targets, int32 (B, T) each. Every call overwrites both, and `positions`.

        Raises LlmpyError for a token outside the vocabulary.
        """
        if self._sample >= self._sample_order.size:
            if self._shard + 1 < len(self.shards):
                self._shard += 1
                self._open()
            else:
                self.reset()
        BT = self.B * self.T
        start = (int(self._sample_order[self._sample]) * self.ranks + self.rank) * BT
        stretch = self._tokens[start : start + BT + 1]
        self._inputs.reshape(-1)[:] = stretch[:-1]
        self._targets.reshape(-1)[:] = stretch[1:]
        if self.vocab_size is not None:  # checks the copies, which cannot change; takes microseconds
            largest = max(
                x.view(np.uint32).max() for x in (self._inputs, self._targets)
            )  # negative tokens are large too
            if largest >= self.vocab_size:
                message = (
                    f"{self._shard_here.path} was changed after it was opened: it has token {largest} now, outside the "
                    f"vocabulary of {self.vocab_size:,} tokens"
                )
                raise LlmpyError("shard.changed", message, "Do not change data in use")
        mask = None if self._mask is None else self._mask[start : start + BT + 1]
        if mask is not None:
            self._targets.reshape(-1)[mask[1:] & COUNTED == 0] = -1
        self.positions = None
        if mask is not None and self._shard_here.packed:
            starts = mask[:-1].reshape(self.B, self.T) & START != 0
            places = np.arange(self.T, dtype=np.int32)
            np.maximum.accumulate(np.where(starts, places, 0), axis=1, out=self._positions)
            self.positions = np.subtract(places, self._positions, out=self._positions)
        self._sample += 1
        return self._inputs, self._targets

    @property
    def position(self) -> Position:
        """The position of the next batch; set it to resume from there. Later reads do not modify it.

        Setting raises LlmpyError if the position is of other shards, -B or -T.
        """
        return Position(self._shard, self._sample, self._shard_order.copy(), self._sample_order, self._rng.state)

    @position.setter
    def position(self, position: Position) -> None:
        orders = position.shard_order, position.sample_order
        fits = position.shard_order.size == len(self.shards) > position.shard >= 0
        fits = fits and all(np.array_equal(np.sort(order), np.arange(order.size)) for order in orders)
        if fits:
            shard = self.shards[int(position.shard_order[position.shard])]
            fits = position.sample_order.size == self._samples(shard)
        if not fits or not 0 <= position.sample <= position.sample_order.size:
            raise LlmpyError(
                "resume.position-mismatch",
                "the saved position does not fit these token shards and this batch size",
                "Resume with the same --data, -B, -T and number of processes",
            )
        self._shard, self._sample = position.shard, position.sample
        self._shard_order[:] = position.shard_order
        self._rng.state = position.rng
        self._tokens, self._mask = shard.tokens, shard.mask
        self._sample_order = position.sample_order.astype(np.int32)

    def resume(self, position: Position, BT: int) -> None:
        """Resume from the position of a loader of these shards with samples of BT tokens.

        If the samples here have another size, the open shard is split again. Samples that start in one already read
        come first and count as read; the others follow in the old order.
        """
        size = self.B * self.T * self.ranks
        valid = position.shard_order.size == len(self.shards) > position.shard >= 0 and position.sample_order.size > 0
        if size != BT and valid:
            samples = self._samples(self.shards[int(position.shard_order[position.shard])])
            rank = np.argsort(position.sample_order)  # of each old sample in the old order
            when = rank[np.minimum(np.arange(samples) * size // BT, rank.size - 1)]
            order, read = np.argsort(when, kind="stable").astype(np.int32), int((when < position.sample).sum())
            position = Position(position.shard, read, position.shard_order, order, position.rng)
        self.position = position

    @property
    def batch(self) -> tuple[str, int]:
        """File name and sample number of the last batch that `next` returned."""
        return self._shard_here.path.name, int(self._sample_order[self._sample - 1])

    def _open(self) -> None:
        """Start the shard at `_shard`, its samples in a new order."""
        shard = self._shard_here
        self._tokens, self._mask = shard.tokens, shard.mask
        self._sample = 0
        self._sample_order = np.arange(self._samples(shard), dtype=np.int32)
        if self.shuffle:
            self._rng.permutation(self._sample_order)

    @property
    def _shard_here(self) -> Shard:
        return self.shards[int(self._shard_order[self._shard])]

    def _samples(self, shard: Shard) -> int:
        return (len(shard) - 1) // (self.B * self.T * self.ranks)

    def _check_length(self, shard: Shard) -> None:
        needed = self.B * self.T * self.ranks + 1
        if len(shard) < needed:
            processes = f" on {self.ranks} processes" if self.ranks > 1 else ""
            batch = f"a batch of -B {self.B} -T {self.T}{processes}"
            message = f"{shard.path} has {len(shard):,} tokens, {batch} needs {needed:,}"
            raise LlmpyError("shard.too-short", message, "Use a smaller -B or -T, or more text")
