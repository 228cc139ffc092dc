"""Options of `llmpy train`, and what a run makes of those left open."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from ..errors import LlmpyError
from .fields import NOT_NEGATIVE, POSITIVE, SHARE, OnMachine, Range, converted, flag_of, option, options_of, plain
from .yaml_files import RECIPE_NAMES, read_recipe, read_yaml

ONE_EPOCH = ALL_BATCHES = -1  # of --steps and --eval-batches, as in llm.c
SEED = Range(0, (1 << 32) - 1, "a number from 0 to 2^32 - 1")
RECOMPUTE = Range(0, 2, "0, 1 or 2")
BETA = Range(0, math.nextafter(1.0, 0.0), "a number from 0 to 1, below 1")
KINDS = ("cosine", "linear", "constant", "wsd")
DEFAULT_MODEL = "d3"
TRACKERS = ("tensorboard", "wandb", "trackio")
# Without --minutes and --steps, for a run always has an end: whichever comes first.
DEFAULT_MINUTES, DEFAULT_EPOCHS = 3.5, 10  # small texts overfit from about 8 epochs on (dev/LOG.md)

# What samples of a run on Python's own text continue: after the start of a text come mostly headings.
BUILTIN_PROMPT = "If the"  # without a blank: words carry theirs in front


# fmt: off
@dataclass(frozen=True)
class TrainOptions(OnMachine):
    """`llmpy train`. For llm.c's letters see `llmc_letters`."""

    data: tuple[Path, ...] | None = option(
        None, "text files, folders of text, .bin shards, or a name of llmpy data (default: text that Python carries)",
        metavar="PATH",
    )
    model: str = option("", f"size: d1 … d84, gpt2, gpt2-medium …, gpt3:c768 (default: {DEFAULT_MODEL}, or --init's)")
    init: str | None = option(
        None, "fine-tune gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded once), a run folder, an llm.c .bin or a "
        "Hugging Face folder; defaults as in llm.c: --schedule constant --weight-decay 0 --beta2 0.999 --clip 0",
        metavar="MODEL",
    )
    # With init, a checkpoint of llm.c: its moments and place in the data too. --resume CHECKPOINT sets it, no flag.
    init_state: bool = option(False, "")
    out: Path | None = option(None, "folder of this run (default: runs/MODEL-DATE-TIME)", "-o", metavar="RUN")
    batch_size: int = option(4, "rows of a batch", "-B", within=POSITIVE)
    sequence_length: int = option(128, "tokens of a row, and the reach of samples", "-T", within=POSITIVE)
    total_batch: int | None = option(None, "tokens of an update (default: a batch)", metavar="TOKENS", within=POSITIVE)
    steps: int | None = option(
        None, f"stop after this many steps, -1: one epoch (default: {DEFAULT_EPOCHS} epochs, none with --minutes)",
        within=POSITIVE, special=ONE_EPOCH,
    )
    minutes: float | None = option(
        None, f"stop after this much training time (default: {DEFAULT_MINUTES:g}, none with --steps)", within=POSITIVE
    )
    lr: float | None = option(None, "peak learning rate (default: 0.46 / channels; --init: 0.077)", within=POSITIVE)
    schedule: str = option("cosine", "how the learning rate falls", choices=KINDS)
    warmup: int | None = option(None, "steps to the peak (default: a tenth, at most 50)", within=NOT_NEGATIVE)
    min_lr: float = option(0.1, "learning rate at the end, as a fraction of the peak", within=SHARE)
    weight_decay: float = option(0.1, "weight decay of the matrices", within=NOT_NEGATIVE)
    beta1: float = option(0.9, "AdamW: decay of the mean", within=BETA)
    beta2: float = option(0.95, "AdamW: decay of the square", within=BETA)
    clip: float = option(1.0, "largest norm of the gradient, 0: no limit", within=NOT_NEGATIVE)
    skip_loss: float = option(0.0, "skip updates of a loss this many deviations high, 0: none", within=NOT_NEGATIVE)
    skip_norm: float = option(0.0, "the same for the norm of the gradient", within=NOT_NEGATIVE)
    overfit: bool = option(False, "train on the first batch of the validation text again and again")
    recompute: int = option(1, "recomputed in backward, 0: nothing; 1: GELU; 2: LayerNorm too", within=RECOMPUTE)
    seed: int = option(42, "seed of initialisation and shuffling", within=SEED)
    ranks: int = option(1, "processes that train together, over MPI; each has batches of -B rows", within=POSITIVE)
    rank_timeout: float = option(15.0, "seconds without a heartbeat that end a rank, 0: never", within=NOT_NEGATIVE)
    shuffle: bool = option(True, "visit the samples in random order")
    eval_every: int = option(250, "steps between evaluations, 0: only at the start and the end", within=NOT_NEGATIVE)
    eval_batches: int = option(20, "batches of an evaluation, -1: all", within=POSITIVE, special=ALL_BATCHES)
    hellaswag: Path | None = option(None, "also evaluate on this file, made by llmpy data hellaswag", metavar="FILE")
    sample_every: int = option(0, "steps between samples, 0: only at the end", within=NOT_NEGATIVE)
    sample_tokens: int = option(128, "tokens of a sample", within=POSITIVE)
    prompt: str | None = option(None, "what samples continue (default: the start of a text, or a question)")
    vocab_size: int | None = option(None, "tokens of the vocabulary (default: by the text's size)", within=POSITIVE)
    checkpoint_every: int = option(250, "steps between checkpoints, 0: only at the end", within=NOT_NEGATIVE)
    keep: int = option(2, "newest checkpoints to keep, 0: all", within=NOT_NEGATIVE)
    resume: Path | None = option(
        None, "resume this run; other options are the saved ones unless given again. Or a run of llm.c, in a new "
        "folder: it saved no options, give them all", metavar="RUN",
    )
    auto_resume: bool = option(False, "resume the run in --out if there is one")
    track: tuple[str, ...] | None = option(None, f"send the numbers also to: {', '.join(TRACKERS)}", choices=TRACKERS)
    recipe: str | None = option(None, "options of a script of llm.c; others given win", choices=RECIPE_NAMES)
    config: Path | None = option(None, "YAML file of options, names as here; flags win", metavar="FILE.yaml")
    print_config: bool = option(False, "print the options as such a file, and end")
    # Names of the options that came from the command line, --config or --recipe: on --resume these win over the saved
    # ones, also where they hold a default.
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    # fmt: on

    @classmethod
    def gather(cls, given: Mapping[str, Any]) -> Self:
        """Return the flags, else --config's, --recipe's, or the defaults. Raises LlmpyError for an invalid file."""
        values: dict[str, Any] = dict(given)
        if names_file(values.get("model", "")):  # llm.c's -e takes both
            values.setdefault("init", values.pop("model"))
        if path := values.get("config"):
            values = read_yaml(cls, path) | values
        if recipe := values.get("recipe"):
            values = read_recipe(cls, recipe) | values
            if not values.get("data") and not values.get("resume") and not values.get("print_config"):
                what = f"--recipe {recipe} needs --data"
                raise LlmpyError("options.x", what, "Give the shards of FineWeb: --data FOLDER")
        tuning = values.get("init") and not values.get("init_state")  # a run that goes on is no fine-tuning
        return cls(**(FINE_TUNING if tuning else {}) | values, given=frozenset(values))

    def as_record(self) -> dict[str, Any]:
        """Return what describes a run, as JSON: all but how it was started."""
        return {f.name: plain(getattr(self, f.name)) for f in options_of(self) if f.name not in TELLING}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Return the options of an `as_record`, of older versions too. Raises LlmpyError for what none understands."""
        for name, default in DROPPED.items():
            if record.get(name, default) != default:
                what = f"this run was started with {flag_of(name)} {record[name]}, an option that no longer exists"
                raise LlmpyError("options.x", what, "Resume it with llmpy 0.1.0")
        return cls(**{name: converted(cls, name, value) for name, value in record.items() if name not in DROPPED})

    def resumed_from(self, saved: Self) -> Self:
        """Return the saved options, with those given again in place. Raises LlmpyError for one that cannot change."""
        told = {name: getattr(self, name) for name in self.given - TELLING - {"init", "init_state"}}
        # A file of --config may leave open what the run has settled.
        changes = {name: value for name, value in told.items() if value is not None and (name, value) not in LEFT_OPEN}
        for name in FIXED:
            if changes.get(name, there := getattr(saved, name)) != there:
                what = f"{flag_of(name)} cannot change within a run: it is {there}"
                raise LlmpyError("options.x", what, "Leave it out, or start another run with --out")
        if not {"steps", "minutes"}.isdisjoint(changes):  # one that is given alone is the only bound, as in a new run
            changes = {"steps": None, "minutes": None} | changes
        launched = {name: getattr(self, name) for name in LAUNCHING}
        return replace(saved, **changes, **launched, resume=self.resume, given=self.given)

    def taking_over(self) -> Self:
        """Return the options of a new run that resumes --resume, one of llm.c. Raises LlmpyError with --init."""
        assert self.resume is not None
        if self.init is not None:
            raise LlmpyError("options.x", f"both --resume {self.resume} and --init {self.init}", "Give one of them")
        return replace(self, init=str(self.resume.absolute()), init_state=True, resume=None)

    @property
    def called(self) -> str:
        """What the folder of the run is named for."""
        return self.model or (Path(self.init).resolve().stem if self.init else DEFAULT_MODEL)

    @property
    def batch_tokens(self) -> int:
        """Tokens of one batch of every rank."""
        return self.batch_size * self.sequence_length * self.ranks

    @property
    def micro_steps(self) -> int:
        """Batches of each rank that make an update. Raises LlmpyError if they do not fill `total_batch` exactly."""
        tokens = self.batch_tokens
        total = self.total_batch or tokens
        if total % tokens:
            product = f"-B {self.batch_size} x -T {self.sequence_length} x {self.ranks} ranks = {tokens}"
            near = max(1, round(total / tokens)) * tokens
            what = f"--total-batch {total} is no multiple of {product}"
            raise LlmpyError("options.x", what, f"Use --total-batch {near}, or another -B")
        return total // tokens

    @property
    def seconds(self) -> float | None:
        """The training time that bounds the run; None: only `steps` does."""
        return None if self.minutes is None else 60 * self.minutes

    def settled(self, channels: int, tokens: int) -> Self:
        """Return the same with everything decided, for a model's width and a text's number of tokens."""
        prompt, lr, steps, minutes = self.prompt, self.lr, self.steps, self.minutes
        if prompt is None:
            prompt = BUILTIN_PROMPT if self.data is None else ""
        if lr is None:
            # 6e-4 is GPT-3's and llm.c's for 768 channels; 2e-3 was the best of three for 192 (dev/LOG.md).
            # 1e-4 is that of llm.c's program that fine-tunes.
            lr = (6e-4 if self.init is None or self.init_state else 1e-4) * 768 / channels
        if steps is None and minutes is None:
            steps, minutes = DEFAULT_EPOCHS * self.epoch(tokens), DEFAULT_MINUTES
        if steps == ONE_EPOCH:
            steps = self.epoch(tokens)
        return replace(self, prompt=prompt, lr=lr, steps=steps, minutes=minutes)

    def epoch(self, tokens: int) -> int:
        """Return the steps that read a text of so many tokens about once, as llm.c counts them."""
        return max(1, tokens // (self.total_batch or self.batch_tokens))


def names_file(model: str) -> bool:
    """Return whether --model is given the file of a model, or its folder, instead of a size."""
    return model.endswith(".bin") or bool({"/", os.sep} & set(model))


# Of a run with --init what llm.c's CPU program, which fine-tunes GPT-2, has instead of the defaults; lr: `settled`.
FINE_TUNING: dict[str, Any] = {"schedule": "constant", "weight_decay": 0.0, "beta2": 0.999, "clip": 0.0}

# How a run is started, no part of what it is; and what cannot change within one.
LAUNCHING = ("ranks", "rank_timeout")
TELLING = {"out", "resume", "auto_resume", "recipe", "config", "print_config", *LAUNCHING}
LEFT_OPEN = (("model", ""), ("dtype", "auto"))
FIXED = ("model", "vocab_size", "seed", "overfit")
# Options of 0.1.0 that are gone, and their defaults, which records of its runs hold.
DROPPED: dict[str, Any] = {"give_up_after": 5, "recompute_layers": None, "keep_every": 0}
