"""ZeRO-1: every rank computes gradients of its own rows; each parameter is updated by one rank.

backward   layer by layer; a finished bucket of layers is sent while backward continues
reduce     a bucket has one part per rank; rank r receives part r from all others and sums them
norm       √Σ over the parts of all ranks, when every bucket is reduced
update     AdamW on the own parts: float32 master weights and moments exist once among all ranks
gather     each part's new weights to all ranks, as products read them: bfloat16 bits, or float32
forward    of the next step; before each layer it waits for that layer's buckets

Sums run over ranks 0, 1, 2 … in this order, whatever the network does: every run is bitwise identical.
Source: Rajbhandari et al. 2020 (ZeRO), stage 1.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np

from ..model.language_model import LanguageModel
from ..model.partition import BUCKET, Range, buckets, cut, length, pack, unpack
from ..run.checkpoint_writer import Ranks
from ..train.optimizer import EPSILON, AdamW


class Transport(Ranks, Protocol):
    """The ranks, and large messages between them in the background."""

    def exchange(self, tag: int, outgoing: Sequence[Any], incoming: Sequence[Any]) -> None:
        """Send `outgoing[q]` to every other rank q and wait for theirs in `incoming[q]`; own entries are ignored."""

    def submit(self, job: Callable[[], None]) -> Future[None]:
        """Run the job in the background, after all earlier ones."""

    def result(self, future: Future[None]) -> None:
        """Wait for a job. Raises its exception, or Ended."""


def release(x: np.ndarray) -> None:
    """Return the memory of x to the system, on Linux. x then holds zeros and stays writable."""
    if sys.platform == "linux":
        start = -(-x.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (x.ctypes.data + x.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


class Zero(AdamW):
    """AdamW with its state divided among the ranks. The buffers are flat, part after part, buckets in order."""

    def __init__(
        self, model: LanguageModel, ranks: Transport, beta1: float, beta2: float, weight_decay: float, clip: float,
        limit: int = BUCKET,
    ) -> None:  # fmt: skip
        """Allocate the buffers. The model must have its weights, the same on all ranks."""
        assert model.grads is not None
        self.model, self.ops, self.ranks = model, model.ops, ranks
        self.betas, self.decay, self.clip, self.updates = (beta1, beta2), weight_decay, clip, 0
        self.grads, self.params = model.grads.buffer, model.trained.buffer
        self.edge = model.matrix_elements
        rank, size = ranks.rank, ranks.size
        self.buckets = buckets(model.trained.table, model.config.layers, limit)
        self.parts = [[b.part(q, size) for q in range(size)] for b in self.buckets]
        ends = [0, *itertools.accumulate(length(parts[rank]) for parts in self.parts)]
        self._at = list(map(slice, ends, ends[1:]))  # the own part of each bucket, in the buffers of parts
        total = ends[-1]
        empty, wide = self.ops.empty, self.ops.wide
        self.grad, self.m, self.v = (self.ops.zeros(total, wide) for _ in range(3))
        self.master = empty(total, wide)
        self.adopt_weights()
        # Weights as they are sent: bfloat16 bits of matrices, then float32 of vectors, all as bytes.
        self._stage = empty(total * wide.itemsize if model.mixed else 0, np.uint8)
        largest = max(length(part) for parts in self.parts for part in parts)
        self._packed = empty((size, largest), wide)  # a bucket's gradients for each other rank
        self._theirs = empty((size, largest), wide)  # and from each
        self._arrivals = empty((size, largest * wide.itemsize), np.uint8)
        self._reduced: list[Future[None]] = []
        self._next = 0  # the first bucket not yet submitted
        self._gathered: list[Future[None] | None] = [None] * len(self.buckets)
        model.before_layer = self.settle

    @property
    def owned(self) -> list[Range]:
        """Return the ranges of parameters that this rank updates, in the order of the buffers."""
        return [r for parts in self.parts for r in parts[self.ranks.rank]]

    @property
    def parameters(self) -> int:
        return int(self.params.size)

    def adopt_weights(self) -> None:
        """Set the master weights := the model's parameters, after they were written from outside."""
        pack(self.master, self.params, self.owned)
        if self.model.mixed:  # unused from now on: products read the bfloat16 copy, the optimizer its parts
            release(self.params[: self.edge])

    def expect(self) -> None:
        """Send each bucket when its gradients are done: the next backward is the step's last."""
        self._reduced, self._next = [], 0
        self.model.after_layer = self._layer_done

    def _layer_done(self, layer: int) -> None:
        while self._next < len(self.buckets) and self.buckets[self._next].first >= layer:
            b = self._next
            self._reduced.append(self.ranks.submit(lambda b=b: self._reduce(b)))  # type: ignore[misc]
            self._next += 1

    def _reduce(self, b: int) -> None:
        """Set the own part of bucket b := its sum over ranks."""
        rank, size, parts = self.ranks.rank, self.ranks.size, self.parts[b]
        outgoing = [self._message(self.grads, parts[q], self._packed[q]) for q in range(size)]
        count = length(parts[rank])
        incoming = [self._theirs[q, :count] for q in range(size)]
        incoming[rank] = outgoing[rank]
        self.ranks.exchange(b, outgoing, incoming)
        total = self.grad[self._at[b]]
        np.add(incoming[0], incoming[1], out=total)
        for q in range(2, size):
            np.add(total, incoming[q], out=total)

    @staticmethod
    def _message(flat: np.ndarray, ranges: list[Range], room: np.ndarray) -> np.ndarray:
        """Return the ranges as one array: a view of a single range, else a copy in `room`."""
        if len(ranges) == 1:
            return flat[slice(*ranges[0])]
        packed = room[: length(ranges)]
        pack(packed, flat, ranges)
        return packed

    def norm(self) -> float:
        """Wait until all gradients are reduced; return their global norm over all ranks."""
        self.model.after_layer = None
        for future in self._reduced:
            self.ranks.result(future)
        own = 0.0
        for part in (self.grad[at] for at in self._at):
            own += float(self.ops.global_norm(part)) ** 2 if part.size else 0.0
        return math.sqrt(sum(squares for (squares,) in self.ranks.gather(own)))

    def update(self, lr: float, norm: float) -> None:
        """Update the own parts and send the new weights, in the order in which forward needs them."""
        scale = min(1.0, self.clip / norm) if self.clip and norm else 1.0
        self.updates += 1
        for b in reversed(range(len(self.buckets))):
            self._update(b, lr, scale)
            self._gathered[b] = self.ranks.submit(lambda b=b: self._gather(b))  # type: ignore[misc]

    def _update(self, b: int, lr: float, scale: float) -> None:
        at, (beta1, beta2) = self._at[b], self.betas
        flat = [x[at] for x in (self.master, self.grad, self.m, self.v)]
        matrices = self._matrices(self.parts[b][self.ranks.rank])
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

    def _matrices(self, ranges: Sequence[Range]) -> int:
        """Return the number of matrix elements in a part; they come first."""
        return sum(max(0, min(stop, self.edge) - start) for start, stop in ranges)

    def _outgoing(self, b: int) -> np.ndarray:
        """Return the new weights of the own part as the bytes to send."""
        at, size = self._at[b], self.ops.wide.itemsize
        if not self.model.mixed:
            return self.master[at].view(np.uint8)
        return self._stage[at.start * size :][: self._bytes(self.parts[b][self.ranks.rank])]

    def _bytes(self, ranges: Sequence[Range]) -> int:
        matrices = self._matrices(ranges)
        return matrices * self.ops.dtype.itemsize + (length(ranges) - matrices) * self.ops.wide.itemsize

    def _gather(self, b: int) -> None:
        """Receive the new weights of bucket b from all ranks into the model."""
        rank, size, parts = self.ranks.rank, self.ranks.size, self.parts[b]
        own = self._outgoing(b)
        incoming = [self._arrivals[q][: self._bytes(parts[q])] for q in range(size)]
        self.ranks.exchange(b, [own] * size, incoming)
        incoming[rank] = own
        for ranges, message in zip(parts, incoming, strict=True):
            edge = self._matrices(ranges)
            border = edge * self.ops.dtype.itemsize
            unpack(self.model.stored.buffer, cut(ranges, 0, edge), message[:border].view(self.ops.dtype))
            vectors = np.frombuffer(message[border:].tobytes(), self.ops.wide)
            unpack(self.params, cut(ranges, edge, length(ranges)), vectors)

    def weights(self, room: np.ndarray) -> np.ndarray:
        """Collect all master weights, flat, in `room` of the first rank, and return `room`. All ranks must call it."""
        self.settle()
        rank, size = self.ranks.rank, self.ranks.size
        for b, parts in enumerate(self.parts):
            incoming = [self._theirs[q, : length(parts[q]) if rank == 0 else 0] for q in range(size)]
            own = self.master[self._at[b]]
            outgoing = [own[: own.size if q == 0 else 0] for q in range(size)]
            self.ranks.exchange(b, outgoing, incoming)
            if rank == 0:
                for q in range(size):
                    unpack(room, parts[q], incoming[q] if q else own)
        return room

    def settle(self, layer: int | None = None) -> None:
        """Wait for the new weights of a layer (-1: the embeddings), or of all layers."""
        for b, bucket in enumerate(self.buckets):
            future = self._gathered[b]
            if future is not None and (layer is None or bucket.first <= layer <= bucket.last):
                self.ranks.result(future)
                self._gathered[b] = None
