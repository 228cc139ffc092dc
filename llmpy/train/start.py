"""What a run starts from: options and --init of a new one, of one that goes on its record and newest checkpoint.

new        --init's model, llm.c's state, or draws    + data as given    → config.json, whose paths hold anywhere
goes on    the newest sound checkpoint                + the same data    options given again win, and are told
           none was complete yet: from config.json as a new one
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from .. import backend, formats
from ..backend.machine import Machine
from ..data.pack import is_dataset
from ..data.prepare import Dataset, Vocabulary, prepare, text_for
from ..data.shards import fingerprint
from ..errors import LlmpyError
from ..formats import hub, llmc_state, native
from ..formats.source import Source
from ..model.config import ModelConfig
from ..model.gpt2 import GPT2
from ..model.initialise import initialise
from ..options.options import DEFAULT_MODEL, TrainOptions
from ..run import checkpoint
from ..run.folder import CHECKPOINTS, CONFIG_FILE, RunFolder, is_run, own_tokens, read_config, write_config
from ..system.words import count_of, duration
from .preflight import problems, together
from .single_process import Alone

BUILTIN_VOCAB = 512  # tokens for the text that Python carries; with 1024 each is seen too seldom (dev/LOG.md)
Marks = dict[str, list[dict[str, Any]]]  # fingerprints of the training and validation shards


@dataclass(frozen=True)
class Start:
    """What is there before data and model are."""

    options: TrainOptions
    machine: Machine
    paths: tuple[Path, ...] | None  # of the data; None: the text that Python carries
    vocab_size: int | None  # that a tokenizer of the text is to have, or the tokens are of
    source: Source | None  # of the parameters; None: they are drawn
    state: llmc_state.TrainingState | None = None  # of llm.c, that the run goes on from
    checkpoint: Path | None = None  # that it goes on from, and its manifest
    manifest: dict[str, Any] | None = None

    @property
    def done(self) -> int:
        """Steps that are made."""
        return self.manifest["step"] if self.manifest else 0

    @property
    def elapsed(self) -> float:
        """Seconds that they and all else took."""
        return self.manifest["seconds"]["elapsed"] if self.manifest else 0.0

    def read(self, folder: Path, world: Alone, say: Callable[[str], None]) -> Dataset:
        """The data, made into tokens by the first rank if they are text."""

        model = None
        if (source := self.source) is not None:
            load = partial(formats.tokenizer_of, source, say)
            model = Vocabulary(source.config.vocab_size, source.tokenizer, load)

        def made() -> Dataset:  # what the first rank has made of text, or the shards
            own = own_tokens(folder)
            return prepare(own or self.paths, folder, None if own else self.vocab_size, say, model, skip=is_run)

        o = self.options
        wanted = text_for(o.batch_size * o.ranks, o.sequence_length, o.overfit)
        return world.in_turn(lambda: prepare(self.paths, folder, self.vocab_size, say, model, wanted, is_run), made)

    def recognised(self, data: Dataset, folder: Path) -> Marks:
        """Fingerprints of the data. Raises LlmpyError if those of a run that goes on are others than before."""
        marks = {"train": [*map(fingerprint, data.train)], "val": [*map(fingerprint, data.val)]}
        before = self.manifest["data"] if self.manifest else marks
        if any(contents(before[part]) != contents(marks[part]) for part in marks):
            raise LlmpyError(f"the data are not those that {folder} was trained on", "restore them, or begin a new run")
        return marks

    def fill(self, model: GPT2, seed: int) -> None:
        """The parameters of a new run; those of a checkpoint come with its moments."""
        if self.manifest is not None:
            return
        if self.source is None:
            initialise(model.params, model.config, seed)
        else:
            self.source.fill(model.params)
        model.store_weights()


def of(
    options: TrainOptions, folder: RunFolder, machine: Machine | None, world: Alone, say: Callable[[str], None]
) -> Start:
    """What the run in `folder` starts from. Of a new one this leaves a record: from here on it can be resumed."""
    path = manifest = None
    if folder.resumed:
        options, path, manifest = world.in_turn(lambda: saved(options, folder, say))
    elif options.resume is not None:
        options = options.taking_over()
    ops = machine or load(options, world)
    if path is not None and manifest is not None:
        source = native.read_model(path / checkpoint.MODEL)
        return Start(options, ops, data_of(options, folder.path), None, source, None, path, manifest)
    options, start, state = world.in_turn(lambda: begin(options, folder.path, ops, say, world.local_size))
    if world.rank == 0:
        write_config(folder.path, options)
    vocab_size = options.vocab_size
    if start is None and options.data is None:
        vocab_size = vocab_size or BUILTIN_VOCAB
    return Start(options, ops, options.data, vocab_size, start, state)


def load(options: TrainOptions, world: Alone) -> Machine:
    """The CPU as the options want it."""
    return cast(Machine, backend.load("cpu", threads=world.threads(options), dtype=options.dtype))


def contents(marks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fingerprints without the names of the files, which may have been moved."""
    return [{name: value for name, value in mark.items() if name != "name"} for mark in marks]


