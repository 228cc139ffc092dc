"""Batches of shards in llm.c's order (`llmc/dataloader.h`).

With P ranks, sample i of a shard is the stretch of B·T·P tokens at i·B·T·P; rank r takes its r-th part and
the one token after it. Rows follow each other in the text: row b continues row b − 1. Shuffling permutes the
shards at each epoch, starting from the last epoch's order, and the samples of a shard when it is opened; each
rank has a generator of its own, and still an epoch covers every sample once. Where a shard's mask says that a
token does not count, the target is −1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import LlmpyError
from ..rng import MT19937, MTState
from .shards import Shard


@dataclass(frozen=True)
class Position:
    """Where a loader stands: enough to go on with the next batch."""

    shard: int  # index into shard_order
    sample: int  # index into sample_order
    shard_order: np.ndarray  # int32 (shards,)
    sample_order: np.ndarray  # int32 (samples of the open shard,)
    rng: MTState


class Loader:
    """Endless batches of (B, T) for one rank of `ranks`."""

    def __init__(
        self,
        shards: Sequence[Shard],
        B: int,
        T: int,
        shuffle: bool,
        seed: int = 42,
        rank: int = 0,
        ranks: int = 1,
        vocab_size: int | None = None,
    ) -> None:
        """With `vocab_size` every batch is checked against it, for files may change after they were opened."""
        self.shards = tuple(shards)
        self.B, self.T, self.rank, self.ranks = B, T, rank, ranks
        self.shuffle, self.vocab_size = shuffle, vocab_size
        for shard in self.shards:
            self._check_length(shard)
        self._rng = MT19937(seed + rank)
        self._shard_order = np.arange(len(self.shards), dtype=np.int32)
        self._inputs = np.empty((B, T), np.int32)
        self._targets = np.empty((B, T), np.int32)
        self.reset()

    @property
    def batches_per_epoch(self) -> int:
        """Batches that each rank reads before an epoch ends."""
        return sum(self._samples(shard) for shard in self.shards)

    def reset(self) -> None:
        """Begin an epoch. With shuffling this draws new orders, it does not repeat the old ones (llm.c)."""
        self._shard = 0
        if self.shuffle:
            self._rng.permutation(self._shard_order)
        self._open()

    def next(self) -> tuple[np.ndarray, np.ndarray]:
        """The next tokens and targets, int32 (B, T) each; the same two arrays every time, overwritten.

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
        if self.vocab_size is not None:  # the copies, which nobody changes any more; it takes microseconds
            largest = max(x.view(np.uint32).max() for x in (self._inputs, self._targets))  # below 0 is large too
            if largest >= self.vocab_size:
                raise LlmpyError(
                    "data.x",
                    f"{self._shard_here.path} was changed since it was opened: it holds token {largest} now, outside "
                    f"the vocabulary of {self.vocab_size:,} tokens",
                    "Leave the data as they are while they are in use",
                )
        if self._counted is not None:
            self._targets.reshape(-1)[self._counted[start + 1 : start + BT + 1] == 0] = -1
        self._sample += 1
        return self._inputs, self._targets

    @property
    def position(self) -> Position:
        """Where the loader stands; set it to continue from there. What it holds is never changed by reading on.

        Raises LlmpyError (on setting) for a position of other shards or other -B, -T.
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
                "data.x",
                "the saved place in the data does not fit these token shards and this batch size",
                "Continue with the same --data, -B, -T and number of processes",
            )
        self._shard, self._sample = position.shard, position.sample
        self._shard_order[:] = position.shard_order
        self._rng.state = position.rng
        self._take(shard)
        self._sample_order = position.sample_order.astype(np.int32)

    def go_on(self, position: Position, BT: int) -> None:
        """Continue from where a loader of these shards stood whose samples had BT tokens.

        If they have as many here it is `position = position`. Else the open shard is cut anew: first in the order, and
        counted as read, come the samples that begin in one that was read, then the others in the order of the old ones.
        """
        mine = self.B * self.T * self.ranks
        there = position.shard_order.size == len(self.shards) > position.shard >= 0 and position.sample_order.size > 0
        if mine != BT and there:
            samples = self._samples(self.shards[int(position.shard_order[position.shard])])
            place = np.argsort(position.sample_order)  # of each sample in the old order
            when = place[np.minimum(np.arange(samples) * mine // BT, place.size - 1)]
            order, read = np.argsort(when, kind="stable").astype(np.int32), int((when < position.sample).sum())
            position = Position(position.shard, read, position.shard_order, order, position.rng)
        self.position = position

    @property
    def batch(self) -> tuple[str, int]:
        """Which one `next` returned last: the name of its file, and the number of the sample in it."""
        return self._shard_here.path.name, int(self._sample_order[self._sample - 1])

    def _open(self) -> None:
        """Turn to the shard at `_shard`: its first sample, in a new order."""
        shard = self._shard_here
        self._take(shard)
        self._sample = 0
        self._sample_order = np.arange(self._samples(shard), dtype=np.int32)
        if self.shuffle:
            self._rng.permutation(self._sample_order)

    def _take(self, shard: Shard) -> None:
        self._tokens = np.asarray(shard.tokens)  # slices of a plain array cost less than a memmap's
        self._counted = None if shard.counted is None else np.asarray(shard.counted)

    @property
    def _shard_here(self) -> Shard:
        return self.shards[int(self._shard_order[self._shard])]

    def _samples(self, shard: Shard) -> int:
        return (len(shard) - 1) // (self.B * self.T * self.ranks)

    def _check_length(self, shard: Shard) -> None:
        needed = self.B * self.T * self.ranks + 1
        if len(shard) < needed:
            processes = f" of {self.ranks} processes" if self.ranks > 1 else ""
            raise LlmpyError(
                "data.x",
                f"{shard.path} has {len(shard):,} tokens here, one batch{processes} of -B {self.B} "
                f"-T {self.T} needs {needed:,}",
                "Use a smaller -B or -T, or more text",
            )
