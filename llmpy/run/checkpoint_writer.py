"""Background checkpoints: training waits only for a copy of its state, which a thread writes to disk.

due → copy (memory-bound) → thread: write files, sync → commit: manifest, rename → publish the model, prune

A failed write causes a warning and is tried again at the next interval. Every rank writes its part (see parts.py),
rank 0 also the model, and commits when all have succeeded. All methods are collective.
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
from ..model.language_model import LanguageModel
from ..model.partition import length
from ..system import durable
from ..system.command import command
from ..system.thread_limit import few
from . import checkpoint, parts
from .checkpoint import Score
from .folder import BEST_FILE, CHECKPOINTS, MODEL_FILE, START_FILE
from .journal import Journal
from .parts import Moments


class Ranks(Protocol):
    """The ranks that train together."""

    rank: int
    size: int

    def gather(self, *numbers: float) -> Sequence[tuple[float, ...]]:
        """Return the numbers of every rank, by rank."""

    def gather_values(self, value: Any) -> list[Any]:
        """Return the JSON value of every rank, by rank."""


class CheckpointWriter:
    """Writes the checkpoints of one run, and its best model."""

    def __init__(
        self, world: Ranks, run: Path, model: LanguageModel, optimizer: Moments, trained_length: int, journal: Journal,
        every: int, keep: int,
    ) -> None:  # fmt: skip
        """`every` 0: only a final checkpoint, which a single process writes without a copy."""
        self.world, self.run, self.folder = world, run, run / CHECKPOINTS
        self.model, self.optimizer, self.trained_length, self.journal = model, optimizer, trained_length, journal
        self.every, self.keep = every, keep
        self.last: int | None = None  # step of the latest complete checkpoint
        self._next: int | None = None  # first step at which one is due
        self._thread: Thread | None = None
        self._step, self._state = 0, dict[str, Any]()  # of the checkpoint being written
        self._written: dict[str, Any] = {}  # manifest entries of this rank's files
        self._error = ""  # why it was not written, on any rank
        self._unpublished = ""  # why the latest one is not the run's model, or older ones remain
        copied = world.rank == 0 and (every > 0 or world.size > 1)
        self._weights = page_aligned(model.trained.size if copied else 0)
        self._moments = page_aligned(2 * length(optimizer.owned) if every else 0)
        for room in (self._weights, self._moments):
            room.fill(0)  # touch the pages now, not during the first checkpoint

    def restore(self, path: Path, manifest: dict[str, Any], seed: int) -> Position:
        """Parameters and moments := a checkpoint's; return the data position. `seed` shuffles the data."""
        checkpoint.load_parameters(path / MODEL_FILE, self.model.trained)
        self.model.store_weights()
        self.optimizer.adopt_weights()
        found, optimizer = parts.read_parts(path, manifest), self.optimizer
        parts.load_moments(found, optimizer.owned, optimizer.m, optimizer.v)
        return parts.position_for(found, self.world.rank, self.world.size, seed)

    def begin(self, step: int) -> None:
        """Schedule the next checkpoint: the first multiple of `every` after `step`."""
        self._next = (step // self.every + 1) * self.every if self.every else None

    def adopt(self, path: Path, step: int) -> None:
        """Publish the model of the checkpoint to resume from: the run may have been killed before it did."""
        self.last = step
        if self.world.rank == 0:
            try:
                self._publish(path)
            except OSError as error:
                self.journal.log(f"warning: cannot write {self.run / MODEL_FILE}: {_why(error)}")

    def due(self, step: int) -> bool:
        """Return whether to call `save` now: a checkpoint is due and the previous one is written."""
        if self._next is None or (self._thread is None and step < self._next):
            return False
        self.settle(wait=False)
        return step >= self._next and self._thread is None

    def save(self, step: int, state: dict[str, Any], position: Position) -> None:
        """Copy the training state and start a thread that writes it. `due` must have returned True."""
        self.begin(step)
        weights, moments = self._snapshot()
        if self.world.rank == 0 and weights is not self._weights:
            self._weights[...] = weights
        half = self._moments.size // 2
        self._moments[:half], self._moments[half:] = moments
        if self._prepare(step, state):
            arguments = self._weights, [self._moments], position
            if self.world.size > 1 or not few():
                self._thread = Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
                self._thread.start()
                return
            self._write(*arguments)
        self._report()

    def finish(self, step: int, state: dict[str, Any], position: Position) -> None:
        """Write the final checkpoint unless it exists. Raises LlmpyError if that fails, or publishing its model."""
        self.settle()
        fix = f"Free some space, then resume: {command('train', '--resume', self.run)}"
        if self.last != step:
            weights, moments = self._snapshot()
            if self._prepare(step, state):
                self._write(weights, moments, position)
                if self.world.size > 1:
                    self._commit()
            if self._error:
                kept = "no earlier one exists" if self.last is None else f"that of step {self.last} is kept"
                what = f"cannot write the checkpoint of step {step}: {self._error}; {kept}"
                raise LlmpyError("checkpoint.unwritable", what, fix)
        elif self._unpublished:  # by the thread
            self._unpublished = str(self.world.gather_values("" if self.world.rank else self._release(step))[0])
        if self._unpublished:
            what = f"the checkpoint of step {step} is complete, but {self._unpublished}"
            raise LlmpyError("checkpoint.unpublished", what, fix)
        if self.world.rank == 0:
            (self.run / START_FILE).unlink(missing_ok=True)  # the run now resumes from checkpoints

    def close(self) -> None:
        """Wait for this rank's thread, whether or not the other ranks still answer."""
        if self.world.size == 1:
            self.settle()
        elif self._thread is not None:
            self._thread.join()

    def best(self) -> Score | None:
        """Return the score of the best model so far, also of earlier processes; None if there is none."""
        try:
            return checkpoint.read_header(self.run / BEST_FILE).score
        except LlmpyError:  # missing or corrupt
            return None

    def keep_best(self, score: Score) -> None:
        """Keep the model next to the run's if no earlier one had a smaller loss on the same text."""
        # Read from the file: it stays true if the run resumes from an earlier step.
        before = self.best()
        improves = before is None or score.val_loss < before.val_loss
        if before is not None and before.measured_on != score.measured_on:
            replaced = f"replacing the best model, of step {before.step}"
            self.journal.log(f"validation now uses {score.measured_on}: {replaced}")
            improves = True
        if not self.world.gather_values(improves)[0]:  # rank 0 writes the file
            return
        if self.world.size > 1:
            self.settle()  # the thread reads the gathered weights
        weights = self.optimizer.weights(self._weights)
        if self.world.rank == 0:
            try:
                checkpoint.write_model(self.run / BEST_FILE, self.model.config, self.trained_length, weights, score)
            except LlmpyError as error:
                self.journal.log(f"warning: the best model is not saved: {error.message}")

    def finite(self) -> bool:
        """Return whether parameters and moments are finite, by their norms: ten times faster than a search."""
        flat = (x for x in (self.optimizer.master, self.optimizer.m, self.optimizer.v) if x.size)
        norm, host = self.model.ops.global_norm, self.model.ops.to_host
        # The norm of finite values may overflow.
        fine = all(np.isfinite(float(norm(x))) or all_finite(host(x)) for x in flat)
        return all(here for (here,) in self.world.gather(fine))

    def _snapshot(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the weights (rank 0) and this rank's m and v: views if possible."""
        optimizer, host = self.optimizer, self.model.ops.to_host
        return optimizer.weights(self._weights), [host(optimizer.m), host(optimizer.v)]

    def _prepare(self, step: int, state: dict[str, Any]) -> bool:
        """Create the temporary folder; return whether that succeeded."""
        self._step, self._state, self._written, self._error = step, state, {}, ""
        if self.world.rank == 0:
            try:
                checkpoint.make_room_for(self.folder, step)
            except OSError as error:
                self._error = _why(error)
        self._error = str(self.world.gather_values(self._error)[0])
        return not self._error

    def _write(self, weights: np.ndarray, moments: list[np.ndarray], position: Position) -> None:
        """Write this rank's files; a single process commits them too."""
        rank, size, config = self.world.rank, self.world.size, self.model.config
        files = {parts.part_name(rank, size): parts.part_pieces(self.optimizer.owned, moments, position)}
        if rank == 0:
            files[MODEL_FILE] = checkpoint.model_pieces(config, self.trained_length, weights)
        try:
            self._written = checkpoint.write_files(checkpoint.being_made(self.folder, self._step), files)
        except (OSError, MemoryError) as error:
            self._error = _why(error)
        if size == 1:  # several ranks commit in `settle` or `finish`, on the thread that communicates
            self._commit()

    def _commit(self) -> None:
        """Combine all parts into a checkpoint and publish its model."""
        results = self.world.gather_values([self._error, self._written])
        error, rank = next(((error, rank) for rank, (error, _) in enumerate(results) if error), ("", 0))
        error, unpublished = f"{error} (rank {rank})" if error and self.world.size > 1 else error, ""
        if self.world.rank == 0 and not error:
            try:
                with contextlib.suppress(OSError):  # losing a log, already warned of, must not cost the model
                    self.journal.sync()
                files = {name: entry for _, written in results for name, entry in written.items()}
                checkpoint.commit(self.folder, self._step, {**self._state, "ranks": self.world.size}, files)
                unpublished = self._release(self._step)
            except OSError as failure:
                error = _why(failure)
        if self.world.rank == 0 and error:
            with contextlib.suppress(OSError):
                durable.remove(checkpoint.being_made(self.folder, self._step))
        self._error, unpublished = map(str, self.world.gather_values([error, unpublished])[0])
        if not self._error:
            self.last, self._unpublished = self._step, unpublished

    def _release(self, step: int) -> str:
        """Publish the model of a complete checkpoint and remove older ones; return what failed, or ""."""
        failed = f"cannot write {self.run / MODEL_FILE}"
        try:
            self._publish(self.folder / f"step-{step:08}")
            failed = "cannot remove older ones"
            checkpoint.prune(self.folder, self.keep)
        except OSError as error:
            return f"{failed}: {_why(error)}"
        return ""

    def settle(self, wait: bool = True) -> None:
        """If the threads of all ranks have ended, commit their parts, or warn."""
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
        elif self._unpublished:
            self.journal.log(f"warning: the checkpoint of step {self.last} is complete, but {self._unpublished}")

    def _publish(self, written: Path) -> None:
        """Make the checkpoint's model the run's, by a hard link."""
        temporary = self.run / f".{MODEL_FILE}.0.tmp"
        durable.remove(temporary)
        durable.link(written / MODEL_FILE, temporary)
        durable.replace(temporary, self.run / MODEL_FILE)
        durable.sync_folder(self.run)


def _why(error: Exception) -> str:
    return getattr(error, "strerror", "") or str(error) or "out of memory"


def page_aligned(count: int) -> np.ndarray:
    """Return a float32 array (count,), uninitialised and page-aligned for direct I/O."""
    raw = np.empty(4 * count + durable.PAGE, np.uint8)
    start = -raw.ctypes.data % durable.PAGE
    return raw[start : start + 4 * count].view(np.float32)
