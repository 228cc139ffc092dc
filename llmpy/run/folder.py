"""The folder of one run: where it is, that it can be written, that one process has it, and that nothing in it is lost.

RUN/model.safetensors   the model as of the last checkpoint       config.json     options, machine, data
    best.safetensors    the one of the best validation loss
    tokenizer.json   train.bin   val.bin                          console.log     what was said
    metrics.jsonl    numbers of every step                        main.log        some of them, as llm.c has it
    samples.txt      what the model wrote                         checkpoints/    see checkpoint.py
    events/          for TensorBoard, with --track                run.lock        held by the process that trains
    start.safetensors   of `llmpy.Trainer`, until it ends: the model in memory that it began with

A run begins in a folder that is new or empty: then every file of these names is its own, to be removed if the run
is refused. An exception are the lock of a dead process and temporary files of a save that was cut off; the latter go
when a run really begins.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import time
from pathlib import Path
from typing import Any, Self

from ..data.magic import SPOOL
from ..errors import LlmpyError
from ..options.train import TrainOptions
from ..system import durable
from ..system.durable import write_whole
from ..system.interrupts import signals_held_back
from ..system.lock import Lock
from ..version import __version__

MODEL_FILE, BEST_FILE, START_FILE, CONFIG_FILE, TOKENIZER_FILE, CHECKPOINTS, EVENTS, LOCK = (
    "model.safetensors",
    "best.safetensors",
    "start.safetensors",
    "config.json",
    "tokenizer.json",
    "checkpoints",
    "events",
    "run.lock",
)
LOGS = METRICS, MAIN, SAMPLES = "metrics.jsonl", "main.log", "samples.txt"  # cut back to a checkpoint by --resume
CONSOLE = "console.log"
PARTS = "train.bin", "val.bin"  # the tokens that a run made of text
TOKENS = {*PARTS, "train.mask", "val.mask"}
OURS = {MODEL_FILE, BEST_FILE, START_FILE, CONFIG_FILE, TOKENIZER_FILE, *TOKENS, *LOGS, CONSOLE}
LLMC_DONE = re.compile(r"DONE_(\d{1,18})")  # what makes a checkpoint of llm.c one: its last file
# What is left of a run that was killed: temporary files, as `durable` names them, and tokens that were being made.
CUT_OFF = re.compile(rf"\.({'|'.join(map(re.escape, sorted(OURS)))})\.\d+\.tmp|{re.escape(SPOOL)}.*")


HELD: list[RunFolder] = []  # by this process: whoever ends it discards them


class RunFolder:
    """A folder that this process alone writes to, until `discard`, which before `keep` also undoes its making."""

    def __init__(self, path: Path, made: list[Path]) -> None:
        self.path = path
        self.resumed = False  # whether a run is there to go on with
        self._made = made
        self._kept = False
        self._lock = Lock(path / LOCK)

    @classmethod
    def claim(cls, options: TrainOptions) -> Self:
        """The folder that the options speak of: of a run to go on with, else a new one, also for a run of llm.c.

        Raises LlmpyError if it cannot be had.
        """
        run, out, called = options.resume, options.out, options.called
        if run and out and os.path.realpath(run) != os.path.realpath(out) and not holds_llmc(run):
            raise LlmpyError(
                f"--resume {run} goes on in that folder, not in --out {out}",
                f"leave one of them out, or begin a new run from its model: --init {run} --out {out}",
            )
        if run is None and options.auto_resume and out is not None and is_run(out):
            run = out
        if run is not None and holds_llmc(run) and not is_run(run):
            run, called = None, options.taking_over().called
        with signals_held_back():  # one that ends the program finds the folder in HELD, or not made
            return cls.open(out, called) if run is None else cls.reopen(run)

    @classmethod
    def open(cls, out: Path | None, called: str) -> Self:
        """Make the folder `out`, or one named for what is trained, date and time below `runs/`.

        Raises LlmpyError for an existing folder with anything in it, for one that another run is writing to, and for
        one that cannot be written.
        """
        run = cls(out or Path("runs"), made=[])
        try:
            while True:
                path = out or _fresh(called)
                run = cls(path, made=[p for p in (path, *path.parents) if not p.exists()])
                path.mkdir(parents=True, exist_ok=True)
                if run._take():
                    _refuse_loss(path)
                    return run
                if out is not None:
                    raise _taken(path, run._lock)
        except OSError as fault:
            run._let_go()
            raise LlmpyError(
                f"cannot write to the run folder {run.path}: {fault.strerror or fault}", "choose another with --out"
            ) from None
        except LlmpyError:
            run._let_go()
            raise

    @classmethod
    def reopen(cls, path: Path) -> Self:
        """The folder of a run that is to go on. Raises LlmpyError if there is none, or if it is going on already."""
        try:
            if not is_run(path):
                raise LlmpyError(f"no run in {path}", "name the folder of a run, or begin one with --out")
            run = cls(path, made=[])
            if not run._take():
                raise _taken(path, run._lock)
        except OSError as fault:
            raise LlmpyError(
                f"cannot write to the run folder {path}: {fault.strerror or fault}", "check its permissions"
            ) from None
        run.resumed = True
        run.keep()
        return run

    def keep(self) -> None:
        """The run has begun: its log and metrics are worth keeping whatever comes."""
        self._kept = True
        with contextlib.suppress(OSError):
            for name in _entries(self.path):
                if CUT_OFF.fullmatch(name):
                    durable.remove(self.path / name)
        with contextlib.suppress(OSError):
            for name in _entries(self.path / CHECKPOINTS):
                if name.startswith(".") and name.endswith(".tmp"):
                    shutil.rmtree(self.path / CHECKPOINTS / name)

    def discard(self) -> None:
        """If the run never began, remove its files and the folders made for it. Let others have it."""
        with signals_held_back():
            if not self._kept and self.path.is_dir():
                for name in [name for name in os.listdir(self.path) if name in OURS or CUT_OFF.fullmatch(name)]:
                    with contextlib.suppress(OSError):  # in use (Windows)
                        durable.remove(self.path / name)
            self._let_go()

    def _take(self) -> bool:
        held = self._lock.take()
        if held:
            HELD.append(self)
        return held

    def _let_go(self) -> None:
        """Drop the lock, and remove the folders made for a run that never started."""
        self._lock.drop()
        for path in [] if self._kept else self._made:
            with contextlib.suppress(OSError):  # somebody else put something into it: let it be
                path.rmdir()
        if self in HELD:
            HELD.remove(self)

    def __truediv__(self, name: str) -> Path:
        return self.path / name


def finished(below: Path = Path("runs")) -> list[Path]:
    """The runs that hold a model, newest first."""
    models = below.glob(f"*/{MODEL_FILE}")
    return [m.parent for m in sorted(models, key=lambda m: m.stat().st_mtime, reverse=True)]


def _fresh(called: str) -> Path:
    """runs/d4-20261122-1503, with -2, -3 … after it where the minute already has one."""
    stem = f"{called.replace(':', '-')}-{time.strftime('%Y%m%d-%H%M')}"
    names = (stem if n == 1 else f"{stem}-{n}" for n in range(1, 1_000_000))
    return next(path for name in names if not (path := Path("runs", name)).exists())


def is_run(path: Path) -> bool:
    """Return whether a run ever began here: there is a config.json of ours, or a checkpoint."""
    try:
        return bool(read_config(path / CONFIG_FILE))
    except LlmpyError:  # missing, or of another program
        return any(path.glob(f"{CHECKPOINTS}/step-*"))


def is_ours(path: Path) -> bool:
    """Return whether a run began here or is about to: what it says and samples is nobody's training data."""
    return (path / LOCK).exists() or is_run(path)


