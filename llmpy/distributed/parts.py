"""Checkpoints of several ranks: each writes its part of the moments, the first also the model, and then the manifest.

RUN/checkpoints/step-00000250/
    model.safetensors                      as of one process
    state-00002-of-00004.safetensors       m and v of the ranges of the flat arenas that rank 2 answers for, and its
                                           place in the data
    manifest.json                          as of one process; "ranks": 4

Any number of ranks goes on from it, one too: each reads the ranges it needs, from whatever files hold them.
"""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from ..data.loader import Position
from ..errors import LlmpyError
from ..model.gpt2 import GPT2
from ..model.partition import length
from ..run import checkpoint
from ..run.checkpoint import MODEL
from ..run.checkpoint_writer import CheckpointWriter, check_shape, page_aligned
from ..run.journal import Journal
from ..run.place import place_of, places
from ..system import durable
from ..system.command import command
from .zero import Zero


class PartWriter(CheckpointWriter):
    """Writes the checkpoints of a run of several ranks. Whatever is not about this rank's thread, all ranks call."""

    optimizer: Zero

    def __init__(
        self, world: Any, run: Path, model: GPT2, optimizer: Zero, trained_length: int, journal: Journal, every: int,
        keep: int, keep_every: int,
    ) -> None:  # fmt: skip
        super().__init__(run, model, optimizer, trained_length, journal, 0, keep, keep_every)
        self.world, self.every = world, every
        own = length(optimizer.owned)
        # What the thread writes: copies, for training goes on meanwhile.
        self._moments = page_aligned(2 * own)
        self._params = page_aligned(model.params.size if world.rank == 0 else 0)
        for x in (self._moments, self._params):
            x.fill(0)
        self._step = 0
        self._state: dict[str, Any] = {}
        self._written: dict[str, Any] = {}

    def adopt(self, path: Path, step: int) -> None:
        self.last = step
        if self.world.rank == 0:
            super().adopt(path, step)

    def restore(self, path: Path, manifest: dict[str, Any], seed: int) -> Position:
        check_shape(path, self.model)
        checkpoint.load_parameters(path / MODEL, self.model.params)
        self.model.store_weights()
        optimizer = self.optimizer
        optimizer.adopt_weights()
        parts = [(ranges, optimizer.m[at], optimizer.v[at]) for ranges, at in optimizer.kept_ranges()]
        checkpoint.load_moments(path, manifest, parts)
        return place_of(path, manifest, self.world.rank, self.world.size, seed)

    def due(self, step: int) -> bool:
        if self._next is None or (self._thread is None and step < self._next):
            return False
        self._settle()
        return step >= self._next and self._thread is None

    def save(self, step: int, state: dict[str, Any], position: Position) -> None:
        self._tried, self._next = step, (step // self.every + 1) * self.every if self.every else None
        if fault := self._prepare(step, state):
            self._tried_with(fault)
            return
        self._thread = Thread(target=self._write_part, args=(position,), name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self, step: int, state: dict[str, Any], position: Position) -> None:
        self._settle(wait=True)
        if self.last == step:
            return
        fault = self._prepare(step, state)
        if not fault:
            self._write_part(position)
            fault = self._conclude()
        if fault:
            kept = f"the checkpoint of step {self.last} is kept" if self.last else "no earlier checkpoint exists"
            raise LlmpyError(
                f"the checkpoint of step {step} could not be written: {fault}; {kept}",
                f"make room, then go on with: {command('train', '--resume', self.run)}",
            )

    def keep_best(self, score: checkpoint.Score) -> None:
        if not self.world.tell(self._improves(score))[0]:  # the first rank's word: it wrote the file
            return
        self._settle(wait=True)  # the thread reads what is collected
        self.optimizer.collect(self._params)
        if self.world.rank == 0:
            self._keep(score, self._params)

    def settle(self) -> None:
        self._settle(wait=True)

    def close(self) -> None:
        """Wait for the own thread. What it wrote counts if all ranks come to `due`, `settle` or `finish` afterwards."""
        if self._thread is not None:
            self._thread.join()

    def _prepare(self, step: int, state: dict[str, Any]) -> str:
        """Copies of what changes, and the folder to write into; what is wrong, if anything is."""
        self._step, self._state, self._written, self._fault = step, state, {}, None
        optimizer = self.optimizer
        own = self._moments.size // 2
        self._moments[:own] = optimizer.mine(optimizer.m)
        self._moments[own:] = optimizer.mine(optimizer.v)
        optimizer.collect(self._params)
        fault = ""
        if self.world.rank == 0:
            try:
                checkpoint.make_room_for(self.folder, step)
            except OSError as refused:
                fault = refused.strerror or str(refused)
        return str(self.world.tell(fault)[0])

    def _write_part(self, position: Position) -> None:
        """This rank's files, without their place in the run."""
        rank, size, config = self.world.rank, self.world.size, self.model.config
        ranges = np.asarray(self.optimizer.owned, np.int64).reshape(-1, 2)
        others = {"ranges": ranges, **places(position)}
        own = self._moments.size // 2
        pieces = [self._moments[:own], self._moments[own:]]
        files = {checkpoint.shard_name(rank, size): checkpoint.shard_pieces(pieces, others)}
        if rank == 0:
            files[MODEL] = checkpoint.model_pieces(config, self.trained_length, self._params)
        try:
            self._written = checkpoint.write_files(checkpoint.being_made(self.folder, self._step), files)
        except (OSError, MemoryError) as fault:
            self._fault = fault if isinstance(fault, OSError) else OSError(errno.ENOMEM, "out of memory")

    def _settle(self, wait: bool = False) -> None:
        """Where the threads of all ranks have ended: their parts become a checkpoint, or there is a warning."""
        if self._thread is None:
            return
        if wait:
            self._thread.join()
        if any(alive for (alive,) in self.world.gather(self._thread.is_alive())):
            return
        self._thread.join()
        self._thread = None
        self._tried_with(self._conclude())

    def _conclude(self) -> str:
        """Every rank has written or failed: the first one commits. Returns what went wrong on whichever, or ""."""
        said = self._fault.strerror or str(self._fault) if self._fault else ""
        told = self.world.tell({"fault": said, "files": self._written})
        fault = next((f"{t['fault']} (rank {rank})" for rank, t in enumerate(told) if t["fault"]), "")
        if self.world.rank == 0:
            try:
                if fault:
                    durable.remove(checkpoint.being_made(self.folder, self._step))
                else:
                    with contextlib.suppress(OSError):
                        self.journal.sync()
                    files = {name: about for t in told for name, about in t["files"].items()}
                    state = {**self._state, "ranks": self.world.size}
                    self._publish(checkpoint.commit(self.folder, self._step, state, files))
                    checkpoint.prune(self.folder, self.keep, self.keep_every)
            except OSError as refused:
                fault = fault or refused.strerror or str(refused)
        fault = str(self.world.tell(fault)[0])
        if not fault:
            self.last = self._step
        return fault

    def finite(self) -> bool:
        optimizer, norm = self.optimizer, self.model.ops.global_norm
        fine = all(np.isfinite(float(norm(x))) for x in (optimizer.master, optimizer.m, optimizer.v) if x.size)
        return all(here for (here,) in self.world.gather(fine))
