"""What each verb of the command line can be told. Flags, help, defaults and checks all derive from here."""

from __future__ import annotations

import math
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from .errors import LlmpyError
from .schedule import KINDS

DTYPES = ("auto", "float32", "bfloat16")
DTYPE_TEXT = "arithmetic of the products (auto: bfloat16 where the CPU has it natively)"
ATTENTIONS = ("sdpa", "plain")
MODEL_FORMATS = ("llmc", "hf", "native", "gguf")
FILE_DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_MODEL = "d3"
# When neither --minutes nor --steps is given, for a run always has an end: whichever comes first.
DEFAULT_MINUTES, DEFAULT_EPOCHS = 3.5, 10  # small texts are learnt by heart from about 8 epochs on (dev/LOG.md)

# What samples of a run on Python's own text continue: after the start of a text come mostly headings.
BUILTIN_PROMPT = "If the"  # without a blank: words carry theirs in front


def option(default: Any, text: str, *flags: str, choices: tuple[str, ...] = (), metavar: str = "") -> Any:
    """A dataclass field that is also a flag, `--its-name`; `flags` are further spellings."""
    told = {"help": text, "flags": flags, "choices": choices, "metavar": metavar}
    return field(default=default, metadata=told)


def flag(of: Field[Any]) -> str:
    """`batch_size` → `--batch-size`."""
    return "--" + of.name.replace("_", "-")


def spelled(options: Any) -> list[str]:
    """The words of the command line that say what differs from the defaults."""
    words: list[str] = []
    for f in fields(options):
        value = getattr(options, f.name)
        if value != f.default:
            words += [flag(f)] if value is True else [flag(f), str(value)]
    return words


