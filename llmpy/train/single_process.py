"""The world of training in a single process, and the interface of those of several ranks (`distributed.world`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..model.language_model import LanguageModel
from ..options.train import TrainOptions
from ..run.checkpoint_writer import CheckpointWriter
from ..run.folder import RunFolder
from ..run.journal import Journal
from ..system.resources import crowded
from .optimizer import AdamW


class SingleProcess:
    """Rank 0 of 1; `distributed.world.World` is the same interface for several ranks."""

    rank, size = 0, 1
    local_size = 1  # ranks on this host

    def gather(self, *numbers: float) -> list[tuple[float, ...]]:
        """Return the numbers of every rank, by rank; the same list on all."""
        return [numbers]

    @contextlib.contextmanager
    def first_rank_first(self) -> Iterator[None]:
        """Within: rank 0 runs the body first, then the others."""
        yield

    @contextlib.contextmanager
    def each_host_once(self) -> Iterator[None]:
        """Within: the first rank of every host runs the body first, then the host's others."""
        yield

    @contextlib.contextmanager
    def others_waiting(self) -> Iterator[bool]:
        """Within: rank 0 acts, with all weights gathered, while the others wait. Yields whether this is rank 0."""
        yield True

    def gather_values(self, value: Any) -> list[Any]:
        """Return the JSON value of every rank, by rank."""
        return [value]

    def claim(self, options: TrainOptions) -> RunFolder:
        """Return the run's folder. Raises LlmpyError as `RunFolder.claim` does."""
        return RunFolder.claim(options)

    def lines(self, threads: int) -> list[str]:
        """Return notes about the ranks and their threads, for the user."""
        return crowded(threads)

    def journal(self) -> Journal:
        """Return the logs of this rank."""
        return Journal()

    def threads(self, options: TrainOptions) -> int | None:
        """Return the threads of this rank; None: one per core."""
        return options.threads

    def optimizer(self, model: LanguageModel, o: TrainOptions) -> AdamW:
        """Return the optimizer of an initialised model that is reserved for training."""
        return AdamW(model, o.beta1, o.beta2, o.weight_decay, o.clip)

    def checkpoints(
        self, run: Path, model: LanguageModel, optimizer: Any, length: int, journal: Journal, o: TrainOptions
    ) -> CheckpointWriter:
        """Return the writer of the run's checkpoints."""
        return CheckpointWriter(self, run, model, optimizer, length, journal, o.checkpoint_every, o.keep)

    def times(self) -> dict[str, float]:
        """Return milliseconds of communication since the last call, and the part that training waited for."""
        return {}


SINGLE_PROCESS = SingleProcess()
