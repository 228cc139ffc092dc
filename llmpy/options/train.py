"""Options of `llmpy train`, and what a run makes of those left open."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from ..errors import LlmpyError
from ..model.config import NAMES
from .data import TRAINING_NAMES
from .fields import (
    OnMachine,
    below,
    converted,
    flag_of,
    known,
    not_negative,
    option,
    options_of,
    plain,
    positive,
    read_yaml,
    refusal,
)
from .recipes import RECIPES

KINDS = ("cosine", "linear", "constant", "wsd")

DEFAULT_MODEL = "d3"
TRACKERS = ("tensorboard", "wandb", "trackio")
# When neither --minutes nor --steps is given, for a run always has an end: whichever comes first.
DEFAULT_MINUTES, DEFAULT_EPOCHS = 3.5, 10  # small texts are learnt by heart from about 8 epochs on (dev/LOG.md)

# What samples of a run on Python's own text continue: after the start of a text come mostly headings.
BUILTIN_PROMPT = "If the"  # without a blank: words carry theirs in front


@dataclass(frozen=True)
class TrainOptions(OnMachine):
    """`llmpy train`. Flags of one or two letters are llm.c's."""

    data: tuple[Path, ...] | None = option(
        None,
        "text files, folders of text, .bin shards, or a name of llmpy data (default: text that Python carries)",
        "-i",
        "-j",
        metavar="PATH",
        names=TRAINING_NAMES,
    )
    model: str = option(
        "",
        "size: d1 … d84, gpt2, gpt2-medium, gpt2-large, gpt2-xl, gpt3:c768 "
        f"(default: {DEFAULT_MODEL}, or what --init is)",
        "-e",
    )
    init: str | None = option(
        None,
        "start from this model: gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded once), or a run folder, an "
        "llm.c .bin or a Hugging Face folder (default: from scratch); then the defaults are llm.c's for fine-tuning: "
        "--schedule constant --weight-decay 0 --beta2 0.999 --clip 0",
        metavar="MODEL",
        names=tuple(NAMES),
    )
    init_state: bool = option(
        False, "with --init CHECKPOINT of llm.c: its moments and place in the data too, as --resume CHECKPOINT does"
    )
    out: Path | None = option(None, "folder of this run (default: runs/MODEL-DATE-TIME)", "-o", metavar="RUN")
    batch_size: int = option(4, "rows of a batch", "-B", "-b")
    sequence_length: int = option(128, "tokens of a row, and the reach of samples", "-T", "-t")
    total_batch: int | None = option(
        None, "tokens of an update, gathered over several batches (default: those of one)", "-d", metavar="TOKENS"
    )
    steps: int | None = option(
        None, f"stop after this many steps, -1: one epoch (default: {DEFAULT_EPOCHS} epochs, none with --minutes)", "-x"
    )
    minutes: float | None = option(
        None, f"stop after this much training time (default: {DEFAULT_MINUTES:g}, none with --steps)"
    )
    lr: float | None = option(
        None, "peak learning rate (default: 6e-4 * 768 / channels; with --init a sixth of that)", "-l"
    )
    schedule: str = option("cosine", "how the learning rate falls", "-k", choices=KINDS)
    warmup: int | None = option(None, "steps to the peak (default: a tenth of the run, at most 50)", "-u")
    min_lr: float = option(0.1, "learning rate at the end, as a fraction of the peak", "-q")
    weight_decay: float = option(0.1, "weight decay of the matrices", "-c")
    beta1: float = option(0.9, "AdamW: decay of the mean")
    beta2: float = option(0.95, "AdamW: decay of the square")
    clip: float = option(1.0, "largest norm of the gradient, 0: no limit")
    skip_loss: float = option(
        0.0, "skip the update if the loss is this many deviations above its mean, 0: never", "-sl"
    )
    skip_norm: float = option(0.0, "the same for the norm of the gradient", "-sg")
    give_up_after: int = option(5, "stop after this many steps in a row with NaN or infinity; each is skipped")
    overfit: bool = option(False, "train on the first batch of the validation text again and again", "-a")
    recompute: int = option(1, "activations computed again in backward, 0: none; 1: GELU; 2: LayerNorm too", "-r")
    recompute_layers: int | None = option(None, "of so many layers, the last ones; by default of all")
    seed: int = option(42, "seed of initialisation and shuffling")
    ranks: int = option(1, "processes that train together, over MPI; each has batches of -B rows")
    zero: bool = option(True, "of several ranks, each keeps its part of the optimizer's state; without, all of it")
    rank_timeout: float = option(15.0, "seconds without a sign of life after which a rank is given up, 0: never")
    shuffle: bool = option(True, "visit the samples in random order")
    eval_every: int = option(250, "steps between evaluations, 0: only at the start and the end", "-v")
    eval_batches: int = option(20, "batches of an evaluation, -1: all", "-m")
    hellaswag: Path | None = option(
        None, "tell the accuracy on this file of HellaSwag too, made by: llmpy data hellaswag", metavar="FILE"
    )
    sample_every: int = option(0, "steps between samples, 0: only at the end", "-s")
    sample_tokens: int = option(128, "tokens of a sample", "-g")
    prompt: str | None = option(
        None, f"what samples continue (default: the start of a text, or a question; {BUILTIN_PROMPT!r} without --data)"
    )
    vocab_size: int | None = option(None, "tokens of the vocabulary to train (default: by the text's size)")
    checkpoint_every: int = option(250, "steps between checkpoints, 0: only at the end", "-n")
    keep: int = option(2, "newest checkpoints to keep, 0: all", "-nk")
    keep_every: int = option(0, "never remove checkpoints of steps that this divides, 0: none", "-nm")
    resume: Path | None = option(
        None,
        "go on with this run; other options are the saved ones unless given again. Or, in a new folder, with that of "
        "llm.c in this folder, which has saved none: give them all",
        metavar="RUN",
    )
    auto_resume: bool = option(False, "go on with the run in --out if there is one", "-y")
    track: tuple[str, ...] | None = option(None, "send the numbers also to: " + ", ".join(TRACKERS), choices=TRACKERS)
    recipe: str | None = option(None, "options of a script of llm.c; others given win", choices=tuple(RECIPES))
    config: Path | None = option(None, "YAML file of options, names as here; flags win", metavar="FILE.yaml")
    print_config: bool = option(False, "print the options as such a file, and end")
    # Names of the options that the user gave himself: on --resume these win over the saved ones.
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps != ONE_EPOCH:
            positive(self, "steps")
        if self.eval_batches != ALL_BATCHES:
            positive(self, "eval_batches")
        positive(self, "batch_size", "sequence_length", "total_batch", "minutes", "lr", "ranks")
        positive(self, "sample_tokens", "vocab_size", "give_up_after")
        not_negative(self, "warmup", "weight_decay", "clip", "seed", "eval_every", "sample_every", "skip_loss")
        not_negative(self, "skip_norm", "checkpoint_every", "keep", "keep_every", "recompute", "rank_timeout")
        not_negative(self, "recompute_layers")
        below(self, "seed", 1 << 32)
        below(self, "minutes", 1 << 30)  # two thousand years, and no arithmetic overflows
        below(self, "steps", 1 << 62)
        below(self, "warmup", 1 << 62)
        if self.recompute > 2:
            raise refusal("recompute", self.recompute, "use 0, 1 or 2")
        for name in ("min_lr", "beta1", "beta2"):
            value, top = getattr(self, name), 1.0 if name == "min_lr" else math.nextafter(1.0, 0.0)
            if not 0 <= value <= top:
                raise refusal(name, value, "use a number from 0 to 1" + ("" if top == 1 else ", below 1"))
        known(self, "schedule", KINDS)

    @classmethod
    def gather(cls, given: Mapping[str, Any]) -> Self:
        """The options of a command line: its flags, else the file of --config, else --recipe, else the defaults.

        Raises LlmpyError for a file that cannot be read or says what no option understands.
        """
        values: dict[str, Any] = dict(given)
        if names_file(values.get("model", "")):  # llm.c's -e takes both
            values.setdefault("init", values.pop("model"))
        if path := values.get("config"):
            values = read_yaml(cls, path) | values
        if recipe := values.get("recipe"):
            if recipe not in RECIPES:
                raise refusal("recipe", recipe, "use one of " + ", ".join(RECIPES))
            values = RECIPES[recipe] | values
            if not values.get("data") and not values.get("resume") and not values.get("print_config"):
                raise LlmpyError(f"--recipe {recipe} needs --data", "give the shards of FineWeb: --data FOLDER")
        tuning = values.get("init") and not values.get("init_state")  # a run that goes on is no fine-tuning
        return cls(**(FINE_TUNING if tuning else {}) | values, given=frozenset(values))

    def as_record(self) -> dict[str, Any]:
        """What describes a run, as JSON: all but how it was told."""
        told = {f.name: getattr(self, f.name) for f in options_of(self) if f.name not in TELLING}
        return {name: plain(value) for name, value in told.items()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """The opposite of `as_record`. Raises LlmpyError for what no option understands."""
        return cls(**{name: converted(cls, name, value) for name, value in record.items()})

    def resumed_from(self, saved: Self) -> Self:
        """The saved options with those in their place that the user gave again.

        Raises LlmpyError for an option that cannot change within a run.
        """
        told = {name: getattr(self, name) for name in self.given if name not in TELLING | {"init", "init_state"}}
        # A file of --config may leave open what the run has settled.
        changes = {name: value for name, value in told.items() if (name, value) not in LEFT_OPEN and value is not None}
        for name in FIXED:
            if name in changes and changes[name] != getattr(saved, name):
                raise LlmpyError(
                    f"{flag_of(name)} cannot change within a run: it is {getattr(saved, name)}",
                    "leave it out, or begin another run with --out",
                )
        if not {"steps", "minutes"}.isdisjoint(changes):  # one that is given alone is the only bound, as in a new run
            changes = {"steps": None, "minutes": None} | changes
        launched = {name: getattr(self, name) for name in LAUNCHING}
        return replace(saved, **changes, **launched, resume=self.resume, given=self.given)

    def taking_over(self) -> Self:
        """For a run of llm.c that --resume names: it starts from the checkpoint there, in a folder of its own.

        Raises LlmpyError if it is to start from something else, too.
        """
        assert self.resume is not None
        if self.init is not None:
            raise LlmpyError(f"both --resume {self.resume} and --init {self.init}", "give one of them")
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
            near = max(1, round(total / tokens)) * tokens
            ranks = f" x {self.ranks} ranks" if self.ranks > 1 else ""
            raise LlmpyError(
                f"--total-batch {total} is no multiple of -B {self.batch_size} x -T {self.sequence_length}{ranks} = "
                f"{tokens}",
                f"use --total-batch {near}, or another -B",
            )
        return total // tokens

    @property
    def seconds(self) -> float | None:
        """The training time that bounds the run; None: only `steps` does."""
        return None if self.minutes is None else 60 * self.minutes

    def settled(self, channels: int, tokens: int) -> Self:
        """The same with what was left open decided for a model's width and a text's number of tokens."""
        settled = self
        if self.prompt is None:
            settled = replace(settled, prompt=BUILTIN_PROMPT if self.data is None else "")
        if self.lr is None:
            # 6e-4 is GPT-3's and llm.c's for 768 channels; 2e-3 was the best of three for 192 (dev/LOG.md).
            # 1e-4 is that of llm.c's program that fine-tunes.
            settled = replace(settled, lr=(6e-4 if self.init is None or self.init_state else 1e-4) * 768 / channels)
        if self.steps is None and self.minutes is None:
            settled = replace(settled, steps=DEFAULT_EPOCHS * self.epoch(tokens), minutes=DEFAULT_MINUTES)
        if self.steps == ONE_EPOCH:
            settled = replace(settled, steps=self.epoch(tokens))
        return settled

    def epoch(self, tokens: int) -> int:
        """Steps that read a text of so many tokens about once, as llm.c counts them."""
        return max(1, tokens // (self.total_batch or self.batch_tokens))


def names_file(model: str) -> bool:
    """Whether --model is given the file of a model, or its folder, where it wants a size."""
    return model.endswith(".bin") or bool({"/", os.sep} & set(model))


# Letters of llm.c that are passed over, about its GPUs and HellaSwag, and what serves instead; each takes a number.
MEANINGLESS = {
    "-z": "ZeRO-1 is on where there are --ranks; off with --no-zero",
    "-ge": "GELU is always part of the product before it",
    "-f": "use --dtype",
    "-w": "float32 weights are always kept",
    "-lg": "ask llmpy doctor",
    **dict.fromkeys(("-pn", "-pr", "-pg"), "use --ranks N, or mpiexec"),
    "-h": "use --hellaswag FILE",
}
# The same of letters that take a word, which are refused.
REFUSED = dict.fromkeys(("-pm", "-pi", "-ps", "-pp", "-pf"), "use --ranks N, or mpiexec")

# Of a run with --init what llm.c's CPU program, which fine-tunes GPT-2, has instead of the defaults; lr: `settled`.
FINE_TUNING: dict[str, Any] = {"schedule": "constant", "weight_decay": 0.0, "beta2": 0.999, "clip": 0.0}

# How a run is told, no part of what it is; and what cannot change within one.
LAUNCHING = ("ranks", "zero", "rank_timeout")
TELLING = {"out", "resume", "auto_resume", "recipe", "config", "print_config", *LAUNCHING}
LEFT_OPEN = (("model", ""), ("dtype", "auto"))
FIXED = ("model", "vocab_size", "seed", "overfit")
ONE_EPOCH = ALL_BATCHES = -1  # of --steps and --eval-batches, as in llm.c


def as_yaml(options: TrainOptions) -> str:
    """The options as a file for --config, one a line, in the order of --help."""
    import yaml

    return str(yaml.safe_dump(options.as_record(), sort_keys=False, allow_unicode=True))
