"""Checkpoints in the background: training waits for a copy of its state, and a thread writes it to the disk.

due → copy (its time is memory's) → the thread: files, sync → commit: manifest, rename, remove older checkpoints
            a failed write: a warning, what was there stays, and the next interval tries again

Every rank writes its part (see parts.py), the first one also the model, and commits when all have succeeded. One
process is rank 0 of 1: its `world` answers at once, so its thread commits too. All ranks call all methods together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import numpy as np

from ..data.loader import Position
from ..errors import LlmpyError
from ..model.arena import all_finite
from ..model.gpt2 import GPT2
from ..model.partition import length
from ..system import durable
from ..system.command import command
from . import checkpoint, parts
from .checkpoint import Score
from .folder import BEST_FILE, CHECKPOINTS, MODEL_FILE, START_FILE
from .journal import Journal
from .parts import Moments


class Ranks(Protocol):
    """The processes that train together."""

    rank: int
    size: int

    def gather(self, *numbers: float) -> Sequence[tuple[float, ...]]:
        """The numbers of every rank, by rank."""

    def gather_values(self, value: Any) -> list[Any]:
        """The JSON value of every rank, by rank."""


class CheckpointWriter:
    """Writes the checkpoints of one run, and its best model."""

    def __init__(
        self, world: Ranks, run: Path, model: GPT2, optimizer: Moments, trained_length: int, journal: Journal,
        every: int, keep: int,
    ) -> None:  # fmt: skip
        """`every` 0: a checkpoint at the end only; one process then writes it without a copy."""
        self.world, self.run, self.folder = world, run, run / CHECKPOINTS
        self.model, self.optimizer, self.trained_length, self.journal = model, optimizer, trained_length, journal
        self.every, self.keep = every, keep
        self.last: int | None = None  # step of the newest checkpoint that is whole
        self._next: int | None = None  # step from which one is due
        self._thread: Thread | None = None
        self._step, self._state = 0, dict[str, Any]()  # of the checkpoint that is being written
        self._written: dict[str, Any] = {}  # what the manifest says of this rank's files
        self._error = ""  # why that one could not be written, on whichever rank
        copied = world.rank == 0 and (every > 0 or world.size > 1)
        self._weights = page_aligned(model.params.size if copied else 0)
        self._moments = page_aligned(2 * length(optimizer.owned) if every else 0)
        for room in (self._weights, self._moments):
            room.fill(0)  # its pages are there before the first checkpoint has to wait for them

    def restore(self, path: Path, manifest: dict[str, Any], seed: int) -> Position:
        """Parameters and moments := a checkpoint's; returns the position in the data. `seed` is the shuffling's."""
        checkpoint.load_parameters(path / MODEL_FILE, self.model.params)
        self.model.store_weights()
        self.optimizer.adopt_weights()
        found, optimizer = parts.read_parts(path, manifest), self.optimizer
        parts.load_moments(found, optimizer.owned, optimizer.m, optimizer.v)
        return parts.position_for(found, self.world.rank, self.world.size, seed)

    def begin(self, step: int) -> None:
        """Start or resume the run after `step`; checkpoints are due at multiples of `every`."""
        self._next = (step // self.every + 1) * self.every if self.every else None

    def adopt(self, path: Path, step: int) -> None:
        """Publish the model of the checkpoint that the run resumes from, if the run was killed before that."""
        self.last = step
        if self.world.rank == 0:
            try:
                self._publish(path)
            except OSError as error:
                self.journal.log(f"warning: cannot write {self.run / MODEL_FILE}: {_why(error)}")

    def due(self, step: int) -> bool:
        """Return whether to call `save` now: a checkpoint is due, and the one before is written."""
        if self._next is None or (self._thread is None and step < self._next):
            return False
        self.settle(wait=False)
        return step >= self._next and self._thread is None

    def save(self, step: int, state: dict[str, Any], position: Position) -> None:
        """Copy what training changes and let a thread write it. `due` must have returned True."""
        self.begin(step)
        weights, moments = self._snapshot()
        if self.world.rank == 0 and weights is not self._weights:
            self._weights[...] = weights
        half = self._moments.size // 2
        self._moments[:half], self._moments[half:] = moments
        if self._prepare(step, state):
            arguments = self._weights, [self._moments], position
            self._thread = Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._report()

    def finish(self, step: int, state: dict[str, Any], position: Position) -> None:
        """Write the last checkpoint, unless it is there. Raises LlmpyError, which says what is kept, if that fails."""
        self.settle()
        if self.last != step:
            weights, moments = self._snapshot()
            if self._prepare(step, state):
                self._write(weights, moments, position)
                if self.world.size > 1:
                    self._commit()
            if self._error:
                kept = f"the checkpoint of step {self.last} is kept" if self.last else "no earlier checkpoint exists"
                what = f"the checkpoint of step {step} could not be written: {self._error}; {kept}"
                raise LlmpyError(
                    "run.x", what, f"Free some space, then resume with: {command('train', '--resume', self.run)}"
                )
        if self.world.rank == 0:
            (self.run / START_FILE).unlink(missing_ok=True)  # from here on checkpoints say what the run resumes from

    def close(self) -> None:
        """Wait for this rank's thread, whether or not the other ranks still answer."""
        if self.world.size == 1:
            self.settle()
        elif self._thread is not None:
            self._thread.join()

    def best(self) -> Score | None:
        """Return the score of the model that `keep_best` kept last, in this process or an earlier one."""
        try:
            return checkpoint.read_header(self.run / BEST_FILE).score
        except LlmpyError:  # missing or corrupt
            return None

    def keep_best(self, score: Score) -> None:
        """Keep the model next to the run's if no earlier one had a smaller loss on the same text."""
        # The file is its own record: what it says of itself is true even where the run resumed from before it.
        before = self.best()
        improves = before is None or score.val_loss < before.val_loss
        if before is not None and before.measured_on != score.measured_on:
            replaced = f"the best model so far, of step {before.step}, is replaced"
            self.journal.log(f"validation now takes {score.measured_on}: {replaced}")
            improves = True
        if not self.world.gather_values(improves)[0]:  # by the first rank, which writes the file
            return
        if self.world.size > 1:
            self.settle()  # the thread reads what is gathered
        weights = self.optimizer.weights(self._weights)
        if self.world.rank == 0:
            try:
                checkpoint.write_model(self.run / BEST_FILE, self.model.config, self.trained_length, weights, score)
            except LlmpyError as error:
                self.journal.log(f"warning: the best model so far is not kept: {error.message}")

    def finite(self) -> bool:
        """Return whether parameters and moments are, by their norms, which cost a tenth of a search."""
        flat = (x for x in (self.optimizer.master, self.optimizer.m, self.optimizer.v) if x.size)
        norm, host = self.model.ops.global_norm, self.model.ops.to_host
        # A norm may overflow where no number is infinite.
        fine = all(np.isfinite(float(norm(x))) or all_finite(host(x)) for x in flat)
        return all(here for (here,) in self.world.gather(fine))

    def _snapshot(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """The weights, on the first rank, and m and v of this rank's part: views where that is possible."""
        optimizer, host = self.optimizer, self.model.ops.to_host
        return optimizer.weights(self._weights), [host(optimizer.m), host(optimizer.v)]

    def _prepare(self, step: int, state: dict[str, Any]) -> bool:
        """Make the folder to write into; return whether that succeeded."""
        self._step, self._state, self._written, self._error = step, state, {}, ""
        if self.world.rank == 0:
            try:
                checkpoint.make_room_for(self.folder, step)
            except OSError as error:
                self._error = _why(error)
        self._error = str(self.world.gather_values(self._error)[0])
        return not self._error

    def _write(self, weights: np.ndarray, moments: list[np.ndarray], position: Position) -> None:
        """Write this rank's files; a single rank commits them too."""
        rank, size, config = self.world.rank, self.world.size, self.model.config
        files = {parts.part_name(rank, size): parts.part_pieces(self.optimizer.owned, moments, position)}
        if rank == 0:
            files[MODEL_FILE] = checkpoint.model_pieces(config, self.trained_length, weights)
        try:
            self._written = checkpoint.write_files(checkpoint.being_made(self.folder, self._step), files)
        except (OSError, MemoryError) as error:
            self._error = _why(error)
        if size == 1:  # several agree in `settle` or `finish`, on the thread that talks to the others
            self._commit()

    def _commit(self) -> None:
        """Make all parts a checkpoint, the run's model a second name of its model; older checkpoints go."""
        told = self.world.gather_values([self._error, self._written])
        several = self.world.size > 1
        errors = [f"{error} (rank {rank})" if several else error for rank, (error, _) in enumerate(told) if error]
        error = "".join(errors[:1])
        if self.world.rank == 0 and not error:
            try:
                with contextlib.suppress(OSError):  # a log that is lost, with a warning, must not cost the model
                    self.journal.sync()
                files = {name: about for _, written in told for name, about in written.items()}
                state = {**self._state, "ranks": self.world.size}
                self._publish(checkpoint.commit(self.folder, self._step, state, files))
                checkpoint.prune(self.folder, self.keep)
            except OSError as refused:
                error = _why(refused)
        if self.world.rank == 0 and error:
            with contextlib.suppress(OSError):
                durable.remove(checkpoint.being_made(self.folder, self._step))
        self._error = str(self.world.gather_values(error)[0])
        if not self._error:
            self.last = self._step

    def settle(self, wait: bool = True) -> None:
        """If the threads of all ranks have ended, their parts become a checkpoint, or there is a warning."""
        if self._thread is None:
            return
        if wait:
            self._thread.join()
        if any(alive for (alive,) in self.world.gather(self._thread.is_alive())):
            return
        self._thread.join()
        self._thread = None
        if self.world.size > 1:
            self._commit()
        self._report()

    def _report(self) -> None:
        if self._error:
            kept = "none exists yet" if self.last is None else f"that of step {self.last} is kept"
            self.journal.log(f"warning: cannot write a checkpoint: {self._error}; {kept}; training continues")

    def _publish(self, written: Path) -> None:
        """The checkpoint's model becomes the run's."""
        temporary = self.run / f".{MODEL_FILE}.0.tmp"
        durable.remove(temporary)
        durable.link(written / MODEL_FILE, temporary)
        durable.replace(temporary, self.run / MODEL_FILE)
        durable.sync_folder(self.run)


def _why(error: Exception) -> str:
    return getattr(error, "strerror", "") or str(error) or "out of memory"


def page_aligned(count: int) -> np.ndarray:
    """float32 (count,), uninitialised, that begins on a page, so that it goes to the disk directly."""
    raw = np.empty(4 * count + durable.PAGE, np.uint8)
    start = -raw.ctypes.data % durable.PAGE
    return raw[start : start + 4 * count].view(np.float32)
