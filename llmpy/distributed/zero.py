"""ZeRO-1: every rank computes gradients of its own rows; each parameter has one rank that updates it.

A step     backward, layer by layer           a bucket of layers is done → its gradients travel, while backward goes on
           reduce   each bucket is cut into a part for each rank; rank r gets part r of all others and sums them
           norm     √Σ over the parts of all ranks, when every bucket is reduced
           update   AdamW on the own parts: float32 master weights and moments exist once among all ranks
           gather   each part's new weights to all ranks, as products read them: bfloat16 bits, or float32
           forward of the next step waits for the buckets of a layer when it comes to it

Sums are taken over ranks 0, 1, 2 … in this order, whatever the network does: the same bits on every run.
Source: Rajbhandari et al. 2020 (ZeRO), stage 1.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np

from ..model.gpt2 import GPT2
from ..model.partition import BUCKET, Range, buckets, cut, length, pack, unpack
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
        """As `SingleProcess.gather`."""


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
        self, model: GPT2, courier: Courier, beta1: float, beta2: float, weight_decay: float, clip: float,
        limit: int = BUCKET,
    ) -> None:  # fmt: skip
        """The model must have its weights, the same on all ranks."""
        assert model.grads is not None
        self.model, self.ops, self.courier = model, model.ops, courier
        self.betas, self.decay, self.clip, self.updates = (beta1, beta2), weight_decay, clip, 0
        self.grads, self.params = model.grads.buffer, model.params.buffer
        self.edge = model.matrix_elements
        rank, size = courier.rank, courier.size
        self.buckets = buckets(model.params.table, model.config.layers, limit)
        self.parts = [[b.part(q, size) for q in range(size)] for b in self.buckets]
        ends = [0, *itertools.accumulate(length(parts[rank]) for parts in self.parts)]
        self._at = list(map(slice, ends, ends[1:]))  # the own part of each bucket, in the buffers of parts
        total = ends[-1]
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
        model.before_layer = self._wait_for

    @property
    def owned(self) -> list[Range]:
        """The ranges that this rank answers for, in the order of the buffers."""
        return [r for parts in self.parts for r in parts[self.courier.rank]]

    @property
    def parameters(self) -> int:
        return int(self.params.size)

    def adopt_weights(self) -> None:
        """The master weights := the model's parameters, which were written by anyone else."""
        pack(self.master, self.params, self.owned)
        if self.model.mixed:  # products read the bfloat16 copy, the optimizer its parts: nobody reads these any more
            release(self.params[: self.edge])

    def expect(self) -> None:
        """The backward that comes now is the step's last: send each bucket when its gradients are done."""
        self._reduced, self._next = [], 0
        self.model.after_layer = self._layer_done

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
        total = self.grad[self._at[b]]
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
        self.model.after_layer = None
        for future in self._reduced:
            self.courier.result(future)
        own = 0.0
        for part in (self.grad[at] for at in self._at):
            own += float(self.ops.global_norm(part)) ** 2 if part.size else 0.0
        return math.sqrt(sum(squares for (squares,) in self.courier.gather(own)))

    def update(self, lr: float, norm: float) -> None:
        """Update the own parts, and send the new weights, the embeddings' first, for forward needs them first."""
        scale = min(1.0, self.clip / norm) if self.clip and norm else 1.0
        self.updates += 1
        for b in reversed(range(len(self.buckets))):
            self._update(b, lr, scale)
            self._gathered[b] = self.courier.submit(lambda b=b: self._gather(b))  # type: ignore[misc]

    def _update(self, b: int, lr: float, scale: float) -> None:
        start = time.perf_counter()
        at, (beta1, beta2) = self._at[b], self.betas
        flat = [x[at] for x in (self.master, self.grad, self.m, self.v)]
        matrices = self._matrices(self.parts[b][self.courier.rank])
        stored = None
        if self.model.mixed:
            stored = self._outgoing(b)[: matrices * self.ops.dtype.itemsize].view(self.ops.dtype)
        for part, decay, narrow in ((slice(matrices), self.decay, stored), (slice(matrices, None), 0.0, None)):
            param, grad, m, v = (x[part] for x in flat)
            if param.size:
                self.ops.adamw(param, grad, m, v, lr, beta1, beta2, EPSILON, decay, scale, self.updates, narrow)
        if self.model.mixed:
            vectors = flat[0][matrices:]
            self._outgoing(b)[matrices * self.ops.dtype.itemsize :] = vectors.view(np.uint8)
        self._note(f"update {b}", start)

    def _matrices(self, ranges: Sequence[Range]) -> int:
        """How many elements of a part are of matrices, which come first."""
        return sum(max(0, min(stop, self.edge) - start) for start, stop in ranges)

    def _outgoing(self, b: int) -> np.ndarray:
        """The new weights of the own part as bytes, as they travel."""
        at, size = self._at[b], self.ops.wide.itemsize
        if not self.model.mixed:
            return self.master[at].view(np.uint8)
        return self._stage[at.start * size :][: self._bytes(self.parts[b][self.courier.rank])]

    def _bytes(self, ranges: Sequence[Range]) -> int:
        matrices = self._matrices(ranges)
        return matrices * self.ops.dtype.itemsize + (length(ranges) - matrices) * self.ops.wide.itemsize

    def _gather(self, b: int) -> None:
        """The new weights of bucket b from all ranks, into the model."""
        start = time.perf_counter()
        rank, size, parts = self.courier.rank, self.courier.size, self.parts[b]
        own = self._outgoing(b)
        incoming = [self._arrivals[q][: self._bytes(parts[q])] for q in range(size)]
        self.courier.exchange(b, [own] * size, incoming)
        incoming[rank] = own
        for q in range(size):
            self._deliver(b, q, incoming[q])
        self._note(f"gather {b}", start)

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
            incoming = [self._theirs[q, : length(parts[q]) if rank == 0 else 0] for q in range(size)]
            own = self.master[self._at[b]]
            outgoing = [own[: own.size if q == 0 else 0] for q in range(size)]
            self.courier.exchange(b, outgoing, incoming)
            if rank == 0:
                for q in range(size):
                    unpack(out, parts[q], incoming[q] if q else own)

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
