"""The starting point of a run.

new       --init's model, llm.c's state, or random weights + the given data   → config.json, with absolute paths
resumed   the latest valid checkpoint + the same data; options given again override and are reported
          without a checkpoint: a new start from config.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .. import formats
from ..data.dataset_folder import is_dataset
from ..data.user_data import Dataset, Vocabulary, prepare
from ..errors import LlmpyError
from ..formats import hub, llmc_state, peft
from ..formats.source import Source
from ..model.config import ModelConfig
from ..model.families import with_adapters
from ..model.initialise import initialise
from ..model.language_model import LanguageModel
from ..options.train import DEFAULT_MODEL, TrainOptions
from ..run import checkpoint
from ..run.folder import CHECKPOINTS, CONFIG_FILE, TOKENIZER_FILE, RunFolder, is_ours, own_tokens, read_config
from ..system.command import command
from ..system.words import count_of, duration

BUILTIN_VOCAB = 4096  # samples of whole words; 512 gave 91 % (dev/LOG.md#built-in-text)


@dataclass(frozen=True)
class RunStart:
    """The starting point of a run, before anything is downloaded or read."""

    options: TrainOptions
    config: ModelConfig | None = None  # of the initial model; None: from scratch
    source: Source | None = None  # of the parameters; None: random, or not yet downloaded
    state: llmc_state.TrainingState | None = None  # of llm.c, to continue from
    checkpoint: Path | None = None  # to resume from, and its manifest
    manifest: dict[str, Any] | None = None
    errors: tuple[LlmpyError, ...] = ()  # why there is no initial model

    @property
    def done(self) -> int:
        """Completed steps."""
        return self.manifest["step"] if self.manifest else self.state.step if self.state else 0

    @property
    def elapsed(self) -> float:
        """Seconds of the run so far."""
        return self.manifest["seconds"]["elapsed"] if self.manifest else 0.0

    def load(self, log: Callable[[str], None]) -> RunStart:
        """Return the same with its parameters available, downloading a hub model."""
        source, o = self.source, self.options
        if source is None and o.init is not None:
            source = formats.resolve(o.init, log)
        if source is not None and o.lora is not None and self.manifest is None:
            source = replace(source, config=adapted(source.config, o, peft.base_hash(source)))
        if source is not None and self.manifest is None:
            log(f"init     {source.describe()}")
        return replace(self, source=source, config=self.config if source is None else source.config)

    def read_data(self, folder: Path, log: Callable[[str], None], rank: int = 0) -> Dataset:
        """Return the data: tokens that the run or its first rank encoded, or the given shards or text.

        A run without a checkpoint encodes its text again: it may have been killed while encoding.
        """
        o = self.options
        own = own_tokens(folder) if rank or self.manifest is not None else ()
        if self.manifest is not None and o.data is None and not own:
            what = f"train.bin or val.bin in {folder} is missing"
            raise LlmpyError("data.missing", what, "Restore them, or start a new run")
        vocab_size = o.vocab_size
        if own and (folder / TOKENIZER_FILE).is_file():  # it has the vocabulary of the tokens
            vocab_size = None
        elif self.source is None and o.data is None:
            vocab_size = vocab_size or BUILTIN_VOCAB
        model = None
        if (source := self.source) is not None:
            load = partial(formats.tokenizer_of, source, log)
            model = Vocabulary(source.config.vocab_size, source.tokenizer, load)
        val, before = (None, None) if own else (o.val, self.manifest and self.manifest["data"])
        row = o.sequence_length if o.pack and o.init is not None and not o.init_state else 0
        return prepare(own or o.data, folder, vocab_size, log, model, is_ours, val, before, row)

    def shape(self, data: Dataset) -> ModelConfig:
        """Return the model's shape. Raises LlmpyError if data and model differ in vocabulary size."""
        if self.config is None:
            return ModelConfig.from_dial(self.options.model, vocab_size=data.vocab_size)
        fewer = self.config.family != "gpt2" and data.vocab_size < self.config.vocab_size  # rows without tokens
        if self.config.vocab_size != data.vocab_size and not fewer:
            what = f"the model of --init has {self.config.vocab_size:,} tokens, the data {data.vocab_size:,}"
            raise LlmpyError("tokenizer.vocab-mismatch", what, "Use data encoded with the model's tokenizer")
        return self.config

    def fill(self, model: LanguageModel) -> None:
        """Set the parameters of a new run, and frozen ones; a checkpoint's are restored with its moments."""
        source, new, seed = self.source, self.manifest is None, self.options.seed
        if source is None:
            initialise(model.params, model.config, seed)
        elif new and source.adapters is not None:
            source.load_into(model)
        elif new or model.adapters is not None:
            source.fill(model.params)
        if new and model.adapters is not None and (source is None or source.adapters is None):
            initialise(model.trained, model.config, seed)
        model.store_weights()