@dataclass(frozen=True)
class TrainOptions:
    """`llmpy train`."""

    data: tuple[Path, ...] | None = option(
        None,
        "text files, folders of text, or .bin shards (default: text that Python carries)",
        metavar="PATH",
    )
    model: str = option(
        "",
        "size: d1 … d84, gpt2, gpt2-medium, gpt2-large, gpt2-xl, gpt3:c768 "
        f"(default: {DEFAULT_MODEL}, or what --init is)",
    )
    init: str | None = option(
        None,
        "start from this model: gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded once), or a run folder, an "
        "llm.c .bin or a Hugging Face folder (default: from scratch)",
        metavar="MODEL",
    )
    out: Path | None = option(None, "folder of this run (default: runs/MODEL-DATE-TIME)", metavar="RUN")
    batch_size: int = option(4, "rows of a batch", "-B")
    sequence_length: int = option(128, "tokens of a row, and the reach of samples", "-T")
    steps: int | None = option(
        None, f"stop after this many steps (default: {DEFAULT_EPOCHS} epochs, none with --minutes)"
    )
    minutes: float | None = option(
        None, f"stop after this much training time (default: {DEFAULT_MINUTES:g}, none with --steps)"
    )
    lr: float | None = option(None, "peak learning rate (default: 6e-4 * 768 / channels)")
    schedule: str = option("cosine", "how the learning rate falls", choices=KINDS)
    warmup: int | None = option(None, "steps to the peak (default: a tenth of the run, at most 50)")
    min_lr: float = option(0.1, "learning rate at the end, as a fraction of the peak")
    weight_decay: float = option(0.1, "weight decay of the matrices")
    beta1: float = option(0.9, "AdamW: decay of the mean")
    beta2: float = option(0.95, "AdamW: decay of the square")
    clip: float = option(1.0, "largest norm of the gradient, 0: no limit")
    seed: int = option(42, "seed of initialisation and shuffling")
    threads: int | None = option(None, "threads (default: one a core)")
    dtype: str = option("auto", DTYPE_TEXT, choices=DTYPES)
    shuffle: bool = option(True, "visit the samples in random order")
    eval_every: int = option(250, "steps between evaluations, 0: only at the start and the end")
    eval_batches: int = option(20, "batches of an evaluation")
    sample_every: int = option(0, "steps between samples, 0: only at the end")
    sample_tokens: int = option(128, "tokens of a sample")
    prompt: str | None = option(
        None, f"what samples continue (default: the start of a text; {BUILTIN_PROMPT!r} without --data)"
    )
    vocab_size: int | None = option(None, "tokens of the vocabulary to train (default: by the text's size)")

    def __post_init__(self) -> None:
        positive(self, "batch_size", "sequence_length", "steps", "minutes", "lr", "threads", "eval_batches")
        positive(self, "sample_tokens", "vocab_size")
        not_negative(self, "warmup", "weight_decay", "clip", "seed", "eval_every", "sample_every")
        below(self, "seed", 1 << 32)
        below(self, "minutes", 1 << 30)  # two thousand years, and no arithmetic overflows
        below(self, "steps", 1 << 62)
        below(self, "warmup", 1 << 62)
        for name in ("min_lr", "beta1", "beta2"):
            value, top = getattr(self, name), 1.0 if name == "min_lr" else math.nextafter(1.0, 0.0)
            if not 0 <= value <= top:
                raise _refusal(name, value, "use a number from 0 to 1" + ("" if top == 1 else ", below 1"))
        known(self, "schedule", KINDS)
        known(self, "dtype", DTYPES)

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
            settled = replace(settled, lr=6e-4 * 768 / channels)
        if self.steps is None and self.minutes is None:
            batches = max(1, tokens // (self.batch_size * self.sequence_length))
            settled = replace(settled, steps=DEFAULT_EPOCHS * batches, minutes=DEFAULT_MINUTES)
        return settled


@dataclass(frozen=True)
class SampleOptions:
    """`llmpy sample RUN`."""

    run: Path = option(Path(), "folder of a run", metavar="RUN")
    prompt: str = option("", "text to continue (default: the start of a text)")
    tokens: int = option(200, "tokens to add")
    temperature: float = option(0.5, "0: always the likeliest token; 1: as the model has it")
    top_k: int = option(50, "choose among this many likeliest tokens, 0: among all")
    seed: int = option(1337, "seed of the choices")
    threads: int | None = option(None, "threads (default: one a core)")
    dtype: str = option("auto", DTYPE_TEXT, choices=DTYPES)

    def __post_init__(self) -> None:
        known(self, "dtype", DTYPES)
        positive(self, "tokens", "seed", "threads")  # from seed 0 the generator would only draw zeros
        not_negative(self, "temperature", "top_k")
        below(self, "seed", 1 << 64)


@dataclass(frozen=True)
class BenchOptions:
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
        positive(self, "batch_size", "sequence_length", "steps", "threads")
        known(self, "dtype", DTYPES)


@dataclass(frozen=True)
class OpsOptions:
    """`llmpy bench ops`."""

    op: str | None = option(None, "only this operation, e.g. linear_forward (default: all)", metavar="NAME")
    threads: int | None = option(None, "threads (default: one a core)")
    dtype: str = option("auto", DTYPE_TEXT, choices=DTYPES)
    json: bool = option(False, "print one JSON object")

    def __post_init__(self) -> None:
        positive(self, "threads")
        known(self, "dtype", DTYPES)


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

    source: Path = option(Path(), "a run folder, an llm.c .bin or a Hugging Face folder", metavar="IN")
    target: Path = option(Path(), "what to write, which must not exist", metavar="OUT")
    to: str | None = option(
        None,
        "format of OUT: llmc, hf (a folder), native (a run folder) or gguf (default: by its name: .bin, .gguf, "
        ".safetensors; hf without a suffix)",
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
    if getattr(options, name) not in choices:
        raise _refusal(name, getattr(options, name), "use one of " + ", ".join(choices))


def _refusal(name: str, value: Any, hint: str) -> LlmpyError:
    return LlmpyError(f"--{name.replace('_', '-')} {value}", hint)
