"""The folder of one run: where it is, that it can be written, and that nothing in it is lost.

RUN/model.safetensors   config.json   tokenizer.json   train.bin   val.bin   metrics.jsonl   main.log

A run begins in a folder that is new or empty: then every file of these names is its own, to be removed if the run
is refused. An exception are temporary files of a save that was cut off; they go when a run really begins.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from pathlib import Path
from typing import Self

from .errors import LlmpyError

MODEL_FILE = "model.safetensors"
TOKENS = {"train.bin", "val.bin", "train.mask", "val.mask"}
OURS = {MODEL_FILE, "config.json", "tokenizer.json", *TOKENS, "metrics.jsonl", "main.log"}
CUT_OFF = re.compile(rf"\.({'|'.join(map(re.escape, sorted(OURS)))})\.\d+\.tmp")  # as `durable` names them


class RunFolder:
    """A folder that is ready to be written to. Until `keep`, `discard` undoes its making."""

    def __init__(self, path: Path, made: list[Path]) -> None:
        self.path = path
        self._made = made
        self._kept = False

    @classmethod
    def open(cls, out: Path | None, model: str) -> Self:
        """Make the folder `out`, or one named for model, date and time below `runs/`.

        Raises LlmpyError for an existing folder with anything in it, and for one that cannot be written.
        """
        run = cls(out or Path("runs"), made=[])
        try:
            run.path = path = out or _fresh(model)
            made = [p for p in (path, *path.parents) if not p.exists()]
            if path not in made:
                _refuse_loss(path)
            path.mkdir(parents=True, exist_ok=path not in made)  # two runs at one time: the second fails here
            run._made = made
            with tempfile.TemporaryFile(dir=path):
                pass  # the only test of permissions that every system and file system agrees on
        except OSError as fault:
            run._remove()
            raise LlmpyError(
                f"cannot write to the run folder {run.path}: {fault.strerror or fault}", "choose another with --out"
            ) from None
        return run

    def keep(self) -> None:
        """The run has begun: its log and metrics are worth keeping whatever comes."""
        self._kept = True
        with contextlib.suppress(OSError):
            for name in _entries(self.path):
                if CUT_OFF.fullmatch(name):
                    (self.path / name).unlink()

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
    """Raise LlmpyError if there is anything in `path` that training into it could overwrite or bury."""
    names = [name for name in _entries(path) if not CUT_OFF.fullmatch(name)]
    if MODEL_FILE in names:
        raise LlmpyError(f"{path} already holds a trained model", "choose another --out, or remove it")
    if names:
        raise LlmpyError(f"{path} is not empty ({', '.join(names[:3])})", "choose an empty or new folder with --out")


def _entries(path: Path) -> list[str]:
    """Names in a folder, sorted; for a file NotADirectoryError, an OSError."""
    return sorted(entry.name for entry in path.iterdir())