def resolve(options: TrainOptions, folder: RunFolder | None, log: Callable[[str], None]) -> RunStart:
    """Return the starting point of the run in `folder`; None: a new run without a folder.

    Raises LlmpyError if the run to resume has no valid checkpoint left.
    """
    if folder is not None and folder.resumed:
        return saved(options, folder, log)
    return fresh(options if options.resume is None else options.taking_over(), log)


def fresh(options: TrainOptions, log: Callable[[str], None]) -> RunStart:
    """Return the starting point of a new run, with absolute paths: it may be resumed from another folder."""
    init, source, state, config = options.init, None, None, None
    try:
        if options.init_state:
            source, state = llmc_state.read_checkpoint(Path(str(init)))
        elif init is not None and hub.is_name(init):
            config = formats.config_of(init, log)
        elif init is not None:
            source = formats.resolve(init, log)
        config = source.config if source is not None else config
        if options.lora is None and (options.lora_alpha or options.lora_targets):
            raise LlmpyError("option.missing", "--lora-alpha and --lora-targets need --lora", "Add --lora 16")
        if options.lora is not None:
            if config is None:
                raise LlmpyError("option.missing", "--lora needs --init", "Add --init MODEL, the model to adapt")
            config = adapted(config, options)
        model = dial(options.model, config, source.describe() if source is not None else str(init))
    except LlmpyError as error:
        return RunStart(options, errors=(error,))
    if state is not None:
        check_more(options, options, state.step)
        log(f"resuming after step {state.step} of llm.c's run, with its moments and data position")
        if "shuffle" not in options.given:
            options = replace(options, shuffle=state.shuffle)
    return RunStart(replace(anywhere(options), model=model), config, source, state)


def adapted(config: ModelConfig, o: TrainOptions, base_hash: str = "") -> ModelConfig:
    """Return the config with the adapters of the options. Raises LlmpyError for unknown targets."""
    if config.lora is not None:
        what = f"--lora {o.lora}, but {o.init} has adapters already"
        fix = f"Drop --lora to train those, or merge them first: {command('convert', '--merge', o.init, 'OUT')}"
        raise LlmpyError("option.conflict", what, fix)
    assert o.lora is not None
    return with_adapters(config, o.lora, o.lora_alpha, o.lora_targets or (), str(anywhere(o).init), base_hash)


def anywhere(options: TrainOptions) -> TrainOptions:
    """Return the same with absolute paths."""
    data = options.data and tuple(path if is_dataset(path) else path.absolute() for path in options.data)
    init = options.init
    if init is not None and not hub.is_name(init):
        init = str(Path(init).absolute())
    val = options.val and tuple(path.absolute() for path in options.val)
    hellaswag = options.hellaswag and options.hellaswag.absolute()
    return replace(options, data=data, val=val, init=init, hellaswag=hellaswag)


def dial(model: str, have: ModelConfig | None, described: str = "") -> str:
    """Return --model as given, else the size of the initial model, else the default.

    Raises LlmpyError if --model and the initial model differ.
    """
    if have is None:
        return model or DEFAULT_MODEL
    if model and ModelConfig.from_dial(model, have.vocab_size, have.context) != replace(have, lora=None):
        raise LlmpyError("option.conflict", f"--model {model} differs from --init: {described}", "Drop --model")
    return model or (f"d{have.layers}" if have.family == "gpt2" else f"{have.family}:d{have.layers}")