def holds_llmc(path: Path) -> bool:
    """Whether llm.c left a checkpoint here: then it is gone on with elsewhere, and nothing of it is touched."""
    try:
        return any(LLMC_DONE.fullmatch(name) for name in _entries(path))
    except OSError:
        return False


def _taken(path: Path, lock: Lock) -> LlmpyError:
    return LlmpyError(
        f"{path} is in use: {lock.holder()} is training in it", "wait for its end, or choose another --out"
    )


def _refuse_loss(path: Path) -> None:
    """Raise LlmpyError if there is anything in `path` that training into it could overwrite or bury."""
    names = [name for name in _entries(path) if name != LOCK and not CUT_OFF.fullmatch(name)]
    if MODEL_FILE in names:
        raise LlmpyError(
            f"{path} already holds a trained model",
            f"choose another --out, or go on with it: --resume {shlex.quote(str(path))}",
        )
    if is_run(path):
        raise LlmpyError(f"{path} holds a run that was cut off", f"go on with it: --resume {shlex.quote(str(path))}")
    if holds_llmc(path):
        raise LlmpyError(
            f"{path} holds a run of llm.c",
            f"go on with it in another folder: --resume {shlex.quote(str(path))} --out …",
        )
    if names:
        raise LlmpyError(f"{path} is not empty ({', '.join(names[:3])})", "choose an empty or new folder with --out")


def _entries(path: Path) -> list[str]:
    """Names in a folder, sorted; for a file NotADirectoryError, an OSError."""
    return sorted(entry.name for entry in path.iterdir())


def own_tokens(folder: Path) -> tuple[Path, ...]:
    """The tokens that a run made of text, if it did."""
    own = tuple(folder / part for part in PARTS)
    return own if all(path.is_file() for path in own) else ()


def write_config(folder: Path, options: TrainOptions, **more: Any) -> None:
    """What was trained, how and on what, for people and later tools; loading a model does not read it."""
    text = json.dumps({"llmpy": __version__, "options": options.as_record(), **more}, indent=2, ensure_ascii=False)
    # errors: a path may hold bytes that are no text
    write_whole(
        folder / CONFIG_FILE,
        lambda temporary: temporary.write_text(text + "\n", encoding="utf-8", errors="surrogateescape"),
    )


def read_config(path: Path) -> dict[str, Any]:
    """The options in a config.json. Raises LlmpyError if there are none."""
    try:
        return dict(json.loads(path.read_text("utf-8", errors="surrogateescape"))["options"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as fault:
        raise LlmpyError(f"{path} cannot be read: {fault}", "begin a new run") from None
