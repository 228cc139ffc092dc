"""Where numbers of a run also go, if asked: TensorBoard's event files, wandb, trackio. None of them is a dependency.

An error in one of them ends no run: there is one warning, and that tracker gets nothing more.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import LlmpyError
from ..system.command import install
from .folder import EVENTS

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
PROJECT = "llmpy"
Open = tuple[Callable[[dict[str, float], int], object], Callable[[], object]]  # what logs numbers of a step, and closes


class Trackers:
    """Open trackers, without those that failed."""

    def __init__(
        self, names: Sequence[str], run: Path, record: Mapping[str, Any], log: Callable[[str], None],
        since: int | None = None,
    ) -> None:  # fmt: skip
        """`record` describes the run; steps `since` … are logged again. Raises LlmpyError if a package is missing."""
        self._say, self._open = log, dict[str, Open]()
        for name, module in {name: package(name) for name in names}.items():  # all are there before one starts
            self._guard(name, lambda n, m: self._open.update({n: _start(n, m, run, record, since)}), name, module)

    def log(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Log the numbers of a step, those that are numbers."""
        kept = {k: float(v) for k, v in numbers.items() if k != "step" and isinstance(v, int | float)}
        for name, (log, _) in list(self._open.items()):
            self._guard(name, log, kept, step)

    def close(self) -> None:
        """Deliver all that was logged."""
        for name, (_, close) in list(self._open.items()):
            self._guard(name, close)

    def _guard(self, name: str, act: Callable[..., object], *arguments: object) -> None:
        try:
            act(*arguments)
        except Exception as error:  # whatever another's service may raise
            self._open.pop(name, None)
            self._say(f"warning: {name} failed; tracking disabled: {type(error).__name__}: {error}")


def _start(name: str, module: Any, run: Path, record: Mapping[str, Any], since: int | None) -> Open:
    if name != "tensorboard":
        folder = {"dir": str(run)} if name == "wandb" else {}
        module.init(project=PROJECT, name=run.name, config=dict(record), **folder)
        return module.log, module.finish
    writer = module.SummaryWriter(str(run / EVENTS), purge_step=since)

    def log(numbers: dict[str, float], step: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)

    return log, writer.close


def package(name: str) -> Any:
    """Return the module of a tracker. Raises LlmpyError if it is not installed."""
    try:
        return importlib.import_module(PACKAGES[name])
    except ImportError:
        raise LlmpyError(
            "run.x", f"--track {name} needs the package {PACKAGES[name]}", install(PACKAGES[name])
        ) from None
