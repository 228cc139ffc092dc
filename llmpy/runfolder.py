"""The folder of one run: where it is, that it can be written, and that no earlier model is lost.

RUN/model.safetensors   config.json   tokenizer.json   metrics.jsonl   main.log   tokens/
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path
from typing import Self

from .errors import LlmpyError

MODEL_FILE = "model.safetensors"
# What a run of ours leaves behind even when it ends before its first save.
OURS = {MODEL_FILE, "config.json", "tokenizer.json", "train.bin", "val.bin", "metrics.jsonl", "main.log"}


class RunFolder:
    """A folder that is ready to be written to. Until `keep`, `discard` undoes its making."""

    def __init__(self, path: Path, made: list[Path]) -> None:
        self.path = path
        self._made = made
        self._kept = False

    @classmethod
    def open(cls, out: Path | None, model: str) -> Self:
        """Make the folder `out`, or one named for model, date and time below `runs/`.

        An existing folder is accepted when it is empty or holds only what a run leaves that never
        came to save its model. Raises LlmpyError for any other, and for one that cannot be written.
        """
        path = out or _fresh(model)
        run = cls(path, made=[p for p in (path, *path.parents) if not p.exists()])
        try:
            if path.exists():
                _refuse_loss(path)
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass  # the only test of permissions that every system and file system agrees on
        except OSError as fault:
            run._remove()
            raise LlmpyError(
                f"cannot write to the run folder {path}: {fault.strerror or fault}", "choose another with --out"
            ) from None
        return run

    def keep(self) -> None:
        """The run has begun: its log and metrics are worth keeping whatever comes."""
        self._kept = True

    def discard(self) -> None:
        """If the run never began, remove its files and the folders made for it."""
        if not self._kept:
            self._remove(*OURS)

    def _remove(self, *names: str) -> None:
        for path in (*(self.path / name for name in names), *self._made):
            # Not there, in use (Windows), or somebody else put something into the folder: let it be.
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()

    def __truediv__(self, name: str) -> Path:
        return self.path / name


def finished(below: Path = Path("runs")) -> list[Path]:
    """The runs that hold a model, newest first."""
    models = below.glob(f"*/{MODEL_FILE}")
    return [m.parent for m in sorted(models, key=lambda m: m.stat().st_mtime, reverse=True)]


def _fresh(model: str) -> Path:
    """runs/d4-20261122-1503, with -2, -3 … after it where the minute already has one."""
    stem = f"{model.replace(':', '-')}-{time.strftime('%Y%m%d-%H%M')}"
    names = (stem if n == 1 else f"{stem}-{n}" for n in range(1, 1_000_000))
    return next(path for name in names if not (path := Path("runs", name)).exists())


def _refuse_loss(path: Path) -> None:
    """Raise LlmpyError if training into `path` would overwrite or bury what is there."""
    names = {entry.name for entry in path.iterdir()}  # for a file: NotADirectoryError, an OSError
    if MODEL_FILE in names:
        raise LlmpyError(f"{path} already holds a trained model", "choose another --out, or remove it")
    if names and (names - OURS or "metrics.jsonl" not in names):
        some = ", ".join(sorted(names)[:3])
        raise LlmpyError(f"{path} holds other files ({some})", "choose an empty or new folder with --out")
