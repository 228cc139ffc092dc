"""One process that trains: what ranks would ask each other is answered at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..model.gpt2 import GPT2
from ..options.train import TrainOptions
from ..run.checkpoint_writer import CheckpointWriter
from ..run.folder import RunFolder
from ..run.journal import Journal
from ..system.resources import crowded
from .optimizer import AdamW


class SingleProcess:
    """One rank, the first; `distributed.world.World` is the same for several."""

    rank, size = 0, 1
    local_size = 1  # ranks on this host

    def gather(self, *numbers: float) -> list[tuple[float, ...]]:
        """Return the numbers of every rank, in the order of ranks; the same list on all of them."""
        return [numbers]

    @contextlib.contextmanager
    def first_rank_first(self) -> Iterator[None]:
        """Within: what the first rank does before the others do it too."""
        yield

    @contextlib.contextmanager
    def each_host_once(self) -> Iterator[None]:
        """Within: what the first rank of every host does before the others of that host do it too."""
        yield

    @contextlib.contextmanager
    def others_waiting(self) -> Iterator[bool]:
        """Within: the first rank acts, with all weights in place, while the others wait. Yields whether this is it."""
        yield True

    def gather_values(self, value: Any) -> list[Any]:
        """Return the value, as JSON has it, of every rank, in the order of ranks."""
        return [value]

    def claim(self, options: TrainOptions) -> RunFolder:
        """Return the run's folder. Raises LlmpyError as `RunFolder.claim` does."""
        return RunFolder.claim(options)

    def lines(self, threads: int) -> list[str]:
        """Return what the user reads of the ranks, of which this one has so many threads."""
        return crowded(threads)

    def journal(self) -> Journal:
        """Return the logs of this rank."""
        return Journal()

    def threads(self, options: TrainOptions) -> int | None:
        """Return the threads of this rank; None: as many as the backend finds cores."""
        return options.threads

    def optimizer(self, model: GPT2, o: TrainOptions) -> AdamW:
        """Return the optimizer of a model that has been reserved for training and has its weights."""
        return AdamW(model, o.beta1, o.beta2, o.weight_decay, o.clip)

    def checkpoints(
        self, run: Path, model: GPT2, optimizer: Any, length: int, journal: Journal, o: TrainOptions
    ) -> CheckpointWriter:
        """Return the writer of the run's checkpoints."""
        return CheckpointWriter(self, run, model, optimizer, length, journal, o.checkpoint_every, o.keep)

    def times(self) -> dict[str, float]:
        """Return milliseconds of communication since the last call, and how many of them training waited for."""
        return {}


SINGLE_PROCESS = SingleProcess()
