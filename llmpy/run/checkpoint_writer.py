"""Checkpoints in the background: training waits for a copy of parameters and moments, a thread writes it to the disk.

due → copy (its time is memory's) → the thread: files, sync, rename, remove older ones → the next is due
            a disk that refuses: a warning, what was there stays, and the next step that may tries again
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
from ..model.arena import all_finite
from ..model.gpt2 import GPT2
from ..system import durable
from ..system.command import command
from ..train.optimizer import AdamW
from . import checkpoint
from .checkpoint import MODEL, STATE
from .folder import BEST_FILE, CHECKPOINTS, MODEL_FILE, START_FILE
from .journal import Journal
from .place import arrays, place_of, position_of

RETRY = 10  # after a failure the next attempt comes in a tenth of the interval, then each twice as late as the last


class CheckpointWriter:
    """Writes the checkpoints of one run."""

    def __init__(
        self, run: Path, model: GPT2, optimizer: AdamW, trained_length: int, journal: Journal, every: int, keep: int,
        keep_every: int,
    ) -> None:  # fmt: skip
        """`every` 0: only when told, by `finish`; then there is no copy."""
        self.run, self.folder = run, run / CHECKPOINTS
        self.model, self.optimizer, self.trained_length, self.journal = model, optimizer, trained_length, journal
        self.every, self.keep, self.keep_every = every, keep, keep_every
        self.last: int | None = None  # step of the newest checkpoint that is whole
        self._next: int | None = None  # step from which one is due
        self._tried = 0  # step of the last attempt
        self._pause = 0  # steps from that to the next one, after failures
        self._warned = ""  # of what, since a checkpoint was last written
        self._thread: Thread | None = None
        self._fault: OSError | None = None
        size = model.params.size
        self._copy = page_aligned(3 * size) if every else None  # parameters, m, v
        if self._copy is not None:
            self._copy.fill(0)  # its pages are there before the first checkpoint has to wait for them

    def restore(self, path: Path, manifest: dict[str, Any], seed: int) -> Position:
        """Parameters and moments := a checkpoint's; returns the place in the data. `seed` is that of the shuffling."""
        if manifest.get("ranks", 1) == 1:
            return position_of(manifest, restore(path, self.model, self.optimizer))
        check_shape(path, self.model)
        checkpoint.load_parameters(path / MODEL, self.model.params)
        self.model.store_weights()
        whole = [(0, self.model.params.size)]
        checkpoint.load_moments(path, manifest, [(whole, self.optimizer.m, self.optimizer.v)])
        return place_of(path, manifest, 0, 1, seed)

    def best(self) -> checkpoint.Score | None:
        """Of the model that `keep_best` kept last, in this process or an earlier one."""
        try:
            return checkpoint.read_score(self.run / BEST_FILE)
        except LlmpyError:  # there is none; or none that could be used
            return None

    def keep_best(self, score: checkpoint.Score) -> None:
        """Keep the model beside the run's if no earlier one had a smaller loss on the same. The file is its own record:
        what it says of itself is true even where the run went on from before it, or differently.
        """
        if self._improves(score):
            self._keep(score, self.model.ops.to_host(self.model.params.buffer))

    def _improves(self, score: checkpoint.Score) -> bool:
        before = self.best()
        if before is None or before.measured_on == score.measured_on:
            return before is None or score.val_loss < before.val_loss
        self.journal.say(
            f"validation now takes {score.measured_on}; the best model so far, of step {before.step} with "
            f"{before.val_loss:.4f}, was measured on {before.measured_on}: it gives way to this one"
        )
        return True

    def _keep(self, score: checkpoint.Score, params: np.ndarray) -> None:
        try:
            checkpoint.write_model(self.run / BEST_FILE, self.model.config, self.trained_length, params, score)
        except LlmpyError as fault:
            self.journal.say(f"warning: the best model so far is not kept: {str(fault).partition(' — ')[0]}")

    def begin(self, step: int) -> None:
        """The run starts, or goes on, after `step`; checkpoints are due at multiples of `every`."""
        self._next = (step // self.every + 1) * self.every if self.every else None

    def adopt(self, path: Path, step: int) -> None:
        """The run goes on from this checkpoint; its model is the run's, even if that was killed in between."""
        self.last = step
        try:
            self._publish(path)
        except OSError as fault:
            self.journal.say(f"warning: cannot write {self.run / MODEL_FILE}: {fault.strerror or fault}")

    def due(self, step: int) -> bool:
        """Whether to call `save` now: a checkpoint is due, and the one before is written."""
        self._settle()
        return self._next is not None and step >= self._next and self._thread is None

    def save(self, step: int, state: dict[str, Any], position: Position) -> None:
        """Copy what changes and let a thread write it. `due` must have said yes."""
        assert self._copy is not None
        size = self.model.params.size
        params, moments = self._copy[:size], self._copy[size:]
        host = self.model.ops.to_host
        params[...] = host(self.model.params.buffer)
        moments[:size] = host(self.optimizer.m)
        moments[size:] = host(self.optimizer.v)
        self._tried, self._next = step, (step // self.every + 1) * self.every
        arguments = step, state, self._files(params, [moments], position)
        self._thread = Thread(target=self._in_background, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self, step: int, state: dict[str, Any], position: Position) -> None:
        """Write the checkpoint of the end, unless it is there, and wait for it.

        Raises LlmpyError, which says what is kept, if the disk refuses.
        """
        self.close()
        if self.last != step:
            self._write_last(step, state, position)
        (self.run / START_FILE).unlink(missing_ok=True)  # from here on checkpoints say what the run goes on from

    def _write_last(self, step: int, state: dict[str, Any], position: Position) -> None:
        host = self.model.ops.to_host
        moments = [host(self.optimizer.m), host(self.optimizer.v)]
        files = self._files(host(self.model.params.buffer), moments, position)
        try:
            try:
                self._write(step, state, files)
            except OSError as fault:
                if not self._make_room(fault):
                    raise
                self._write(step, state, files)
        except OSError as fault:
            kept = f"the checkpoint of step {self.last} is kept" if self.last else "no earlier checkpoint exists"
            with contextlib.suppress(LlmpyError):  # weights alone need a third of the room
                checkpoint.save(self.run / MODEL_FILE, self.model, self.trained_length)
                kept += f"; the model of step {step} was saved without what --resume needs"
            raise LlmpyError(
                f"the checkpoint of step {step} could not be written: {fault.strerror or fault}; {kept}",
                f"make room, then go on with: {command('train', '--resume', self.run)}",
            ) from fault

    def settle(self) -> None:
        """Take in the checkpoint that is being written, when it is; called on all ranks."""
        self.close()

    def close(self) -> None:
        """Wait for the thread, if there is one, and say what came of it."""
        if self._thread is not None:
            self._thread.join()
        self._settle()

    def _settle(self) -> None:
        """Where the thread has ended: take in its outcome."""
        if self._thread is None or self._thread.is_alive():
            return
        self._thread.join()
        self._thread = None
        fault, self._fault = self._fault, None
        self._tried_with("" if fault is None else fault.strerror or str(fault))

    def _tried_with(self, fault: str) -> None:
        """Take note that an attempt succeeded (""), or what was in its way: that is said once, not at every attempt."""
        if not fault:
            if self._warned:
                self.journal.say(f"checkpoints are written again: that of step {self.last} is whole")
            self._pause, self._warned = 0, ""
            return
        self._pause = min(self.every, 2 * self._pause or max(1, self.every // RETRY))
        self._next = self._tried + self._pause
        if fault != self._warned:
            self._warned = fault
            kept = "none exists yet" if self.last is None else f"that of step {self.last} is kept"
            self.journal.say(
                f"warning: cannot write a checkpoint: {fault}; {kept}; the run goes on, and will try again"
            )

    def _in_background(self, step: int, state: dict[str, Any], files: dict[str, checkpoint.Pieces]) -> None:
        try:
            self._write(step, state, files)
        except (OSError, MemoryError) as fault:
            self._fault = fault if isinstance(fault, OSError) else OSError(errno.ENOMEM, "out of memory")
            self._make_room(self._fault)

    def _write(self, step: int, state: dict[str, Any], files: dict[str, checkpoint.Pieces]) -> None:
        """The checkpoint, then the model of the run as another name of its file, then older ones go."""
        with contextlib.suppress(OSError):  # a log that is lost, of which the user was warned, must not cost the model
            self.journal.sync()
        written = checkpoint.write(self.folder, step, state, files)
        self.last = step
        self._publish(written)
        checkpoint.prune(self.folder, self.keep, self.keep_every)

    def _publish(self, written: Path) -> None:
        """The checkpoint's model becomes the run's."""
        temporary = self.run / f".{MODEL_FILE}.0.tmp"
        durable.remove(temporary)
        durable.link(written / MODEL, temporary)
        durable.replace(temporary, self.run / MODEL_FILE)
        durable.sync_folder(self.run)

    def _make_room(self, fault: OSError) -> bool:
        """If the disk is full: remove all checkpoints but the newest and those to be kept; whether that may help."""
        if fault.errno not in (errno.ENOSPC, errno.EDQUOT) or not self.keep:
            return False
        before = len(checkpoint.listed(self.folder))
        with contextlib.suppress(OSError):
            checkpoint.prune(self.folder, 1, self.keep_every)
        return len(checkpoint.listed(self.folder)) < before

    def _files(
        self, params: np.ndarray, moments: checkpoint.Pieces, position: Position
    ) -> dict[str, checkpoint.Pieces]:
        config = self.model.config
        return {
            MODEL: checkpoint.model_pieces(config, self.trained_length, params),
            STATE: checkpoint.state_pieces(config, moments, arrays(position)),
        }

    def finite(self) -> bool:
        """Whether parameters and moments are; by their norms, which cost a tenth of a search."""
        flat = (self.model.params.buffer, self.optimizer.m, self.optimizer.v)
        norm, host = self.model.ops.global_norm, self.model.ops.to_host
        # A norm may overflow where no number is infinite.
        return all(np.isfinite(float(norm(x))) or all_finite(host(x)) for x in flat)


def restore(path: Path, model: GPT2, optimizer: AdamW) -> dict[str, np.ndarray]:
    """Parameters and moments := a checkpoint's; returns its further arrays."""
    check_shape(path, model)
    checkpoint.load_parameters(path / MODEL, model.params)
    model.store_weights()
    return checkpoint.load_state(path / STATE, model.params.table, optimizer.m, optimizer.v)


def check_shape(path: Path, model: GPT2) -> None:
    """Raise LlmpyError if the checkpoint holds another model."""
    if checkpoint.read_header(path / MODEL).config != model.config:
        raise LlmpyError(f"{path} holds another model than this run's", "restore the run folder")


def page_aligned(count: int) -> np.ndarray:
    """float32 (count,), uninitialised, that begins on a page, so that it goes to the disk directly."""
    raw = np.empty(4 * count + durable.PAGE, np.uint8)
    start = -raw.ctypes.data % durable.PAGE
    return raw[start : start + 4 * count].view(np.float32)
