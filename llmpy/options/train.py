"""Options of `llmpy train`, and how a run fills in those not given."""

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

ONE_EPOCH = ALL_BATCHES = -1  # values of --steps and --eval-batches, as in llm.c
SEED = Range(0, (1 << 32) - 1, "a number from 0 to 2^32 - 1")
RECOMPUTE = Range(0, 2, "0, 1 or 2")
BETA = Range(0, math.nextafter(1.0, 0.0), "0, or a number above 0 and below 1")
KINDS = ("cosine", "linear", "constant", "wsd")
DEFAULT_MODEL = "d3"
TRACKERS = ("tensorboard", "wandb", "trackio")
# The limits of a run without --minutes and --steps; the first one reached ends it.
DEFAULT_MINUTES, DEFAULT_EPOCHS = 3.5, 10  # small datasets overfit after about 8 epochs (dev/LOG.md)

# The prompt of samples on the built-in text (the documentation of Python and NumPy): many sentences start so.
BUILTIN_PROMPT = "If the"  # no trailing space: tokens include the space before a word
RECIPE_TEXT = f"options of an llm.c script, overridden by flags: {', '.join(RECIPE_NAMES)}"


# fmt: off
@dataclass(frozen=True)
class TrainOptions(OnMachine):
    """`llmpy train`. For llm.c's letters see `llmc_letters`."""

    data: tuple[Path, ...] | None = option(
        None, "files or folders of text, .bin shards, or a dataset of llmpy data (default: Python's documentation)",
        metavar="PATH",
    )
    val: tuple[Path, ...] | None = option(None, "validation data (default: by file name, or a tenth)", metavar="PATH")
    model: str = option(
        "", f"model size: d1 to d84, gpt2, gpt2-medium, gpt3:c768 ... (default: {DEFAULT_MODEL})", metavar="MODEL"
    )
    init: str | None = option(
        None, "fine-tune gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded once), a run folder, an llm.c .bin or a "
        "Hugging Face folder; new defaults, as in llm.c: --schedule constant --weight-decay 0 --beta2 0.999 --clip 0",
        metavar="MODEL",
    )
    lora: int | None = option(
        None, "train only adapters of rank R; the weights of --init are frozen", metavar="R", within=POSITIVE
    )
    lora_alpha: float | None = option(
        None, "adapters are scaled by X / R (default: 2 R)", metavar="X", within=POSITIVE
    )
    lora_targets: tuple[str, ...] | None = option(
        None, "linear layers with adapters, e.g. q_proj v_proj (default: all)", metavar="NAME"
    )
    # Also load the moments and data position of --init, an llm.c checkpoint. Not a flag: --resume CHECKPOINT sets it.
    init_state: bool = option(False, "")
    out: Path | None = option(None, "run folder (default: runs/MODEL-DATE-TIME)", "-o", metavar="RUN")
    batch_size: int = option(4, "sequences per batch", "-B", within=POSITIVE)
    sequence_length: int = option(128, "tokens per sequence, also the context of samples", "-T", within=POSITIVE)
    total_batch: int | None = option(None, "tokens per step (default: one batch)", metavar="TOKENS", within=POSITIVE)
    steps: int | None = option(
        None, f"stop after N steps; -1: one epoch (default: {DEFAULT_EPOCHS} epochs, no limit with --minutes)",
        within=POSITIVE, special=ONE_EPOCH,
    )
    minutes: float | None = option(
        None, f"stop after X minutes of training (default: {DEFAULT_MINUTES:g}, no limit with --steps)", within=POSITIVE
    )
    lr: float | None = option(
        None, "peak learning rate (default: 0.46 / channels; 0.077 with --init, 0.77 with --lora)", within=POSITIVE
    )
    schedule: str = option("cosine", "learning-rate schedule", choices=KINDS)
    warmup: int | None = option(None, "warm-up steps (default: a tenth of the run, at most 50)", within=NOT_NEGATIVE)
    min_lr: float = option(0.1, "final learning rate as a fraction of the peak", within=SHARE)
    weight_decay: float = option(0.1, "AdamW weight decay of the matrices", within=NOT_NEGATIVE)
    beta1: float = option(0.9, "AdamW decay rate of the first moment", within=BETA)
    beta2: float = option(0.95, "AdamW decay rate of the second moment", within=BETA)
    clip: float = option(1.0, "clip the gradient norm to X; 0: off", within=NOT_NEGATIVE)
    skip_loss: float = option(0.0, "skip steps X standard deviations above the mean loss; 0: off", within=NOT_NEGATIVE)
    skip_norm: float = option(0.0, "the same for the gradient norm; 0: off", within=NOT_NEGATIVE)
    verify_every: int = option(
        100, "compute the gradients of every N-th step twice and compare them to the bit; 0: never",
        within=NOT_NEGATIVE,
    )
    overfit: bool = option(False, "train on the first validation batch only")
    recompute: int = option(1, "recompute in backward; 0: nothing, 1: GELU, 2: GELU and LayerNorm", within=RECOMPUTE)
    seed: int = option(42, "random seed of initialization and shuffling", within=SEED)
    ranks: int = option(1, "data-parallel processes over MPI, each with its own batch", within=POSITIVE)
    rank_timeout: float = option(15.0, "seconds without a heartbeat that end a rank; 0: never", within=NOT_NEGATIVE)
    shuffle: bool = option(True, "shuffle the training data")
    pack: bool = option(True, "with --init, pack whole documents into rows of -T tokens, each apart from the others")
    eval_every: int = option(250, "steps between evaluations; 0: only at start and end", within=NOT_NEGATIVE)
    eval_batches: int = option(20, "batches per evaluation; -1: all", within=POSITIVE, special=ALL_BATCHES)
    hellaswag: Path | None = option(None, "also evaluate on this file of llmpy data hellaswag", metavar="FILE")
    sample_every: int = option(0, "steps between samples; 0: only at the end", within=NOT_NEGATIVE)
    sample_tokens: int = option(128, "tokens per sample", within=POSITIVE)
    prompt: str | None = option(None, "prompt of the samples (default: start of a document, or a question)")
    vocab_size: int | None = option(None, "vocabulary size (default: by the length of the text)", within=POSITIVE)
    checkpoint_every: int = option(250, "steps between checkpoints; 0: only at the end", within=NOT_NEGATIVE)
    keep: int = option(2, "number of newest checkpoints to keep; 0: all", within=NOT_NEGATIVE)
    resume: Path | None = option(
        None, "resume this run with its saved options, except those given again; or resume an llm.c run in a new "
        "folder, with all options given again", metavar="RUN",
    )
    auto_resume: bool = option(False, "resume the run in --out if it exists")
    track: tuple[str, ...] | None = option(None, f"also log to {', '.join(TRACKERS)}", metavar="NAME", choices=TRACKERS)
    recipe: str | None = option(None, RECIPE_TEXT, metavar="NAME", choices=RECIPE_NAMES)
    config: Path | None = option(None, "YAML file of options, named as here; flags override it", metavar="FILE.yaml")
    print_config: bool = option(False, "print the options as YAML for --config, and exit")
    # Names of options from the command line, --config or --recipe: they override saved ones, even with a default value.
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    # fmt: on

    @classmethod
    def gather(cls, given: Mapping[str, Any]) -> Self:
        """Return options from flags, --config, --recipe and defaults. Raises LlmpyError for an invalid file."""
        values: dict[str, Any] = dict(given)
        if path := values.get("config"):
            values = read_yaml(cls, path) | values
        if names_file(values.get("model", "")):  # as llm.c's -e
            values.setdefault("init", values.pop("model"))
        if recipe := values.get("recipe"):
            values = read_recipe(cls, recipe) | values
            if not values.get("data") and not values.get("resume") and not values.get("print_config"):
                what = f"--recipe {recipe} needs --data"
                raise LlmpyError("option.missing", what, "Pass the FineWeb shards: --data FOLDER")
        tuning = values.get("init") and not values.get("init_state")  # with init_state the run is resumed
        return cls(**(FINE_TUNING if tuning else {}) | values, given=frozenset(values))

    def as_record(self) -> dict[str, Any]:
        """Return the options that describe a run as JSON, without NOT_RECORDED."""
        return {f.name: plain(getattr(self, f.name)) for f in options_of(self) if f.name not in NOT_RECORDED}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Return the options of an `as_record`, also of older versions. Raises LlmpyError for an unsupported option."""
        for name, default in DROPPED.items():
            if record.get(name, default) != default:
                what = f"the run uses {flag_of(name)} {record[name]}, which no longer exists"
                raise LlmpyError("option.removed", what, "Resume it with llmpy 0.1.0")
        return cls(**{name: converted(cls, name, value) for name, value in record.items() if name not in DROPPED})

    def resumed_from(self, saved: Self) -> Self:
        """Return the saved options, overridden by those given. Raises LlmpyError for one that cannot change."""
        given = {name: getattr(self, name) for name in self.given - NOT_RECORDED - {"init", "init_state"}}
        # A --config file may leave open an option that the run has settled.
        changes = {name: value for name, value in given.items() if value is not None and (name, value) not in LEFT_OPEN}
        for name in FIXED:
            if changes.get(name, there := getattr(saved, name)) != there:
                what = f"{flag_of(name)} cannot change within a run: it is {there}"
                raise LlmpyError("resume.fixed-option", what, "Omit it, or start a new run with --out")
        if not {"steps", "minutes"}.isdisjoint(changes):  # one of them alone is the only limit, as in a new run
            changes = {"steps": None, "minutes": None} | changes
        launched = {name: getattr(self, name) for name in LAUNCHING}
        return replace(saved, **changes, **launched, resume=self.resume, given=self.given)

    def taking_over(self) -> Self:
        """Return the options of a new run that resumes an llm.c run. Raises LlmpyError if --init is given."""
        assert self.resume is not None
        if self.init is not None:
            raise LlmpyError("option.conflict", f"both --resume {self.resume} and --init {self.init}", "Pass one")
        return replace(self, init=str(self.resume.absolute()), init_state=True, resume=None)

    @property
    def called(self) -> str:
        """The first part of the run folder's default name."""
        return self.model or (Path(self.init).resolve().stem if self.init else DEFAULT_MODEL)

    @property
    def batch_tokens(self) -> int:
        """Tokens of one batch, all ranks together."""
        return self.batch_size * self.sequence_length * self.ranks

    @property
    def micro_steps(self) -> int:
        """Micro-batches per step and rank. Raises LlmpyError if `total_batch` is not a multiple of `batch_tokens`."""
        tokens = self.batch_tokens
        total = self.total_batch or tokens
        if total % tokens:
            product = f"-B {self.batch_size} x -T {self.sequence_length} x {self.ranks} ranks = {tokens}"
            near = max(1, round(total / tokens)) * tokens
            what = f"--total-batch {total} is not a multiple of {product}"
            raise LlmpyError("option.total-batch", what, f"Use --total-batch {near}, or another -B")
        return total // tokens

    @property
    def seconds(self) -> float | None:
        """The limit of training time in seconds; None if only `steps` limits the run."""
        return None if self.minutes is None else 60 * self.minutes

    def settled(self, channels: int, tokens: int, adapters: bool = False) -> Self:
        """Return the options with all defaults filled in, given the model's channels and the text's tokens.

        `adapters`: only those are trained.
        """
        prompt, lr, steps, minutes = self.prompt, self.lr, self.steps, self.minutes
        if prompt is None:
            prompt = BUILTIN_PROMPT if self.data is None else ""
        if lr is None:
            # 6e-4 as in GPT-3 and llm.c for 768 channels; 2e-3 was the best of three for 192 (dev/LOG.md).
            # 1e-4 as in llm.c's fine-tuning program; adapters need about ten times as much.
            # The built-in text has a large vocabulary for its size and batch: 1e-3 for 192 channels.
            new = 2.5e-4 if self.data is None else 6e-4
            lr = (new if self.init is None or self.init_state else 1e-3 if adapters else 1e-4) * 768 / channels
        if steps is None and minutes is None:
            steps, minutes = DEFAULT_EPOCHS * self.epoch(tokens), DEFAULT_MINUTES
        if steps == ONE_EPOCH:
            steps = self.epoch(tokens)
        return replace(self, prompt=prompt, lr=lr, steps=steps, minutes=minutes)

    def epoch(self, tokens: int) -> int:
        """Return the steps of about one epoch of this many tokens, rounded down as in llm.c."""
        return max(1, tokens // (self.total_batch or self.batch_tokens))


def names_file(model: str) -> bool:
    """Return whether --model names a file or folder instead of a size."""
    return model.endswith(".bin") or bool({"/", os.sep} & set(model))


# Defaults with --init, as in llm.c's CPU program, which fine-tunes GPT-2; for the learning rate see `settled`.
FINE_TUNING: dict[str, Any] = {"schedule": "constant", "weight_decay": 0.0, "beta2": 0.999, "clip": 0.0}

LAUNCHING = ("ranks", "rank_timeout")  # taken from the command line at each start
NOT_RECORDED = {"out", "resume", "auto_resume", "recipe", "config", "print_config", *LAUNCHING}
LEFT_OPEN = (("model", ""), ("dtype", "auto"))  # values that a run replaces
# Options that cannot change within a run.
FIXED = ("model", "vocab_size", "seed", "overfit", "pack", "lora", "lora_alpha", "lora_targets")
# Removed options of 0.1.0 with their defaults, present in records of its runs.
DROPPED: dict[str, Any] = {"give_up_after": 5, "recompute_layers": None, "keep_every": 0}
