"""The folder of one run: its location, its lock, and protection from overwriting.

RUN/model.safetensors   the model of the latest checkpoint        config.json     options, machine, data
    best.safetensors    the model with the lowest validation loss
    tokenizer.json   train.bin   val.bin                          console.log     printed lines
    metrics.jsonl    all numbers of every step                    main.log        some of them, in llm.c's format
    samples.txt      generated samples                            checkpoints/    see checkpoint.py
    events/          TensorBoard events, with --track             run.lock        held by the training process
    start.safetensors   the initial model of `llmpy.Trainer`, until it ends

A run starts in a new or empty folder, so all files of these names are its own and are removed if the run is refused.
The lock of a dead process and temporary files of an interrupted save are allowed; the latter are removed on start.
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
LOGS = METRICS, MAIN, SAMPLES = "metrics.jsonl", "main.log", "samples.txt"  # --resume truncates them
CONSOLE = "console.log"
PARTS = "train.bin", "val.bin"  # tokens of the run's own text
TOKENS = {*PARTS, "train.mask", "val.mask"}
OURS = {MODEL_FILE, BEST_FILE, START_FILE, CONFIG_FILE, TOKENIZER_FILE, *TOKENS, *LOGS, CONSOLE}
LLMC_DONE = re.compile(r"DONE_(\d{1,18})")  # marks a complete llm.c checkpoint
# Left by a killed run: temporary files, as `durable` names them, and unfinished token files.
CUT_OFF = re.compile(rf"\.({'|'.join(map(re.escape, sorted(OURS)))})\.\d+\.tmp|{re.escape(SPOOL)}.*")

HELD: list[RunFolder] = []  # by this process; to be discarded before it ends


class RunFolder:
    """A run folder locked by this process until `discard`, which also removes it unless `keep` was called."""

    def __init__(self, path: Path, made: list[Path]) -> None:
        self.path = path
        self.resumed = False  # whether it holds a run to resume
        self._made = made
        self._kept = False
        self._lock = Lock(path / LOCK)

    @classmethod
    def claim(cls, options: TrainOptions) -> Self:
        """Return the folder of the run to resume, or a new one (also to resume llm.c's). Raises LlmpyError."""
        run, out, called = options.resume, options.out, options.called
        if run and out and os.path.realpath(run) != os.path.realpath(out) and not holds_llmc(run):
            what = f"--resume {run} continues in that folder, not in --out {out}"
            fix = f"Drop one of them, or start a new run from its model: --init {run} --out {out}"
            raise LlmpyError("option.conflict", what, fix)
        if run is None and options.auto_resume and out is not None and is_run(out):
            run = out
        if run is not None and holds_llmc(run) and not is_run(run):
            run, called = None, options.taking_over().called
        with signals_held_back():  # if a signal ends the program, the folder is in HELD or not created
            return cls.open(out, called) if run is None else cls.reopen(run)

    @classmethod
    def open(cls, out: Path | None, called: str) -> Self:
        """Create `out`, or runs/NAME. Raises LlmpyError if it is in use, not empty or not writable."""
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
        """Lock the folder of a run to resume. Raises LlmpyError if it is missing or in use."""
        run = cls(path, made=[])
        with run._undone():
            if not is_run(path):
                raise LlmpyError("run.missing", f"no run in {path}", "Pass a run folder, or start a run with --out")
            run._take()
        run.resumed = True
        run.keep()
        return run

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """Release the folder if the body fails. Raises LlmpyError instead of OSError."""
        try:
            yield
        except OSError as error:
            self._release()
            what = f"cannot write to the run folder {self.path}: {error.strerror or error}"
            raise LlmpyError("run.unwritable", what, "Choose another --out, or check its permissions") from None
        except LlmpyError:
            self._release()
            raise

    def keep(self) -> None:
        """Keep the folder from now on: the run has started. Remove temporary files of a killed run."""
        self._kept = True
        with contextlib.suppress(OSError):
            for path in [path for path in self.path.iterdir() if CUT_OFF.fullmatch(path.name)]:
                durable.remove(path)
            for path in (self.path / CHECKPOINTS).glob(".*.tmp"):
                shutil.rmtree(path)

    def discard(self) -> None:
        """Unlock the folder. If the run never started, remove its files and the folders created for it."""
        with signals_held_back():
            if not self._kept and self.path.is_dir():
                for name in os.listdir(self.path):
                    with contextlib.suppress(OSError):  # in use (Windows)
                        if name in OURS or CUT_OFF.fullmatch(name):
                            durable.remove(self.path / name)
            self._release()

    def _take(self) -> None:
        for name in sorted({*OURS - TOKENS, LOCK, CHECKPOINTS, EVENTS, "wandb"}):  # tokens are only read or replaced
            if (self / name).is_symlink():
                raise LlmpyError("run.symlink", f"{self / name} is a symbolic link", "Replace it by its target")
        if not self._lock.take():
            what = f"{self.path} is in use: {self._lock.holder()} is training in it"
            raise LlmpyError("run.in-use", what, "Wait until it ends, or choose another --out")
        HELD.append(self)

    def _release(self) -> None:
        """Drop the lock, and remove the folders created for a run that never started."""
        self._lock.drop()
        for path in [] if self._kept else self._made:
            with contextlib.suppress(OSError):  # not empty: others use it
                path.rmdir()
        if self in HELD:
            HELD.remove(self)

    def __truediv__(self, name: str) -> Path:
        return self.path / name


def finished(below: Path = Path("runs")) -> list[Path]:
    """Return the runs that hold a model, latest first."""
    models = (model for model in below.glob(f"*/{MODEL_FILE}") if model.is_file())
    return [m.parent for m in sorted(models, key=lambda m: m.stat().st_mtime, reverse=True)]


def _fresh(called: str) -> Path:
    """Create runs/d4-20261122-1503, with a suffix -2, -3 … if that exists."""
    runs, stem = Path("runs"), f"{called.replace(':', '-')}-{time.strftime('%Y%m%d-%H%M')}"
    runs.mkdir(exist_ok=True)
    for name in itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            (runs / name).mkdir()
            return runs / name
    raise AssertionError("names are endless")


def is_run(path: Path) -> bool:
    """Return whether `path` holds a run: our config.json, or a checkpoint."""
    with contextlib.suppress(LlmpyError):  # another program's
        if (path / CONFIG_FILE).is_file():  # a pipe would never end
            return bool(read_config(path / CONFIG_FILE))
    return any(path.glob(f"{CHECKPOINTS}/step-*"))


def is_ours(path: Path) -> bool:
    """Return whether a run started here or is starting; its logs and samples are not training data."""
    return (path / LOCK).exists() or is_run(path)


def holds_llmc(path: Path) -> bool:
    """Return whether `path` holds an llm.c checkpoint. Such a run is resumed in another folder."""
    return any(LLMC_DONE.fullmatch(entry.name) for entry in path.glob("DONE_*"))


def _refuse_loss(path: Path) -> None:
    """Raise LlmpyError if training into `path` could overwrite anything."""
    names = [
        name for name in sorted(os.listdir(path)) if name not in (LOCK, f"{LOCK}.held") and not CUT_OFF.fullmatch(name)
    ]
    resume = f"--resume {shlex.quote(str(path))}"
    for found, code, what, fix in (
        (MODEL_FILE in names, "run.finished", "holds a trained model", f"Choose another --out, or resume it: {resume}"),
        (is_run(path), "run.interrupted", "holds an interrupted run", f"Resume it: {resume}"),
        (holds_llmc(path), "run.llmc", "holds an llm.c run", f"Resume it in another folder: {resume} --out …"),
        (names, "run.not-empty", f"is not empty ({', '.join(names[:3])})", "Choose an empty or new folder with --out"),
    ):
        if found:
            raise LlmpyError(code, f"{path} {what}", fix)


def own_tokens(folder: Path) -> tuple[Path, ...]:
    """Return the token files that a run made of its text, if any."""
    own = tuple(folder / part for part in PARTS)
    return own if all(path.is_file() for path in own) else ()


def write_config(folder: Path, options: TrainOptions, **more: Any) -> None:
    """Write the options and `more` to config.json, for people, tools and --resume."""
    text = json.dumps({"llmpy": __version__, "options": options.as_record(), **more}, indent=2, ensure_ascii=False)
    data = (text + "\n").encode("utf-8", "surrogateescape")  # paths may not be UTF-8
    durable.write_whole(folder / CONFIG_FILE, lambda temporary: temporary.write_bytes(data))


def with_start(folder: Path, now: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the starts of a run recorded before the step of this one, and `now`, unless it only continues the last."""
    earlier = []
    with contextlib.suppress(LlmpyError, TypeError, KeyError):  # none, or lost
        earlier = [start for start in starts_of(read_record(folder / CONFIG_FILE)) if start["step"] < now["step"]]
    changes = {"step": now["step"], "weights": now["weights"]}
    return earlier if earlier and earlier[-1] | changes == now else [*earlier, now]


def starts_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the starts in a config.json; runs of 0.1.0 recorded the last one only. Raises KeyError."""
    first = {"step": 0, "ranks": 1, **{name: record[name] for name in ("llmpy", "options", "machine")}}
    return record.get("starts") or [first]


def read_config(path: Path) -> dict[str, Any]:
    """Return the options in a config.json. Raises LlmpyError if it has none."""
    return dict(read_record(path)["options"])


def read_record(path: Path) -> dict[str, Any]:
    """Return a config.json. Raises LlmpyError if it has no options."""
    try:
        record = dict(json.loads(path.read_text("utf-8", errors="surrogateescape")))
        return record | {"options": dict(record["options"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LlmpyError("run.bad-config", f"cannot read {path}: {error}", "Start a new run") from None
