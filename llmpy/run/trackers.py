"""Where numbers of a run also go, if asked: TensorBoard's event files, wandb, trackio. None of them is a dependency.

What fails here ends no run: there is one warning, and that tracker gets nothing more.
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


class Trackers:
    """Open trackers, and what was said of those that failed."""

    def __init__(
        self,
        names: Sequence[str],
        run: Path,
        record: Mapping[str, Any],
        say: Callable[[str], None],
        since: int | None = None,
    ) -> None:
        """`record` describes the run. Of one that goes on, what was told of steps `since` … is told again.

        Raises LlmpyError if a package is missing.
        """
        self._say, self._since = say, since
        self._open: dict[str, tuple[Callable[[dict[str, float], int], object], Callable[[], object]]] = {}
        modules = {name: package(name) for name in names}
        for name, module in modules.items():
            self._guard(name, self._start, name, module, run, dict(record))

    def log(self, step: int, numbers: Mapping[str, Any]) -> None:
        """The numbers of a step, those that are numbers."""
        told = {k: float(v) for k, v in numbers.items() if k != "step" and isinstance(v, int | float)}
        for name, (log, _) in list(self._open.items()):
            self._guard(name, log, told, step)

    def close(self) -> None:
        """All that was logged is delivered."""
        for name, (_, close) in list(self._open.items()):
            self._guard(name, close)
        self._open.clear()

    def _start(self, name: str, module: Any, run: Path, record: dict[str, Any]) -> None:
        if name == "tensorboard":
            writer = module.SummaryWriter(str(run / EVENTS), purge_step=self._since)

            def log(numbers: dict[str, float], step: int) -> None:
                for key, value in numbers.items():
                    writer.add_scalar(key, value, step)

            self._open[name] = log, writer.close
        else:
            folder = {"dir": str(run)} if name == "wandb" else {}
            module.init(project=PROJECT, name=run.name, config=record, **folder)
            self._open[name] = (lambda numbers, step: module.log(numbers, step=step)), module.finish

    def _guard(self, name: str, act: Callable[..., object], *arguments: object) -> None:
        try:
            act(*arguments)
        except Exception as fault:  # whatever another's service may raise
            self._open.pop(name, None)
            self._say(f"warning: {name} fails and is told no more: {type(fault).__name__}: {fault}")


def package(name: str) -> Any:
    """The module of a tracker. Raises LlmpyError if it is not installed."""
    try:
        return importlib.import_module(PACKAGES[name])
    except ImportError:
        raise LlmpyError(f"--track {name} needs the package {PACKAGES[name]}", install(PACKAGES[name])) from None
