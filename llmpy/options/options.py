"""What each verb of the command line can be told. Flags, help, defaults and checks all derive from here."""

from __future__ import annotations

import math
import os
import reprlib
import types
import typing
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from ..errors import LlmpyError
from ..model.config import NAMES
from ..system.command import command
from ..system.inputs import regular
from ..system.words import did_you_mean
from .recipes import RECIPES

KINDS = ("cosine", "linear", "constant", "wsd")

DTYPES = ("auto", "float32", "bfloat16")
DTYPE_TEXT = "arithmetic of the products (auto: bfloat16 where the CPU has it natively)"
ATTENTIONS = ("sdpa", "plain")
MODEL_FORMATS = ("llmc", "llmc-run", "hf", "native", "gguf")
FILE_DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_MODEL = "d3"
TRAINING_NAMES = ("tinyshakespeare", "tinystories", "fineweb", "fineweb-edu")
DATA_NAMES = (*TRAINING_NAMES, "hellaswag")
MODEL_NAMES = tuple(NAMES)  # that are downloaded
TOKEN_FORMATS = ("auto", "uint16", "uint32", "int32")
SHELLS = ("bash", "zsh", "fish")
CURVES = {  # of metrics.jsonl, with their titles
    "loss": "loss", "lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_s": "tokens per second",
    "share_of_peak": "share of peak (%)", "val_bits_per_byte": "validation bits per byte",
    "hellaswag": "HellaSwag accuracy (%)",
}  # fmt: skip
AXES = {  # of a plot: title, and unit
    "steps": ("step", 1), "tokens": ("tokens (millions)", 1e6), "time": ("training time (minutes)", 60),
}  # fmt: skip
PICTURES = (".png", ".svg", ".pdf", ".html")
OPS = (
    "linear_forward", "linear_backward", "attention_forward", "attention_backward", "classifier", "layernorm_forward",
    "residual_layernorm_forward", "layernorm_backward", "gelu_forward", "embedding_forward", "embedding_backward",
    "adamw", "global_norm", "narrow", "zero", "pack", "packed_linear_forward", "cache_fill", "attention_decode",
)  # fmt: skip
TRACKERS = ("tensorboard", "wandb", "trackio")
# When neither --minutes nor --steps is given, for a run always has an end: whichever comes first.
DEFAULT_MINUTES, DEFAULT_EPOCHS = 3.5, 10  # small texts are learnt by heart from about 8 epochs on (dev/LOG.md)

# What samples of a run on Python's own text continue: after the start of a text come mostly headings.
BUILTIN_PROMPT = "If the"  # without a blank: words carry theirs in front


