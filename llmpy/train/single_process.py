"""The world of one process: what ranks would ask each other is answered at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..model.gpt2 import GPT2
from ..options.options import TrainOptions
from ..run.checkpoint_writer import CheckpointWriter
from ..run.folder import RunFolder
from ..run.journal import Journal
from ..system.resources import crowded
from .optimizer import AdamW

T = TypeVar("T")


class Alone:
    """One rank, the first; `world.World` is the same for several."""

    rank, size = 0, 1
    local_size = 1  # ranks on this host

    def gather(self, *numbers: float) -> list[tuple[float, ...]]:
        """The numbers of every rank, in the order of ranks, the same list on all of them."""
        return [numbers]

    def tell(self, value: Any) -> list[Any]:
        """The value, as JSON has it, of every rank, in the order of ranks."""
        return [value]

    def in_turn(self, lead: Callable[[], T], others: Callable[[], T] | None = None) -> T:
        """What `lead` returns on the first rank; when it has, what `others` (or `lead`) returns on the other ones."""
        return lead()

    def claim(self, options: TrainOptions) -> RunFolder:
        """The run's folder. Raises LlmpyError as `RunFolder.claim` does."""
        return RunFolder.claim(options)

    def on_each_host(self, prepare: Callable[[], object]) -> None:
        """`prepare`, on the first rank of every host before the others of it."""
        prepare()

    def while_others_wait(self, act: Callable[[], None]) -> None:
        """`act` on the first rank, with all weights in place."""
        act()

    def lines(self, threads: int) -> list[str]:
        """What the user reads of the ranks, of which this one has so many threads."""
        return crowded(threads)

    def journal(self) -> Journal:
        """The logs of this rank."""
        return Journal()

    def threads(self, options: TrainOptions) -> int | None:
        """Threads of this rank; None: as many as the backend finds cores."""
        return options.threads

    def optimizer(self, model: GPT2, o: TrainOptions) -> AdamW:
        """The optimizer of a model that has been reserved for training and has its weights."""
        return AdamW(model, o.beta1, o.beta2, o.weight_decay, o.clip)

    def keeper(
        self, run: Path, model: GPT2, optimizer: Any, length: int, journal: Journal, o: TrainOptions
    ) -> CheckpointWriter:
        """Who writes the checkpoints."""
        return CheckpointWriter(self, run, model, optimizer, length, journal, o.checkpoint_every, o.keep, o.keep_every)

    def times(self) -> dict[str, float]:
        """Milliseconds of communication since the last call, and how many of them training waited for."""
        return {}