def begin(
    options: TrainOptions,
    folder: Path,
    ops: Machine,
    say: Callable[[str], None],
    beside: int,
    known: Sequence[LlmpyError] = (),
) -> tuple[TrainOptions, Source | None, llmc_state.TrainingState | None]:
    """The options with the model's size and with paths that hold anywhere; what a new run starts from, if not from
    scratch; and the state of llm.c that it goes on from, if it does.

    `beside`: ranks on this machine. Raises LlmpyError for all that is `known` or can be known to be wrong, if possible
    before anything is downloaded.
    """

    def check(model: str, config: ModelConfig | None) -> None:
        if faults := [*known, *problems(replace(options, model=model), folder, ops, config, beside)]:
            raise together(faults)

    start, state, init, model = None, None, options.init, dial(options.model, None)
    if options.init_state and init is None:
        fault = LlmpyError("--init-state without --init", "name the checkpoint folder of llm.c: --init FOLDER")
        raise together([*known, fault])
    if init in hub.NAMES and not options.init_state:
        check(init, ModelConfig.from_dial(init))
    if init is not None:
        try:
            if options.init_state:
                start, state = llmc_state.read_checkpoint(Path(init))
            else:
                start = formats.resolve(init, say)
            model = dial(options.model, start)
        except LlmpyError as fault:  # its size is not known: a small batch of the default's shows what else is wrong
            least = replace(options, batch_size=1, sequence_length=1, total_batch=None, model="")
            raise together([*known, fault, *problems(least, folder, ops, beside=beside)]) from fault
        say(f"init     {start.describe()}")
    check(model, start.config if start else None)
    if state is not None:
        say(f"going on after step {state.step} of llm.c's run, with its moments and its place in the data")
        if "shuffle" not in options.given:
            options = replace(options, shuffle=state.shuffle)
    return replace(anywhere(options), model=model), start, state


def anywhere(options: TrainOptions) -> TrainOptions:
    """The same with paths that hold in any folder, for the run may go on from another."""
    data = options.data and tuple(path if is_dataset(path) else path.absolute() for path in options.data)
    init = options.init
    if init is not None and init not in hub.NAMES:
        init = str(Path(init).absolute())
    return replace(options, data=data, init=init, hellaswag=options.hellaswag and options.hellaswag.absolute())


def dial(model: str, start: Source | None) -> str:
    """What --model is: as it was given, or the default, or the size of what the run starts from.

    Raises LlmpyError if the last two are not the same.
    """
    if start is None:
        return model or DEFAULT_MODEL
    have = start.config
    if model:
        asked = ModelConfig.from_dial(model, have.vocab_size, have.context)
        if asked != have:
            raise LlmpyError(
                f"--model {model} is not what --init is: {start.describe()}", "leave --model out, or let them agree"
            )
    return model or f"d{have.layers}"


def shape(model: str, start: Source | None, data: Dataset) -> ModelConfig:
    """The shape of what is trained. Raises LlmpyError unless the data have the vocabulary of the model at the start."""
    if start is None:
        return ModelConfig.from_dial(model, vocab_size=data.vocab_size)
    if start.config.vocab_size != data.vocab_size:
        raise LlmpyError(
            f"the model of --init has {start.config.vocab_size:,} tokens, the data {data.vocab_size:,}",
            "use data that were made with the model's tokenizer",
        )
    return start.config


