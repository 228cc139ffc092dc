"""What a run starts from: options and --init of a new one; record and newest checkpoint of one that is resumed.

new        --init's model, llm.c's state, or draws     + data as given    → config.json, whose paths hold anywhere
resumed    the newest sound checkpoint                 + the same data    options given again win, and are reported
           none was complete yet: from config.json as a new one
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .. import formats
from ..data.pack import is_dataset
from ..data.prepare import Dataset, Vocabulary, prepare
from ..errors import LlmpyError
from ..formats import hub, llmc_state, native
from ..formats.source import Source
from ..model.config import ModelConfig
from ..model.gpt2 import GPT2
from ..model.initialise import initialise
from ..options.train import DEFAULT_MODEL, TrainOptions
from ..run import checkpoint
from ..run.folder import CHECKPOINTS, CONFIG_FILE, TOKENIZER_FILE, RunFolder, is_ours, own_tokens, read_config
from ..system.words import count_of, duration

BUILTIN_VOCAB = 512  # tokens for the text that Python carries; with 1024 each is seen too seldom (dev/LOG.md)


@dataclass(frozen=True)
class RunStart:
    """What is known of a run before anything is downloaded, its data are read and its model is made."""

    options: TrainOptions
    config: ModelConfig | None = None  # of the model that it starts from; None: from scratch
    source: Source | None = None  # of the parameters; None: they are drawn, or downloaded first
    state: llmc_state.TrainingState | None = None  # of llm.c, that it continues from
    checkpoint: Path | None = None  # that it continues from, and its manifest
    manifest: dict[str, Any] | None = None
    errors: tuple[LlmpyError, ...] = ()  # why there is no model to start from

    @property
    def done(self) -> int:
        """Steps that are made."""
        return self.manifest["step"] if self.manifest else 0

    @property
    def elapsed(self) -> float:
        """Seconds that they and all else took."""
        return self.manifest["seconds"]["elapsed"] if self.manifest else 0.0

    def load(self, log: Callable[[str], None]) -> RunStart:
        """Return the same with its parameters at hand: downloaded, if they are a hub's."""
        source = self.source
        if source is None and self.options.init is not None:
            source = formats.resolve(self.options.init, log)
        if source is not None and self.manifest is None:
            log(f"init     {source.describe()}")
        return replace(self, source=source, config=self.config if source is None else source.config)

    def read_data(self, folder: Path, log: Callable[[str], None], rank: int = 0) -> Dataset:
        """Return the data: tokens that the run or its first rank made of text, or the shards or text that it was given.

        Tokens of a run without a checkpoint are made again: it may have been killed while it made them.
        """
        o = self.options
        own = own_tokens(folder) if rank or self.manifest is not None else ()
        if self.manifest is not None and o.data is None and not own:
            raise LlmpyError(
                "train.x", f"train.bin or val.bin in {folder} is missing", "Restore them, or begin a new run"
            )
        vocab_size = o.vocab_size
        if own and (folder / TOKENIZER_FILE).is_file():  # its vocabulary is that of the tokens
            vocab_size = None
        elif self.source is None and o.data is None:
            vocab_size = vocab_size or BUILTIN_VOCAB
        model = None
        if (source := self.source) is not None:
            load = partial(formats.tokenizer_of, source, log)
            model = Vocabulary(source.config.vocab_size, source.tokenizer, load)
        return prepare(own or o.data, folder, vocab_size, log, model, is_ours)

    def shape(self, data: Dataset) -> ModelConfig:
        """Return the shape of what is trained. Raises LlmpyError unless the data have the vocabulary of the model."""
        if self.config is None:
            return ModelConfig.from_dial(self.options.model, vocab_size=data.vocab_size)
        if self.config.vocab_size != data.vocab_size:
            raise LlmpyError(
                "train.x",
                f"the model of --init has {self.config.vocab_size:,} tokens, the data {data.vocab_size:,}",
                "Use data that were made with the model's tokenizer",
            )
        return self.config

    def fill(self, model: GPT2) -> None:
        """Set the parameters of a new run; those of a checkpoint come with its moments."""
        if self.manifest is not None:
            return
        if self.source is None:
            initialise(model.params, model.config, self.options.seed)
        else:
            self.source.fill(model.params)
        model.store_weights()