def option(
    default: Any,
    text: str,
    *flags: str,
    choices: tuple[str, ...] = (),
    metavar: str = "",
    word: bool = False,
    each: bool = False,
    names: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that is also a flag, `--its-name`; `flags` are further spellings, a `word` goes without.

    Of a tuple's values a flag takes all that follow it, or with `each` one, and may come again. `names` are words that
    mean something, beside paths if `metavar` is one of those.
    """
    told = {"help": text, "flags": flags, "choices": choices, "metavar": metavar, "word": word, "each": each}
    return field(default=default, metadata=told | {"names": names})


def flag(of: Field[Any]) -> str:
    """The field `batch_size` → `--batch-size`."""
    return flag_of(of.name)


def options_of(kind: Any) -> list[Field[Any]]:
    """The fields of a dataclass of options that are flags."""
    return [f for f in fields(kind) if f.metadata]


def spelled(options: Any) -> list[str]:
    """The words of the command line that say what differs from the defaults."""
    words: list[str] = []
    for f in options_of(options):
        value = getattr(options, f.name)
        if value != f.default:
            words += [flag(f)] if value is True else [flag(f), str(value)]
    return words


@dataclass(frozen=True)
class TrainOptions:
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
        names=MODEL_NAMES,
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
    threads: int | None = option(None, "threads (default: one a core)")
    ranks: int = option(1, "processes that train together, over MPI; each has batches of -B rows")
    zero: bool = option(True, "of several ranks, each keeps its part of the optimizer's state; without, all of it")
    rank_timeout: float = option(15.0, "seconds without a sign of life after which a rank is given up, 0: never")
    dtype: str = option("auto", DTYPE_TEXT, choices=DTYPES)
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
        if self.steps != ONE_EPOCH:
            positive(self, "steps")
        if self.eval_batches != ALL_BATCHES:
            positive(self, "eval_batches")
        positive(self, "batch_size", "sequence_length", "total_batch", "minutes", "lr", "threads", "ranks")
        positive(self, "sample_tokens", "vocab_size", "give_up_after")
        not_negative(self, "warmup", "weight_decay", "clip", "seed", "eval_every", "sample_every", "skip_loss")
        not_negative(self, "skip_norm", "checkpoint_every", "keep", "keep_every", "recompute", "rank_timeout")
        not_negative(self, "recompute_layers")
        below(self, "seed", 1 << 32)
        below(self, "minutes", 1 << 30)  # two thousand years, and no arithmetic overflows
        below(self, "steps", 1 << 62)
        below(self, "warmup", 1 << 62)
        if self.recompute > 2:
            raise _refusal("recompute", self.recompute, "use 0, 1 or 2")
        for name in ("min_lr", "beta1", "beta2"):
            value, top = getattr(self, name), 1.0 if name == "min_lr" else math.nextafter(1.0, 0.0)
            if not 0 <= value <= top:
                raise _refusal(name, value, "use a number from 0 to 1" + ("" if top == 1 else ", below 1"))
        known(self, "schedule", KINDS)
        known(self, "dtype", DTYPES)

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
                raise _refusal("recipe", recipe, "use one of " + ", ".join(RECIPES))
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


@dataclass(frozen=True)
class DataOptions:
    """`llmpy data WHAT`."""

    what: tuple[str, ...] = option(
        (),
        f"{', '.join(DATA_NAMES)}; or files and folders of .txt, .md, .jsonl, .jsonl.gz, .parquet",
        metavar="WHAT",
        word=True,
        names=DATA_NAMES,
    )
    tokenizer: str = option(
        "gpt2",
        "gpt2, bytes, bpe:N (trained on the text), or a tokenizer.json, .tiktoken or llm.c .bin file",
        metavar="WHAT",
        names=("gpt2", "bytes"),
    )
    source: Path | None = option(None, "the raw file or folder, already downloaded", metavar="PATH")
    out: Path | None = option(None, "folder of the tokens (default: the cache, or data/NAME for files)", metavar="DIR")
    tokens: int | None = option(None, "stop after so many tokens (hellaswag: examples)")
    format: str = option("auto", "int32: the stream without header of llm.rs and llm.mojo", choices=TOKEN_FORMATS)

    def __post_init__(self) -> None:
        positive(self, "tokens")
        known(self, "format", TOKEN_FORMATS)
        if self.tokenizer.startswith("bpe:"):
            size = self.tokenizer.removeprefix("bpe:")
            if not (size.isdecimal() and len(size) < 8 and 257 <= int(size) <= 1 << 16):
                raise _refusal("tokenizer", self.tokenizer, "use bpe:N with N from 257 to 65536")


@dataclass(frozen=True)
class SampleOptions:
    """`llmpy sample RUN`."""

    run: Path = option(
        Path(), "a run folder, any model that --init takes, or gpt2 …", metavar="RUN", word=True, names=MODEL_NAMES
    )
    prompt: tuple[str, ...] | None = option(
        None, "text to continue (default: the start of a text); give it again for further texts", each=True
    )
    prompts_file: Path | None = option(None, "file of further prompts, one a line", metavar="FILE")
    tokens: int = option(200, "tokens to add")
    temperature: float = option(0.5, "0: always the likeliest token; 1: as the model has it")
    top_k: int = option(50, "choose among this many likeliest tokens, 0: among all")
    top_p: float = option(1.0, "choose among the fewest that together have this probability")
    min_p: float = option(0.0, "leave out what is less likely than this share of the likeliest")
    repetition_penalty: float = option(1.0, "above 1: make tokens of the text so far less likely")
    stop: tuple[str, ...] | None = option(
        None, "end before this text; give it again for further ones (default: at <|endoftext|> alone)", each=True
    )
    ignore_eot: bool = option(False, "go on after <|endoftext|>, with another text")
    seed: int = option(1337, "seed of the choices; the second text has the next one, and so on")
    threads: int | None = option(None, "threads (default: one a core)")
    dtype: str = option("auto", DTYPE_TEXT, choices=DTYPES)
    cache: bool = option(True, "keep keys and values; without, the same text comes, slower")
    json: bool = option(False, "print one JSON object, with tokens and their log-probabilities")

    def __post_init__(self) -> None:
        known(self, "dtype", DTYPES)
        positive(self, "tokens", "seed", "threads")  # from seed 0 the generator would only draw zeros
        positive(self, "top_p", "repetition_penalty")
        not_negative(self, "temperature", "top_k", "min_p")
        below(self, "seed", 1 << 64)
        for name in ("top_p", "min_p"):
            if getattr(self, name) > 1:
                raise _refusal(name, getattr(self, name), "use a number from 0 to 1")
        if "" in (self.stop or ()):
            raise _refusal("stop", "''", "name a text of at least one character")


@dataclass(frozen=True)
class ChatOptions:
    """`llmpy chat RUN`."""

    run: Path = option(
        Path(), "a run folder, any model that --init takes, or gpt2 …", metavar="RUN", word=True, names=MODEL_NAMES
    )
    system: str | None = option(None, "what the model is told before the talk begins")
    tokens: int = option(256, "tokens of an answer at most")
    temperature: float = option(0.7, "0: always the likeliest token; 1: as the model has it")
    top_k: int = option(50, "choose among this many likeliest tokens, 0: among all")
    top_p: float = option(1.0, "choose among the fewest that together have this probability")
    min_p: float = option(0.0, "leave out what is less likely than this share of the likeliest")
    repetition_penalty: float = option(1.0, "above 1: make tokens of the talk so far less likely")
    seed: int = option(1337, "seed of the choices; the second answer has the next one, and so on")
    threads: int | None = option(None, "threads (default: one a core)")
    dtype: str = option("auto", DTYPE_TEXT, choices=DTYPES)

    def __post_init__(self) -> None:
        SampleOptions(**{f.name: getattr(self, f.name) for f in options_of(self) if f.name != "system"})


class OnMachine:
    """What several verbs have: how many threads compute, and in which arithmetic."""

    threads: int | None
    dtype: str

    def __post_init__(self) -> None:
        positive(self, "threads")
        known(self, "dtype", DTYPES)


@dataclass(frozen=True)
class PlanOptions(OnMachine):
    """`llmpy plan`."""

    model: str = option("gpt2", "size, as in train", "-e")
    batch_size: int = option(4, "rows of a batch of one machine", "-B", "-b")
    sequence_length: int = option(1024, "tokens of a row; train takes 128 unless told", "-T", "-t")
    total_batch: int | None = option(
        None, "tokens of an update, gathered over batches and machines (default: a batch of each)", "-d",
        metavar="TOKENS",
    )  # fmt: skip
    tokens: int | None = option(None, "tokens to train on, beside what others recommend", metavar="TOKENS")
    vocab_size: int | None = option(
        None, "tokens of the vocabulary (default: GPT-2's 50257; of your own text train makes one of 512 to 8192, and "
        "says so)",
    )  # fmt: skip
    recompute: int = option(1, "activations computed again in backward, as in train", "-r")
    recompute_layers: int | None = option(None, "of so many layers, the last ones; by default of all")
    checkpoint_every: int = option(250, "steps between checkpoints, 0: only at the end", "-n")
    keep: int = option(2, "newest checkpoints to keep, 0: all", "-nk")
    keep_every: int = option(0, "never remove checkpoints of steps that this divides, 0: none", "-nm")
    nodes: int = option(1, "machines like this one: data parallel, moments divided among them (ZeRO-1)")
    bandwidth: float | None = option(None, "of the network: Gbit/s of each machine, in and out at once")
    latency: float = option(50.0, "of the network: microseconds of a message")
    price_per_hour: float | None = option(None, "of one machine, in any currency")
    peak: float | None = option(None, "of a machine other than this one: GFLOP/s of multiply-adds")
    memory_bandwidth: float | None = option(None, "of that machine: GB/s of a stream")
    memory: float | None = option(None, "of that machine: GB (default: what is free here)")
    recipe: str | None = option(None, "options of a script of llm.c; others given win", choices=tuple(RECIPES))
    threads: int | None = option(None, "threads (default: one a core)")
    dtype: str = option("auto", DTYPE_TEXT, choices=DTYPES)
    json: bool = option(False, "print one JSON object")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "batch_size", "sequence_length", "total_batch", "tokens", "vocab_size", "nodes", "bandwidth")
        positive(self, "price_per_hour", "peak", "memory_bandwidth", "memory")
        not_negative(self, "latency", "checkpoint_every", "keep", "keep_every", "recompute", "recompute_layers")
        below(self, "nodes", 1 << 20)
        below(self, "tokens", 1 << 62)
        if self.recompute > 2:
            raise _refusal("recompute", self.recompute, "use 0, 1 or 2")
        if self.nodes > 1 and self.bandwidth is None:
            raise _refusal("nodes", self.nodes, "tell the network too: --bandwidth GBIT")

    @classmethod
    def gather(cls, given: Mapping[str, Any]) -> Self:
        """The options of a command line, and what it leaves open from --recipe."""
        names = {f.name for f in options_of(cls)}
        recipe = RECIPES.get(given.get("recipe", ""), {})
        return cls(**{name: value for name, value in recipe.items() if name in names} | dict(given))


@dataclass(frozen=True)
class DecodeOptions(OnMachine):
    """`llmpy bench decode`."""

    model: str = option("gpt2", "size, as in train")
    batch_size: int = option(1, "texts side by side", "-B")
    prompt_tokens: int = option(32, "tokens of each text before decoding begins")
    tokens: int = option(64, "tokens to decode and time")
    prefill: int = option(512, "tokens of a prefill to time against the peak of multiply-adds")
    threads: int | None = option(None, "threads (default: one a core)")
    dtype: str = option("auto", DTYPE_TEXT, choices=DTYPES)
    json: bool = option(False, "print one JSON object")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "batch_size", "prompt_tokens", "tokens", "prefill")


@dataclass(frozen=True)
class BenchOptions(OnMachine):
    """`llmpy bench step`."""

    model: str = option("gpt2", "size, as in train")
    batch_size: int = option(4, "rows of a batch", "-B")
    sequence_length: int = option(64, "tokens of a row", "-T")
    steps: int = option(10, "steps to time")
    threads: int | None = option(None, "threads (default: one a core)")
    dtype: str = option("auto", DTYPE_TEXT, choices=DTYPES)
    json: bool = option(False, "print one JSON object")
    cold: bool = option(False, "in a fresh process that has to compile every kernel first")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "batch_size", "sequence_length", "steps")


@dataclass(frozen=True)
class OpsOptions(OnMachine):
    """`llmpy bench ops`."""

    op: str | None = option(None, "only this operation, e.g. linear_forward (default: all)", metavar="NAME", names=OPS)
    threads: int | None = option(None, "threads (default: one a core)")
    dtype: str = option("auto", DTYPE_TEXT, choices=DTYPES)
    json: bool = option(False, "print one JSON object")


@dataclass(frozen=True)
class PeersOptions:
    """`llmpy bench peers`."""

    model: str = option("gpt2", "size, as in train")
    batch_size: int = option(4, "rows of a batch", "-B")
    sequence_length: int = option(64, "tokens of a row", "-T")
    steps: int = option(5, "steps of each program to time in a round")
    rounds: int = option(3, "times that each program runs, by turns")
    threads: int | None = option(None, "threads of every program (default: one a core)")
    peer: tuple[str, ...] | None = option(
        None,
        "further programs, each as 'name=command', that print llm.c's line 'step N: train loss X (took Y ms)'; "
        "the command may use $B, $T, $STEPS and $THREADS",
        metavar="NAME=COMMAND",
    )
    without: tuple[str, ...] | None = option(
        None, "leave out the programs whose name contains one of these words", metavar="WORD"
    )
    torch_python: Path | None = option(None, "the Python that has PyTorch (default: this one)", metavar="PYTHON")
    attention: str = option("sdpa", "PyTorch's attention", choices=ATTENTIONS)
    json: Path | None = option(None, "write everything measured to this file", metavar="FILE")
    plot: Path | None = option(None, "draw a box for each program into this file", metavar="FILE.png")

    def __post_init__(self) -> None:
        positive(self, "batch_size", "sequence_length", "steps", "rounds", "threads")
        known(self, "attention", ATTENTIONS)
        for text in self.peer or ():
            name, equals, command = text.partition("=")
            if not (equals and name.strip() and command.strip()):
                raise _refusal("peer", repr(text), "use --peer 'name=command'")


@dataclass(frozen=True)
class ConvertOptions:
    """`llmpy convert IN OUT`."""

    source: Path = option(
        Path(), "a run folder, an llm.c .bin, a Hugging Face folder, or gpt2 … of the hub", metavar="IN", word=True
    )
    target: Path = option(Path(), "what to write, which must not exist", metavar="OUT", word=True)
    to: str | None = option(
        None,
        "format of OUT: llmc, llmc-run (a folder that llm.c goes on from: moments and place in the data too), hf (a "
        "folder), native (a run folder) or gguf (default: by its name: .bin, .gguf, .safetensors; hf without a suffix)",
        choices=MODEL_FORMATS,
    )
    dtype: str | None = option(
        None, "type of the numbers in OUT (default: as in IN, if the format has it)", choices=FILE_DTYPES
    )

    def __post_init__(self) -> None:
        for name, choices in (("to", MODEL_FORMATS), ("dtype", FILE_DTYPES)):
            if getattr(self, name) is not None:
                known(self, name, choices)


@dataclass(frozen=True)
class DoctorOptions(OnMachine):
    """`llmpy doctor`."""

    network: bool = option(True, "ask the hub whether it answers")
    threads: int | None = option(None, "threads (default: one a core)")
    dtype: str = option("auto", DTYPE_TEXT, choices=DTYPES)
    json: bool = option(False, "print one JSON object")


@dataclass(frozen=True)
class CompletionOptions:
    """`llmpy completion SHELL`."""

    shell: str = option("", ", ".join(SHELLS), choices=SHELLS, word=True)

    def __post_init__(self) -> None:
        known(self, "shell", SHELLS)


@dataclass(frozen=True)
class SelftestOptions:
    """`llmpy selftest`."""

    model: Path | None = option(
        None, "check with this model, e.g. llm.c's gpt2_124M.bin (default: one of its own)", metavar="FILE"
    )
    debug_state: Path | None = option(
        None, "what llm.c says of that model: its gpt2_124M_debug_state.bin", metavar="FILE"
    )
    threads: int | None = option(None, "threads (default: one a core)")

    def __post_init__(self) -> None:
        positive(self, "threads")


@dataclass(frozen=True)
class WatchOptions:
    """`llmpy watch [RUN …]`."""

    runs: tuple[Path, ...] | None = option(
        None, "run folders, or folders of runs, where new runs appear by themselves (default: runs)", metavar="RUN",
        word=True,
    )  # fmt: skip
    port: int = option(8642, "port of the page, or the next free one")
    open: bool = option(False, "open the page in the browser")

    def __post_init__(self) -> None:
        positive(self, "port")
        below(self, "port", 1 << 16)


@dataclass(frozen=True)
class PlotOptions:
    """`llmpy plot [RUN …]`."""

    runs: tuple[Path, ...] | None = option(
        None, "run folders (default: the newest below runs)", metavar="RUN", word=True
    )
    out: Path | None = option(
        None, "write this file: .png, .svg, .pdf, or .html to zoom and hover in a browser", "-o", metavar="FILE"
    )
    terminal: bool = option(False, "draw in the terminal, as without -o")
    curves: tuple[str, ...] | None = option(None, "what to draw (default: loss; .html has all)", choices=tuple(CURVES))
    smooth: int | None = option(
        None, "steps to average over, 0: none (default: a hundredth of the run)", metavar="STEPS"
    )
    x: str = option(
        "steps", "x axis; time counts training steps only, and like tokens adds up over restarts", choices=tuple(AXES)
    )
    log: bool = option(False, "logarithmic y axis")

    def __post_init__(self) -> None:
        known(self, "x", tuple(AXES))
        not_negative(self, "smooth")
        below(self, "smooth", 1 << 53)
        for curve in self.curves or ():
            if curve not in CURVES:
                raise _refusal("curves", curve, "use some of " + ", ".join(CURVES))
        if self.out is not None and self.out.suffix.lower() not in PICTURES:
            raise _refusal("out", self.out, "use a name that ends in " + ", ".join(PICTURES))


def flag_of(name: str) -> str:
    """`batch_size` → `--batch-size`."""
    return "--" + name.replace("_", "-")


def plain(value: Any) -> Any:
    """A value as JSON and YAML have it."""
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def converted(options: type, name: str, value: Any) -> Any:
    """A value of JSON or YAML as the field wants it. Raises LlmpyError if it is of another kind."""
    hints = typing.get_type_hints(options)
    known_names = [f.name for f in options_of(options)]
    if name not in known_names:
        close = did_you_mean(name, known_names)
        raise LlmpyError(f"unknown option {name!r}", close or f"see {command('train', '--help')}")
    kinds = typing.get_args(hints[name]) if isinstance(hints[name], types.UnionType) else (hints[name],)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    try:
        if typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)[0]
            return tuple(inner(v) for v in (value if isinstance(value, list) else [value]))
        if kind is bool and not isinstance(value, bool):
            raise ValueError
        if kind is int and (isinstance(value, bool) or int(value) != float(value)):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        what = f"option {name}: {reprlib.repr(value)} is no {kind.__name__}"
        raise LlmpyError(what, "give it as for the flag") from None


def read_yaml(options: type, path: Path) -> dict[str, Any]:
    """The options that a YAML file names. Raises LlmpyError for a file that is no such thing."""
    import yaml

    try:
        found = yaml.safe_load(regular(path).read_text("utf-8")) or {}
    except OSError as fault:
        raise LlmpyError(f"cannot read {path}: {fault.strerror or fault}", "check --config") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as fault:
        raise LlmpyError(f"{path} is no YAML: {fault}", f"see {command('train', '--print-config')} for one") from None
    if not isinstance(found, dict):
        raise LlmpyError(f"{path} holds no options", f"write one a line, as {command('train', '--print-config')} does")
    named = {str(name).replace("-", "_"): value for name, value in found.items()}
    try:
        return {name: converted(options, name, value) for name, value in named.items() if name != "config"}
    except LlmpyError as fault:
        raise LlmpyError(f"{path}: {fault}") from None


def as_yaml(options: TrainOptions) -> str:
    """The options as a file for --config, one a line, in the order of --help."""
    import yaml

    return str(yaml.safe_dump(options.as_record(), sort_keys=False, allow_unicode=True))


def positive(options: Any, *names: str) -> None:
    """Raise LlmpyError unless each of these is above 0, or None where it may be left out."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise _refusal(name, value, "use a number above 0")


def not_negative(options: Any, *names: str) -> None:
    """Raise LlmpyError unless each of these is 0 or above, or None where it may be left out."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 <= value < math.inf:
            raise _refusal(name, value, "use 0 or a number above")


def below(options: Any, name: str, limit: int) -> None:
    """Raise LlmpyError unless the value is below the limit, a power of two, or None where it may be left out."""
    value = getattr(options, name)
    if value is not None and value >= limit:
        raise _refusal(name, value, f"use a number below 2^{limit.bit_length() - 1}")


def known(options: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raise LlmpyError unless the value is one of the choices."""
    value = getattr(options, name)
    if value not in choices:
        raise _refusal(name, value, f"{did_you_mean(str(value), choices)} use one of {', '.join(choices)}".lstrip())


def _refusal(name: str, value: Any, hint: str) -> LlmpyError:
    return LlmpyError(f"{flag_of(name)} {value}", hint)
