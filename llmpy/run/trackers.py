"""Optional trackers: TensorBoard, wandb, trackio. One that fails is disabled with a warning; the run continues."""

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
Open = tuple[Callable[[dict[str, float], int], object], Callable[[], object]]  # log(numbers, step), close()


class Trackers:
    """The open trackers, without those that failed."""

    def __init__(
        self, names: Sequence[str], run: Path, record: Mapping[str, Any], log: Callable[[str], None],
        since: int | None = None,
    ) -> None:  # fmt: skip
        """`record`: the run's options. Steps from `since` on are logged again. Raises LlmpyError: package missing."""
        self._warn, self._open = log, dict[str, Open]()
        for name, module in {name: package(name) for name in names}.items():  # all are imported before one starts
            self._guard(name, lambda n, m: self._open.update({n: _start(n, m, run, record, since)}), name, module)

    def log(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Log the numeric values of a step."""
        kept = {k: float(v) for k, v in numbers.items() if k != "step" and isinstance(v, int | float)}
        for name, (log, _) in list(self._open.items()):
            self._guard(name, log, kept, step)

    def close(self) -> None:
        """Flush and close all trackers."""
        for name, (_, close) in list(self._open.items()):
            self._guard(name, close)

    def _guard(self, name: str, act: Callable[..., object], *arguments: object) -> None:
        try:
            act(*arguments)
        except Exception as error:  # a third-party service may raise anything
            self._open.pop(name, None)
            self._warn(f"warning: {name} failed; tracking disabled: {type(error).__name__}: {error}")


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
    """Import the module of a tracker. Raises LlmpyError if it is not installed."""
    try:
        return importlib.import_module(PACKAGES[name])
    except ImportError:
        what = f"--track {name} requires the package {PACKAGES[name]}"
        raise LlmpyError("package.missing", what, f"Install it: {install(PACKAGES[name])}") from None
