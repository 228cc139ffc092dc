"""ZeRO-1: every rank computes gradients of its own rows; each parameter has one rank that updates it.

A step     backward, layer by layer           a bucket of layers is done → its gradients travel, while backward goes on
           reduce   each bucket is cut into a part for each rank; rank r gets part r of all others and sums them
           norm     √Σ over the parts of all ranks, when every bucket is reduced
           update   AdamW on the own parts: float32 master weights and moments exist once among all ranks
           gather   each part's new weights to all ranks, as products read them: bfloat16 bits, or float32
           forward of the next step waits for the buckets of a layer when it comes to it

Sums are taken over ranks 0, 1, 2 … in this order, whatever the network does: the same bits on every run. Sums, norm and
update are those of `zero` False, where every rank gathers the reduced gradients and updates everything, to the bit.
Source: Rajbhandari et al. 2020 (ZeRO), stage 1.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np

from ..model.gpt2 import GPT2
from ..model.partition import BUCKET, Range, buckets, cut, length
from ..train.optimizer import EPSILON, AdamW


class Courier(Protocol):
    """Who carries messages between the ranks, in the background."""

    rank: int
    size: int

    def exchange(self, tag: int, outgoing: Sequence[Any], incoming: Sequence[Any]) -> None:
        """Send `outgoing[q]` to every other rank q and wait for theirs in `incoming[q]`; own entries do not count."""

    def submit(self, job: Callable[[], None]) -> Future[None]:
        """Run the job in the background, after all earlier ones."""

    def result(self, future: Future[None]) -> None:
        """Wait for a job. Raises what it raised, or what ended the world."""

    def gather(self, *numbers: float) -> list[tuple[float, ...]]:
        """As `Alone.gather`."""


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


def release(x: np.ndarray) -> None:
    """Give the memory of x back to the system, where there is such a thing; it then holds zeros, and may be written."""
    if sys.platform == "linux":
        start = -(-x.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (x.ctypes.data + x.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


class Zero(AdamW):
    """AdamW whose state is divided among the ranks. The buffers are flat, part after part, buckets in order."""

    def __init__(
        self, model: GPT2, courier: Courier, beta1: float, beta2: float, weight_decay: float, clip: float, zero: bool,
        limit: int = BUCKET,
    ) -> None:  # fmt: skip
        """`zero` False: every rank keeps all parts. The model must have its weights, the same on all ranks."""
        assert model.grads is not None
        self.model, self.ops, self.courier, self.zero = model, model.ops, courier, zero
        self.betas, self.decay, self.clip, self.updates = (beta1, beta2), weight_decay, clip, 0
        self.grads, self.params = model.grads.buffer, model.params.buffer
        self.edge = model.matrix_elements
        rank, size = courier.rank, courier.size
        self.buckets = buckets(model.params.table, model.config.layers, limit)
        self.parts = [[b.part(q, size) for q in range(size)] for b in self.buckets]
        self.kept = [rank] if zero else list(range(size))  # whose parts this rank updates
        self._at: dict[tuple[int, int], slice] = {}
        total = 0
        for b, parts in enumerate(self.parts):
            for q in self.kept:
                count = length(parts[q])
                self._at[b, q] = slice(total, total + count)
                total += count
        empty, wide = self.ops.empty, self.ops.wide
        self.grad, self.m, self.v = (self.ops.zeros(total, wide) for _ in range(3))
        self.master = empty(total, wide)
        self.adopt_weights()
        # Weights as they travel: bfloat16 bits of matrices, then float32 of vectors, all as bytes.
        self._stage = empty(total * wide.itemsize if model.mixed else 0, np.uint8)
        largest = max(length(part) for parts in self.parts for part in parts)
        self._packed = empty((size, largest), wide)  # a bucket's gradients for the others
        self._theirs = empty((size, largest), wide)  # and what came from them
        self._arrivals = empty((size, largest * wide.itemsize), np.uint8)
        self._reduced: list[Future[None]] = []
        self._next = 0  # the first bucket that is not on its way
        self._gathered: list[Future[None] | None] = [None] * len(self.buckets)
        self.log: list[tuple[str, float, float]] | None = None  # what was done from when to when, for a picture
        model.needs = self._wait_for

    @property
    def owned(self) -> list[Range]:
        """The ranges that this rank answers for, in the order of `mine`."""
        return [r for parts in self.parts for r in parts[self.courier.rank]]

    def mine(self, x: np.ndarray) -> np.ndarray:
        """Of a buffer of parts, those that this rank answers for."""
        if self.zero:
            return x
        rank = self.courier.rank
        return np.concatenate([x[self._at[b, rank]] for b in range(len(self.buckets))])

    def kept_ranges(self) -> list[tuple[list[Range], slice]]:
        """Every part that is kept: where it lies in the flat arenas, and in the buffers of parts."""
        return [(self.parts[b][q], at) for (b, q), at in self._at.items()]

    @property
    def parameters(self) -> int:
        return int(self.params.size)

    def set_moments(self, m: np.ndarray, v: np.ndarray) -> None:
        for ranges, at in self.kept_ranges():
            pack(self.m[at], m, ranges)
            pack(self.v[at], v, ranges)

    def adopt_weights(self) -> None:
        """The master weights := the model's parameters, which were written by anyone else."""
        for ranges, at in self.kept_ranges():
            pack(self.master[at], self.params, ranges)
        if self.model.mixed:  # products read the bfloat16 copy, the optimizer its parts: nobody reads these any more
            release(self.params[: self.edge])

    def expect(self) -> None:
        """The backward that comes now is the step's last: send each bucket when its gradients are done."""
        self._reduced, self._next = [], 0
        self.model.done = self._layer_done

    def _layer_done(self, layer: int) -> None:
        while self._next < len(self.buckets) and self.buckets[self._next].first >= layer:
            b = self._next
            self._reduced.append(self.courier.submit(lambda b=b: self._reduce(b)))  # type: ignore[misc]
            self._next += 1

    def _reduce(self, b: int) -> None:
        """The own part of bucket b := its sum over ranks."""
        start = time.perf_counter()
        rank, size, parts = self.courier.rank, self.courier.size, self.parts[b]
        outgoing = [self._message(self.grads, parts[q], self._packed[q]) for q in range(size)]
        count = length(parts[rank])
        incoming = [self._theirs[q, :count] for q in range(size)]
        incoming[rank] = outgoing[rank]
        self.courier.exchange(b, outgoing, incoming)
        total = self.grad[self._at[b, rank]]
        np.add(incoming[0], incoming[1], out=total)
        for q in range(2, size):
            np.add(total, incoming[q], out=total)
        self._note(f"reduce {b}", start)

    @staticmethod
    def _message(flat: np.ndarray, ranges: list[Range], room: np.ndarray) -> np.ndarray:
        """The ranges as one array: where they lie, if that is one stretch, else a copy in `room`."""
        if len(ranges) == 1:
            return flat[slice(*ranges[0])]
        packed = room[: length(ranges)]
        pack(packed, flat, ranges)
        return packed

    def norm(self) -> float:
        """The global norm over all ranks, when all gradients are reduced."""
        self.model.done = None
        for future in self._reduced:
            self.courier.result(future)
        rank, own = self.courier.rank, 0.0
        for b in range(len(self.buckets)):
            part = self.grad[self._at[b, rank]]
            own += float(self.ops.global_norm(part)) ** 2 if part.size else 0.0
        return math.sqrt(sum(squares for (squares,) in self.courier.gather(own)))

    def update(self, lr: float, norm: float) -> None:
        """Update the kept parts, and send the new weights, the embeddings' first, for forward needs them first."""
        scale = min(1.0, self.clip / norm) if self.clip and norm else 1.0
        self.updates += 1
        order = list(reversed(range(len(self.buckets))))
        if not self.zero:  # all gradients everywhere first, then all that follows is local
            for future in [self.courier.submit(lambda b=b: self._gather_gradients(b)) for b in order]:  # type: ignore[misc]
                self.courier.result(future)
        for b in order:
            for q in self.kept:
                self._update(b, q, lr, scale)
            if self.zero:
                self._gathered[b] = self.courier.submit(lambda b=b: self._gather(b))  # type: ignore[misc]
            else:
                for q in self.kept:
                    self._deliver(b, q, self._outgoing(b, q))

    def _update(self, b: int, q: int, lr: float, scale: float) -> None:
        start = time.perf_counter()
        at, (beta1, beta2) = self._at[b, q], self.betas
        flat = [x[at] for x in (self.master, self.grad, self.m, self.v)]
        matrices = self._matrices(self.parts[b][q])
        stored = None
        if self.model.mixed:
            stored = self._outgoing(b, q)[: matrices * self.ops.dtype.itemsize].view(self.ops.dtype)
        for part, decay, narrow in ((slice(matrices), self.decay, stored), (slice(matrices, None), 0.0, None)):
            param, grad, m, v = (x[part] for x in flat)
            if param.size:
                self.ops.adamw(param, grad, m, v, lr, beta1, beta2, EPSILON, decay, scale, self.updates, narrow)
        if self.model.mixed:
            vectors = flat[0][matrices:]
            self._outgoing(b, q)[matrices * self.ops.dtype.itemsize :] = vectors.view(np.uint8)
        self._note(f"update {b}", start)

    def _matrices(self, ranges: Sequence[Range]) -> int:
        """How many elements of a part are of matrices, which come first."""
        return sum(max(0, min(stop, self.edge) - start) for start, stop in ranges)

    def _outgoing(self, b: int, q: int) -> np.ndarray:
        """The new weights of a part as bytes, as they travel."""
        at, size = self._at[b, q], self.ops.wide.itemsize
        if not self.model.mixed:
            return self.master[at].view(np.uint8)
        return self._stage[at.start * size :][: self._bytes(self.parts[b][q])]

    def _bytes(self, ranges: Sequence[Range]) -> int:
        matrices = self._matrices(ranges)
        return matrices * self.ops.dtype.itemsize + (length(ranges) - matrices) * self.ops.wide.itemsize

    def _gather(self, b: int) -> None:
        """The new weights of bucket b from all ranks, into the model."""
        start = time.perf_counter()
        rank, size, parts = self.courier.rank, self.courier.size, self.parts[b]
        own = self._outgoing(b, rank)
        incoming = [self._arrivals[q][: self._bytes(parts[q])] for q in range(size)]
        self.courier.exchange(b, [own] * size, incoming)
        incoming[rank] = own
        for q in range(size):
            self._deliver(b, q, incoming[q])
        self._note(f"gather {b}", start)

    def _gather_gradients(self, b: int) -> None:
        """The reduced gradients of bucket b from all ranks, into the buffer of parts."""
        rank, size = self.courier.rank, self.courier.size
        incoming = [self.grad[self._at[b, q]] for q in range(size)]
        self.courier.exchange(b, [incoming[rank]] * size, incoming)

    def _deliver(self, b: int, q: int, message: np.ndarray) -> None:
        """Weights of part q, as they travel, to where the model reads them."""
        ranges = self.parts[b][q]
        if not self.model.mixed:
            unpack(self.params, ranges, message.view(self.ops.wide))
            return
        edge = self._matrices(ranges)
        matrices = cut(ranges, 0, edge)
        unpack(self.model.weights.buffer, matrices, message[: edge * self.ops.dtype.itemsize].view(self.ops.dtype))
        vectors = np.frombuffer(message[edge * self.ops.dtype.itemsize :].tobytes(), self.ops.wide)
        unpack(self.params, cut(ranges, edge, length(ranges)), vectors)

    def weights(self, room: np.ndarray) -> np.ndarray:
        self.collect(room)
        return room

    def collect(self, out: np.ndarray) -> None:
        """On the first rank: out, flat, := all master weights. Every rank calls it, between steps."""
        self.settle()
        rank, size = self.courier.rank, self.courier.size
        for b, parts in enumerate(self.parts):
            incoming = [self._theirs[q, : length(parts[q]) if rank == 0 and self.zero else 0] for q in range(size)]
            own = self.master[self._at[b, rank]]
            outgoing = [own[: own.size if q == 0 and self.zero else 0] for q in range(size)]
            self.courier.exchange(b, outgoing, incoming)
            if rank == 0:
                for q in range(size):
                    here = (b, q) in self._at
                    unpack(out, parts[q], self.master[self._at[b, q]] if here else incoming[q])

    def _wait_for(self, layer: int) -> None:
        """The weights of a layer, or of the embeddings, are there when this returns."""
        for b, future in enumerate(self._gathered):
            if future is not None and self.buckets[b].first <= layer <= self.buckets[b].last:
                self.courier.result(future)
                self._gathered[b] = None

    def settle(self) -> None:
        """All weights are there when this returns."""
        for b, future in enumerate(self._gathered):
            if future is not None:
                self.courier.result(future)
                self._gathered[b] = None

    def _note(self, what: str, start: float) -> None:
        if self.log is not None:
            self.log.append((what, start, time.perf_counter()))
