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
import itertools
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from ..data.magic import SPOOL
from ..errors import LlmpyError
from ..options.train import TrainOptions
from ..system import durable
from ..system.interrupts import signals_held_back
from ..system.lock import Lock
from ..version import __version__

MODEL_FILE, BEST_FILE, START_FILE = "model.safetensors", "best.safetensors", "start.safetensors"
CONFIG_FILE, TOKENIZER_FILE = "config.json", "tokenizer.json"
CHECKPOINTS, EVENTS, LOCK = "checkpoints", "events", "run.lock"
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
        """The run's folder to go on in, else (also for llm.c's) a new one. Raises LlmpyError if it cannot be had."""
        run, out, called = options.resume, options.out, options.called
        if run and out and os.path.realpath(run) != os.path.realpath(out) and not holds_llmc(run):
            what = f"--resume {run} goes on in that folder, not in --out {out}"
            fix = f"leave one of them out, or begin a new run from its model: --init {run} --out {out}"
            raise LlmpyError("run.x", what, fix)
        if run is None and options.auto_resume and out is not None and is_run(out):
            run = out
        if run is not None and holds_llmc(run) and not is_run(run):
            run, called = None, options.taking_over().called
        with signals_held_back():  # one that ends the program finds the folder in HELD, or not made
            return cls.open(out, called) if run is None else cls.reopen(run)

    @classmethod
    def open(cls, out: Path | None, called: str) -> Self:
        """Make `out`, or a named folder below `runs/`. Raises LlmpyError for one in use, not empty or not writable."""
        run = cls(out or Path("runs"), made=[p for p in (out, *out.parents) if not os.path.exists(p)] if out else [])
        if out is None:
            with run._undone():
                path = _fresh(called)
            run = cls(path, made=[path, path.parent])
        with run._undone():
            run.path.mkdir(parents=True, exist_ok=True)
            run._take()
            _refuse_loss(run.path)
        return run

    @classmethod
    def reopen(cls, path: Path) -> Self:
        """Take the folder of a run to resume. Raises LlmpyError if it is missing, or if it is training already."""
        run = cls(path, made=[])
        with run._undone():
            if not is_run(path):
                raise LlmpyError("run.x", f"no run in {path}", "Name the folder of a run, or begin one with --out")
            run._take()
        run.resumed = True
        run.keep()
        return run

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """Within: the folder is let go if anything is wrong. Raises LlmpyError instead of OSError."""
        try:
            yield
        except OSError as error:
            self._let_go()
            fix = "choose another with --out, or check its permissions"
            raise LlmpyError(
                "run.x", f"cannot write to the run folder {self.path}: {error.strerror or error}", fix
            ) from None
        except LlmpyError:
            self._let_go()
            raise

    def keep(self) -> None:
        """The run has begun: its log and metrics are worth keeping whatever comes. Remove what a killed run left."""
        self._kept = True
        with contextlib.suppress(OSError):
            for path in [path for path in self.path.iterdir() if CUT_OFF.fullmatch(path.name)]:
                durable.remove(path)
            for path in (self.path / CHECKPOINTS).glob(".*.tmp"):
                shutil.rmtree(path)

    def discard(self) -> None:
        """If the run never began, remove its files and the folders made for it. Let others have it."""
        with signals_held_back():
            if not self._kept and self.path.is_dir():
                for name in os.listdir(self.path):
                    with contextlib.suppress(OSError):  # in use (Windows)
                        if name in OURS or CUT_OFF.fullmatch(name):
                            durable.remove(self.path / name)
            self._let_go()

    def _take(self) -> None:
        if not self._lock.take():
            what = f"{self.path} is in use: {self._lock.holder()} is training in it"
            raise LlmpyError("run.x", what, "Wait for its end, or choose another --out")
        HELD.append(self)

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
    """Make runs/d4-20261122-1503, with -2, -3 … after it where the minute already has one."""
    runs, stem = Path("runs"), f"{called.replace(':', '-')}-{time.strftime('%Y%m%d-%H%M')}"
    runs.mkdir(exist_ok=True)
    for name in itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2))):
        with contextlib.suppress(FileExistsError):  # of a run that started in this minute, or at this moment
            (runs / name).mkdir()
            return runs / name
    raise AssertionError("names are endless")


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
    return any(LLMC_DONE.fullmatch(entry.name) for entry in path.glob("DONE_*"))


def _refuse_loss(path: Path) -> None:
    """Raise LlmpyError if there is anything in `path` that training into it could overwrite or bury."""
    names = [name for name in sorted(os.listdir(path)) if name != LOCK and not CUT_OFF.fullmatch(name)]
    resume = f"--resume {shlex.quote(str(path))}"
    for found, what, fix in (
        (MODEL_FILE in names, "already holds a trained model", f"choose another --out, or go on with it: {resume}"),
        (is_run(path), "holds a run that was cut off", f"go on with it: {resume}"),
        (holds_llmc(path), "holds a run of llm.c", f"go on with it in another folder: {resume} --out …"),
        (names, f"is not empty ({', '.join(names[:3])})", "choose an empty or new folder with --out"),
    ):
        if found:
            raise LlmpyError("run.x", f"{path} {what}", fix)


def own_tokens(folder: Path) -> tuple[Path, ...]:
    """The tokens that a run made of text, if it did."""
    own = tuple(folder / part for part in PARTS)
    return own if all(path.is_file() for path in own) else ()


def write_config(folder: Path, options: TrainOptions, **more: Any) -> None:
    """What was trained, how and on what, for people and later tools; loading a model does not read it."""
    text = json.dumps({"llmpy": __version__, "options": options.as_record(), **more}, indent=2, ensure_ascii=False)
    data = (text + "\n").encode("utf-8", "surrogateescape")  # a path may hold bytes that are not text
    durable.write_whole(folder / CONFIG_FILE, lambda temporary: temporary.write_bytes(data))


def read_config(path: Path) -> dict[str, Any]:
    """The options in a config.json. Raises LlmpyError if there are none."""
    try:
        return dict(json.loads(path.read_text("utf-8", errors="surrogateescape"))["options"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LlmpyError("run.x", f"{path} cannot be read: {error}", "Begin a new run") from None