def resolve(options: TrainOptions, folder: RunFolder | None, log: Callable[[str], None]) -> RunStart:
    """Return what the run in `folder` starts from; None: a new one that has no folder yet.

    Raises LlmpyError if nothing sound is left of a run to resume.
    """
    if folder is not None and folder.resumed:
        return saved(options, folder, log)
    return fresh(options if options.resume is None else options.taking_over(), log)


def fresh(options: TrainOptions, log: Callable[[str], None]) -> RunStart:
    """Return what a new run starts from, with paths that hold anywhere, for it may be resumed from another folder."""
    init, source, state, config = options.init, None, None, None
    try:
        if options.init_state:
            source, state = llmc_state.read_checkpoint(Path(str(init)))
        elif init in hub.NAMES:
            config = ModelConfig.from_dial(str(init))
        elif init is not None:
            source = formats.resolve(init, log)
        config = source.config if source is not None else config
        model = dial(options.model, config, source.describe() if source is not None else str(init))
    except LlmpyError as error:
        return RunStart(options, errors=(error,))
    if state is not None:
        log(f"going on after step {state.step} of llm.c's run, with its moments and its place in the data")
        if "shuffle" not in options.given:
            options = replace(options, shuffle=state.shuffle)
    return RunStart(replace(anywhere(options), model=model), config, source, state)


def anywhere(options: TrainOptions) -> TrainOptions:
    """Return the same with paths that hold in any folder."""
    data = options.data and tuple(path if is_dataset(path) else path.absolute() for path in options.data)
    init = options.init
    if init is not None and init not in hub.NAMES:
        init = str(Path(init).absolute())
    return replace(options, data=data, init=init, hellaswag=options.hellaswag and options.hellaswag.absolute())


def dial(model: str, have: ModelConfig | None, described: str = "") -> str:
    """Return --model as it was given, or the default, or the size of what the run starts from.

    Raises LlmpyError if the last two differ.
    """
    if have is None:
        return model or DEFAULT_MODEL
    if model and ModelConfig.from_dial(model, have.vocab_size, have.context) != have:
        raise LlmpyError(
            "train.x", f"--model {model} is not what --init is: {described}", "Leave --model out, or let them agree"
        )
    return model or f"d{have.layers}"


def saved(options: TrainOptions, folder: RunFolder, log: Callable[[str], None]) -> RunStart:
    """Return what a resumed run starts from: its newest sound checkpoint, or its start if it has none yet.

    Raises LlmpyError if all that is left of it is damaged.
    """
    found = checkpoint.newest(folder / CHECKPOINTS, log)
    if found is None:
        before = TrainOptions.from_record(read_config(folder / CONFIG_FILE))
        log("no checkpoint was complete: the run begins again from its start")
        now = options.resumed_from(before)
        return fresh(replace(now, model="" if now.init else now.model), log)  # --init says its size again
    path, manifest = found
    before = replace(TrainOptions.from_record(manifest["options"]), ranks=manifest.get("ranks", 1))
    now = anywhere(options.resumed_from(replace(before, dtype=manifest["dtype"])))
    if "init" in options.given and anywhere(options).init not in (None, before.init):
        raise LlmpyError(
            "train.x", f"--init cannot change within a run: it is {before.init}", "Leave it out, or use another --out"
        )
    if now.data != before.data and own_tokens(folder.path):
        raise LlmpyError(
            "train.x",
            f"--data cannot change within a run: {folder.path} goes on with the tokens it made of its text",
            "Leave it out, or begin another run with --out",
        )
    step, elapsed = manifest["step"], manifest["seconds"]["elapsed"]
    log(f"going on after step {step}, from {path}")
    if (now.steps is not None and step >= now.steps) or (now.seconds is not None and elapsed >= now.seconds):
        log(
            f"the run is at its end, with {count_of(step, 'step')} in {duration(elapsed)}; to train on give more "
            "--steps or --minutes than that: both count from its beginning"
        )
    for line in changed(replace(before, dtype=manifest["dtype"]), now):
        log(line)
    source = native.read_model(path / checkpoint.MODEL)
    return RunStart(now, source.config, source, checkpoint=path, manifest=manifest)


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
    for name in ("dtype", "lr", "schedule", "warmup", "min_lr", "steps", "minutes", "shuffle", "recompute"):
        if getattr(now, name) != getattr(before, name):
            yield f"{name} is {getattr(now, name)} instead of {getattr(before, name)} from here on"