def saved(
    options: TrainOptions, folder: RunFolder, say: Callable[[str], None]
) -> tuple[TrainOptions, Path | None, dict[str, Any] | None]:
    """The options of a run that is to go on, and its newest checkpoint, if there is one yet: path and manifest.

    Raises LlmpyError if nothing sound is left of it.
    """
    path, manifest = checkpoint.newest(folder / CHECKPOINTS, say) or (None, None)
    if manifest is None:
        before = TrainOptions.from_record(read_config(folder / CONFIG_FILE))
        say("no checkpoint was complete: the run begins again from its start")
        now = options.resumed_from(before)
        return replace(now, model="" if now.init else now.model), None, None  # --init says its size again
    before = replace(TrainOptions.from_record(manifest["options"]), ranks=manifest.get("ranks", 1))
    now = anywhere(options.resumed_from(replace(before, dtype=manifest["dtype"])))
    if "init" in options.given and anywhere(options).init not in (None, before.init):
        raise LlmpyError(
            f"--init cannot change within a run: it is {before.init}", "leave it out, or use another --out"
        )
    if now.data != before.data and own_tokens(folder.path):
        raise LlmpyError(
            f"--data cannot change within a run: {folder.path} goes on with the tokens it made of its text",
            "leave it out, or begin another run with --out",
        )
    step, elapsed = manifest["step"], manifest["seconds"]["elapsed"]
    say(f"going on after step {step}, from {path}")
    if (now.steps is not None and step >= now.steps) or (now.seconds is not None and elapsed >= now.seconds):
        say(
            f"the run is at its end, with {count_of(step, 'step')} in {duration(elapsed)}; to train on give more "
            "--steps or --minutes than that: both count from its beginning"
        )
    for line in changed(replace(before, dtype=manifest["dtype"]), now):
        say(line)
    return now, path, manifest


def changed(before: TrainOptions, now: TrainOptions) -> Iterator[str]:
    """What options that changed on resume do to the sequence of batches and to the numbers."""
    B, T, b, t = now.batch_size, now.sequence_length, before.batch_size, before.sequence_length
    if (b, t) != (B, T):
        yield (
            f"batches of {B} x {T} instead of {b} x {t}: the rest of the data comes in the old order, cut anew; from "
            "here on the run differs from one that kept them"
        )
    tokens, count = now.micro_steps * now.batch_tokens, before.micro_steps * before.batch_tokens
    if now.ranks != before.ranks:
        yield (
            f"{count_of(now.ranks, 'rank')} instead of {before.ranks}: the rest of the epoch comes in the "
            f"order of the first one, divided anew; each step reads {tokens:,} tokens, before {count:,}"
        )
    elif now.micro_steps != before.micro_steps:
        yield (
            f"{count_of(now.micro_steps, 'batch', 'batches')} a step instead of {before.micro_steps}: their order "
            f"stays, but each step reads {tokens:,} tokens instead of {count:,}"
        )
    if now.threads != before.threads:
        yield "another number of threads: neither the order of the data nor any bit of the result depends on it"
    alone = ("dtype", "lr", "schedule", "warmup", "min_lr", "steps", "minutes", "shuffle")
    for name in (*alone, "recompute", "recompute_layers"):
        if getattr(now, name) != getattr(before, name):
            yield f"{name} is {getattr(now, name)} instead of {getattr(before, name)} from here on"


def data_of(options: TrainOptions, folder: Path) -> tuple[Path, ...]:
    """What to read for a run that goes on: its own tokens where it made them, else the shards it was given."""
    if own := own_tokens(folder):
        return own
    if options.data is None:
        raise LlmpyError(f"train.bin or val.bin in {folder} is missing", "restore them, or begin a new run")
    return options.data


def described(machine: Machine) -> dict[str, Any]:
    """The machine and what runs on it, for the run's records."""
    # platform.platform() starts a process; one that outlives a run killed just then would keep its lock for a moment.
    system = "-".join((platform.system(), platform.release(), platform.machine()))
    return {
        "threads": machine.threads, "isa": machine.isa, "dtype": str(machine.dtype), **machine.version_info(),
        "python": platform.python_version(), "platform": system, "command": sys.argv,
    }  # fmt: skip