def saved(options: TrainOptions, folder: RunFolder, log: Callable[[str], None]) -> RunStart:
    """Return the starting point of a resumed run: its latest valid checkpoint, or its start if it has none yet.

    Raises LlmpyError if all its checkpoints are corrupt.
    """
    found = checkpoint.newest(folder / CHECKPOINTS, log)
    if found is None:
        before = TrainOptions.from_record(read_config(folder / CONFIG_FILE))
        log("no complete checkpoint: restarting the run from the beginning")
        now = options.resumed_from(before)
        return fresh(replace(now, model="" if now.init else now.model), log)  # --init gives the size
    path, manifest = found
    before = replace(TrainOptions.from_record(manifest["options"]), ranks=manifest.get("ranks", 1))
    now = anywhere(options.resumed_from(replace(before, dtype=manifest["dtype"])))
    if "init" in options.given and anywhere(options).init not in (None, before.init):
        what = f"--init cannot change within a run: it is {before.init}"
        raise LlmpyError("resume.fixed-option", what, "Drop it, or start a new run with --out")
    if (now.data, now.val) != (before.data, before.val) and own_tokens(folder.path):
        what = f"--data and --val cannot change within a run: {folder.path} has its own tokens"
        raise LlmpyError("resume.fixed-option", what, "Drop it, or start a new run with --out")
    step, elapsed = manifest["step"], manifest["seconds"]["elapsed"]
    check_more(options, now, step)
    if now.minutes != before.minutes and now.seconds is not None and elapsed >= now.seconds:
        what = f"--minutes {now.minutes:g} counts from the start of the run, which has trained {duration(elapsed)}"
        raise LlmpyError("resume.fewer-steps", what, "Pass more, or drop it")
    log(f"resuming after step {step}, from {path}")
    if (now.steps is not None and step >= now.steps) or (now.seconds is not None and elapsed >= now.seconds):
        log(f"the run is complete: {count_of(step, 'step')} in {duration(elapsed)}")
        log("to continue, pass larger --steps or --minutes; both count from its start")
    for line in changed(replace(before, dtype=manifest["dtype"]), now):
        log(line)
    source = formats.open_model(path / checkpoint.MODEL)
    return RunStart(now, source.config, source, checkpoint=path, manifest=manifest)


def check_more(options: TrainOptions, now: TrainOptions, step: int) -> None:
    """Raise LlmpyError if the given --steps are fewer than the run to resume has trained."""
    if "steps" in options.given and now.steps is not None and step > now.steps:
        what = f"--steps {now.steps:,} counts from the start of the run, which has trained {step:,} steps"
        raise LlmpyError("resume.fewer-steps", what, "Pass more, or drop it")


def changed(before: TrainOptions, now: TrainOptions) -> Iterator[str]:
    """Yield the effect of each option that changed on resume."""
    B, T, b, t = now.batch_size, now.sequence_length, before.batch_size, before.sequence_length
    if (b, t) != (B, T):
        yield f"batch {B} x {T} instead of {b} x {t}: data order is kept, but results differ from now on"
    tokens, count = now.micro_steps * now.batch_tokens, before.micro_steps * before.batch_tokens
    if now.ranks != before.ranks:
        ranks = count_of(now.ranks, "rank")
        yield f"{ranks} instead of {before.ranks}: the rest of the epoch is divided again, in rank 0's order"
        if tokens != count:
            yield f"{tokens:,} tokens per step instead of {count:,}"
    elif now.micro_steps != before.micro_steps:
        batches = count_of(now.micro_steps, "micro-batch", "micro-batches")
        yield f"{batches} per step instead of {before.micro_steps}: {tokens:,} tokens instead of {count:,}"
    for name in ("dtype", "lr", "schedule", "warmup", "min_lr", "steps", "minutes", "shuffle", "recompute"):
        if getattr(now, name) != getattr(before, name):
            value, other = ("unset" if x is None else x for x in (getattr(now, name), getattr(before, name)))
            yield f"{name} is {value} instead of {other} from now on"
