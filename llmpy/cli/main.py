"""The command `llmpy`: one function per verb. Flags come from the dataclasses in `options.py`.

Plain argparse, because the flags are generated anyway: jsonargparse words its faults over several
lines ("Parser key "lr": Expected a <class 'float'>"), annotates the help with Python types, and costs
90 ms of the half second in which --help must answer. NumPy and Numba are imported inside the verbs
for the same reason.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import sys
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn

from ..errors import LlmpyError, Unheard
from ..options.options import (
    MEANINGLESS,
    REFUSED,
    BenchOptions,
    ChatOptions,
    CompletionOptions,
    ConvertOptions,
    DataOptions,
    DecodeOptions,
    DoctorOptions,
    OpsOptions,
    PeersOptions,
    PlanOptions,
    PlotOptions,
    SampleOptions,
    SelftestOptions,
    TrainOptions,
    WatchOptions,
    as_yaml,
    flag,
    options_of,
)
from ..run.folder import HELD, RunFolder
from ..run.journal import silence
from ..system.command import called
from ..system.lock import InUse
from ..system.terminal import paint
from ..system.words import asked, nearest
from ..version import __version__

# Exit codes: of every verb, and what some say otherwise or beside.
CODES = {
    0: "done", 1: "a value, a file or the machine does not serve", 2: "no such option, or it lacks a value",
    130: "stopped by Ctrl-C",
}  # fmt: skip
CODES_OF: dict[str, dict[int, str]] = {
    "": {2: "no such option or verb, or it lacks a value", 3: "training gave NaN or infinity"},
    "train": {
        0: "done, also at the end of --minutes", 3: "training gave NaN or infinity",
        130: "stopped by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP (all is saved: go on with --resume RUN)",
    },
    "chat": {0: "the talk was ended", 130: "stopped by Ctrl-C before it began"},
    "doctor": {0: "this machine can train", 1: "something prevents that, or a value does not serve"},
    "watch": {0: "ended by Ctrl-C", 130: ""},
    "selftest": {0: "every check passed", 1: "one did not, or a value or a file does not serve"},
}  # fmt: skip
EXAMPLES = """examples:
  llmpy train                                   train on text that Python carries, for at most 3.5 minutes
  llmpy train --data my.txt --minutes 10        train on your own text (files or folders)
  llmpy train --resume runs/NAME                go on with a run that was stopped, killed or is to be longer
  llmpy data tinyshakespeare                    download a data set and make its tokens, with GPT-2's tokenizer
  llmpy sample runs/NAME --prompt "The"         continue a text with what was trained
  llmpy train --init gpt2 --data my.txt         fine-tune GPT-2 124M on your own text
  llmpy watch                                   show the runs below runs/ as they train, in the browser
  llmpy plot runs/NAME -o loss.png              draw the loss; without -o in the terminal
  llmpy convert runs/NAME my-gpt2               a folder for Hugging Face, from what was trained
  llmpy plan --model gpt2 -B 4 -T 1024          memory, time and tokens of a run, before it starts
  llmpy doctor                                  is this machine ready? what could be better?
  llmpy selftest                                is what this machine computes right?
  llmpy bench step                              a step of GPT-2 124M against this machine's peak
  llmpy bench peers                             the same against PyTorch, if it is installed

"""
# What other programs call verbs (""), and options of a verb.
ELSEWHERE = {
    "": {
        "generate": "sample", "finetune": "train --init MODEL", "resume": "train --resume RUN", "prepare": "data",
        "export": "convert", "help": "--help", "version": "--version",
    },
    "train": {
        "--epochs": "--steps N, -1 for one epoch, or --minutes",
        "--learning-rate": "--lr", "--max-steps": "--steps", "--max-iters": "--steps", "--iterations": "--steps",
        "--block-size": "--sequence-length", "--context": "--sequence-length", "--seq-len": "--sequence-length",
        "--batch": "--batch-size", "--grad-clip": "--clip", "--eval-interval": "--eval-every", "--output": "--out",
        "--gradient-accumulation-steps": "--total-batch TOKENS", "--precision": "--dtype", "--size": "--model",
        "--eval-iters": "--eval-batches", "--warmup-iters": "--warmup", "--warmup-steps": "--warmup",
        "--checkpoint": "--init or --resume", "--device": "--threads and --dtype; it trains on the CPU",
    },
    "sample": {"--length": "--tokens", "--max-new-tokens": "--tokens", "--num-samples": "--prompt several times"},
    "convert": {"--format": "--to"},
}  # fmt: skip

# Of each verb: what to type, and what that does.
EXAMPLES_OF: dict[str, tuple[tuple[str, str], ...]] = {
    "train": (
        ("llmpy train", "on text that Python carries"),
        ("llmpy train --data my.txt notes/ --minutes 10", "on your own"),
        ("llmpy train --init gpt2 --data my.txt --lr 3e-5 --steps 200", "fine-tune GPT-2"),
        ("llmpy train --data tokens/ --model gpt2 -B 4 -T 1024 --total-batch 524288", "from scratch, as llm.c does"),
        ("llmpy train --resume runs/NAME --minutes 30", "go on with a run, to 30 minutes in all"),
    ),
    "sample": (
        ('llmpy sample runs/NAME --prompt "Once upon a time"', "continue a text"),
        ('llmpy sample gpt2 --prompt "The capital of France is" --temperature 0 --tokens 10', "the likeliest tokens"),
        ("llmpy sample runs/NAME --prompts-file prompts.txt --json", "many texts, with log-probabilities"),
    ),
    "chat": (
        ("llmpy chat runs/NAME", "talk; Ctrl-C ends an answer, /quit the talk"),
        ('llmpy chat runs/NAME --system "Answer in one sentence." --temperature 0.3', "with a word beforehand"),
    ),
    "data": (
        ("llmpy data tinyshakespeare", "download a data set and make its tokens"),
        (
            "llmpy data my.jsonl.gz notes/ --tokenizer bpe:4096 --out tokens",
            "of your own files, with their own tokenizer",
        ),
    ),
    "convert": (
        ("llmpy convert runs/NAME my-gpt2", "a folder for Hugging Face"),
        ("llmpy convert runs/NAME model.gguf --dtype bfloat16", "for llama.cpp"),
        ("llmpy convert gpt2_124M.bin my-run --to native", "from llm.c, ready for sample and --init"),
    ),
    "plan": (
        ("llmpy plan --model gpt2 -B 4 -T 1024", "on this machine"),
        ("llmpy plan --model d3 --vocab-size 1024 -T 128", "as on text of your own: a vocabulary and rows of train's"),
        ("llmpy plan --recipe gpt2_124M --nodes 8 --bandwidth 10 --price-per-hour 0.40", "llm.c's run on eight"),
        ("llmpy plan --model d24 --peak 4000 --memory-bandwidth 400 --memory 256", "on a larger machine"),
    ),
    "doctor": (
        ("llmpy doctor", "everything"),
        ("llmpy doctor --no-network --json", "for a report of a fault"),
    ),
    "watch": (
        ("llmpy watch", "every run below runs/"),
        ("llmpy watch runs/NAME runs/OTHER --open", "two runs in the same charts, in the browser"),
    ),
    "plot": (
        ("llmpy plot runs/NAME runs/OTHER -o loss.svg", "for a paper"),
        ("llmpy plot runs/NAME runs/OTHER --x tokens", "as runs with batches of different sizes compare"),
        ("llmpy plot runs/NAME --terminal --curves loss lr", "here and now"),
    ),
    "selftest": (
        ("llmpy selftest", "against a reference in float64"),
        ("llmpy selftest --model gpt2_124M.bin --debug-state gpt2_124M_debug_state.bin", "against llm.c's own files"),
    ),
    "completion": (
        ('eval "$(llmpy completion bash)"', "in ~/.bashrc; zsh: in ~/.zshrc, after compinit"),
        ("llmpy completion fish > ~/.config/fish/completions/llmpy.fish", "once"),
    ),
    "bench step": (
        ("llmpy bench step --model gpt2 -B 4 -T 64 --dtype float32", "GPT-2 124M"),
        ("llmpy bench step --model d4 --cold", "with what compiling takes"),
    ),
    "bench ops": (("llmpy bench ops --op linear_forward --dtype bfloat16", "one operation"),),
    "bench decode": (("llmpy bench decode --model gpt2 --dtype float32 --json", "generation, batch 1"),),
    "bench peers": (
        ("llmpy bench peers --rounds 2 --steps 6 --plot peers.png", "against what is installed, with a picture"),
    ),
}


def train(options: TrainOptions) -> int:
    """Train a model."""
    if options.print_config:
        write(as_yaml(options))
        return 0
    from ..distributed import launch

    what = launch.needed(options.ranks, "ranks" in options.given)
    if what == "launch":
        for claimed in [*HELD]:  # the ranks claim it for themselves
            claimed.discard()
        return launch.run(options.ranks, sys.argv[1:])
    if what == "join":
        return train_together(options)

    # Before the heavy imports: of many runs that begin in one folder all but one leave at once.
    try:
        folder = RunFolder.claim(options)
    except InUse:
        raise
    except LlmpyError:
        folder = None  # asked again below, where it is told together with whatever else is wrong
    from ..train.trainer import train

    return train(options, folder=folder)


def train_together(options: TrainOptions) -> int:
    """Train a model as one of several ranks."""
    from ..distributed import launch
    from ..distributed.world import join
    from ..train.trainer import train

    joined = join(options)
    if joined is None:
        return train(options)
    with joined as world:
        code = train(options, world=world)
    return launch.conclude(code)


def sample(options: SampleOptions) -> int:
    """Continue a text with a trained model."""
    from ..generate.generation import sample

    sample(options, write)
    return 0


def chat(options: ChatOptions) -> int:
    """Talk with a model that was tuned on messages."""
    from .chat import chat

    chat(options)
    return 0


def data(options: DataOptions) -> int:
    """Make token files of a data set or of your own text."""
    from ..data.pack import data
    from ..run.folder import is_run

    data(options, say, is_run)
    return 0


def convert(options: ConvertOptions) -> int:
    """Write a model in another format: llm.c's, Hugging Face's, llmpy's, GGUF."""
    from ..formats.convert import convert

    convert(options, say)
    return 0


def plan(options: PlanOptions) -> int:
    """Tell what a run will need: memory, time, tokens, disk; on this machine or several."""
    from ..tools.plan import plan, table

    return tell(plan(options), table, options.json)


def doctor(options: DoctorOptions) -> int:
    """Look at this machine: CPU, threads, memory, caches, packages, network; a fix for each problem."""
    from ..tools.doctor import doctor, record, table

    numbers = record(doctor(options))
    tell(numbers, table, options.json)
    return 0 if numbers["can_train"] else 1


def completion(options: CompletionOptions) -> int:
    """Print what a shell needs to complete verbs, options and their values."""
    from .completion import script

    write(script(options.shell, build_parser()))
    return 0


def watch(options: WatchOptions) -> int:
    """Show runs as they train, on a page of this machine."""
    from ..watch.server import watch

    watch(options, say)
    return 0


def plot(options: PlotOptions) -> int:
    """Draw the curves of runs, into a file or the terminal."""
    from ..watch.plot import plot

    plot(options, say)
    return 0


def selftest(options: SelftestOptions) -> int:
    """Check what this machine computes, against a reference or llm.c's own files."""
    from ..tools.selftest import selftest

    return selftest(options, say)


def bench(options: BenchOptions) -> int:
    """Time whole training steps against the machine's peak."""
    from ..bench.step import bench_step, table

    return tell(bench_step(options), table, options.json)


def bench_ops(options: OpsOptions) -> int:
    """Time each operation on GPT-2's sizes against the machine's peaks."""
    from ..bench.ops import bench_ops, table

    return tell(bench_ops(options), table, options.json)


def bench_decode(options: DecodeOptions) -> int:
    """Time generation against what memory and multiply-adds allow."""
    from ..bench.decoding import bench_decode, table

    return tell(bench_decode(options), table, options.json)


def bench_peers(options: PeersOptions) -> int:
    """Time this program and others on the same work, by turns."""
    from ..bench.peers import bench_peers

    bench_peers(options, say)
    return 0


def tell(numbers: dict[str, Any], table: Callable[[dict[str, Any]], str], as_json: bool) -> int:
    """Print what was found, as one JSON object or for a reader; the exit code."""
    print(json.dumps(numbers) if as_json else table(numbers))
    return 0


def write(text: str) -> None:
    """To the terminal at once: generated text is read as it comes."""
    print(text, end="", flush=True)


def say(line: str) -> None:
    """A line of a verb that works meanwhile. Raises Unheard, for an OSError would be taken for a fault of its files."""
    try:
        print(line, flush=True)
    except OSError as fault:
        silence()
        raise Unheard(f"cannot write to standard output: {fault.strerror}") from fault


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code. Faults of the user and the machine are one line on stderr."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us (`>&-`)
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that lacks a character shows "?" for it
    try:
        try:
            return run(sys.argv[1:] if arguments is None else arguments)
        finally:
            flush()
    except LlmpyError as fault:
        left = isinstance(fault, Unheard) and isinstance(fault.__cause__, BrokenPipeError)  # the reader did (`| head`)
        return 1 if left else fail(str(fault), fault.code)
    except MemoryError as fault:
        return fail(f"out of memory: {fault} — use a smaller -B, -T or --model")
    except BrokenPipeError:  # the same
        return 1
    except OSError as fault:
        return fail(f"{fault.strerror or fault}" + (f": {fault.filename}" if fault.filename else ""))
    except KeyboardInterrupt:
        fail("stopped by Ctrl-C")
        return 130


def flush() -> None:
    """Standard output, here where a broken pipe is expected, and not at the interpreter's end."""
    try:
        sys.stdout.flush()
    except OSError:
        silence()
        raise


def fail(message: str, code: int = 1) -> int:
    """One line on stderr, if that is still there; the exit code."""
    with contextlib.suppress(OSError):
        print(paint("llmpy: error:", "red", sys.stderr), " ".join(message.split()), file=sys.stderr, flush=True)
    return code


def run(arguments: Sequence[str]) -> int:
    """Parse the command line and call its verb."""
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return 2
    arguments, passed = without_meaningless(arguments)
    if passed:
        told = ", ".join(f"{letter} ({MEANINGLESS[letter]})" for letter in passed)
        print(f"llmpy: note: passed over, as without effect here: {told}", file=sys.stderr)
    found, unknown = parser.parse_known_args(arguments)
    if unknown:
        found.parser.error(f"unknown argument {unknown[0]}{meant(found.VERB, unknown[0], found.parser.flags)}")
    given = {f.name: getattr(found, f.name) for f in options_of(found.options) if f.name in found}
    return int(found.verb(found.make({k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})))


def without_meaningless(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of `llmpy train` without what only llm.c's own program can do, and which those were."""
    words, passed = list(arguments), list[str]()
    for i in range(len(words) - 2, 0, -1):
        if words[0] == "train" and words[i] in MEANINGLESS and words[i + 1].lstrip("-").isdigit():
            passed.insert(0, words[i])
            del words[i : i + 2]
    return words, passed


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line that propose the nearest valid word."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        self.flags: list[str] = []

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help tells more)\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse passes over what the disk refuses; help that was asked for and did not come is a fault.
        if file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        # A wrong verb or choice; argparse lists all choices but proposes none before Python 3.14.
        if action.choices is not None and value not in action.choices:
            words = [str(c) for c in action.choices]
            what = "/".join(action.option_strings) or action.dest
            others = ELSEWHERE[""] if action.dest == "VERB" else {}
            hint = suggest(str(value), words, others) or f" — use {', '.join(words)}"
            self.error(f"{what} {value!r} is unknown{hint}")


def meant(verb: str, word: str, flags: Sequence[str]) -> str:
    """What to write for an argument that the verb does not know."""
    if verb == "train" and not word.startswith("-"):
        return f" — did you mean --data {word}?" if os.path.exists(word) else " — text is given with --data PATH"
    name = word.partition("=")[0]
    if verb == "train" and name in (letters := MEANINGLESS | REFUSED):
        return f" — {letters[name]}"
    dashes = name[: len(name) - len(name.lstrip("-"))]
    alike = [flag for flag in flags if flag.startswith(dashes)]
    return suggest(name, alike, ELSEWHERE.get(verb, {}))


def suggest(word: str, known: Sequence[str], others: Mapping[str, str]) -> str:
    """` — did you mean …?` with what is nearest of the known words, or ` — use …` of the `others`; or nothing."""
    close = [word.replace("_", "-")] if word.replace("_", "-") in others else nearest(word, [*known, *others])
    if close and close[0] in others:
        return f" — use {others[close[0]]}"
    return f" — {asked([c for c in close if c not in others])}" if close else ""


def build_parser() -> Parser:
    """The whole command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="llmpy",
        description="GPT-2 training in Python alone.",
        epilog=EXAMPLES.replace("  llmpy ", f"  {called()} ") + exit_codes(),
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"llmpy {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", dest="VERB", required=True)
    for name, function, options in (
        ("train", train, TrainOptions),
        ("sample", sample, SampleOptions),
        ("chat", chat, ChatOptions),
        ("data", data, DataOptions),
        ("convert", convert, ConvertOptions),
        ("plan", plan, PlanOptions),
        ("doctor", doctor, DoctorOptions),
        ("watch", watch, WatchOptions),
        ("plot", plot, PlotOptions),
        ("selftest", selftest, SelftestOptions),
        ("completion", completion, CompletionOptions),
    ):
        add_verb(verbs, name, function, options)
    benches = verbs.add_parser("bench", help="measure", description="Measure.", epilog=exit_codes("bench"))
    whats = benches.add_subparsers(metavar="WHAT", dest="WHAT", required=True)
    add_verb(whats, "step", bench, BenchOptions)
    add_verb(whats, "ops", bench_ops, OpsOptions)
    add_verb(whats, "decode", bench_decode, DecodeOptions)
    add_verb(whats, "peers", bench_peers, PeersOptions)
    return parser


def add_verb(verbs: Any, name: str, function: Any, options: type) -> None:
    """A verb with one flag for each field of its options."""
    text = function.__doc__
    parser = verbs.add_parser(name, help=text.rstrip(".").lower(), description=text)
    typed = parser.prog.partition(" ")[2]
    parser.epilog = examples(typed) + exit_codes(typed)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    make = getattr(options, "gather", lambda given: options(**given))
    parser.set_defaults(verb=function, options=options, make=make, parser=parser)
    types = typing.get_type_hints(options)
    for field in options_of(options):
        add_flag(parser, field, types[field.name])
    parser.flags = [s for action in parser._actions for s in action.option_strings]


def examples(verb: str) -> str:
    """What --help shows of a verb, a command a line and below it what it does."""
    lines = "".join(f"  {line}\n      {what}\n" for line, what in EXAMPLES_OF[verb])
    return f"examples:\n{lines}\n"


def exit_codes(verb: str = "") -> str:
    """What --help says of them."""
    told = sorted((CODES | CODES_OF.get(verb, {})).items())
    return textwrap.fill("exit codes: " + "; ".join(f"{code} {what}" for code, what in told if what))


def add_flag(parser: Parser, field: dataclasses.Field[Any], kind: Any) -> None:
    """The flag of one field; its type says how it is parsed; or a word without flag."""
    kind = next((k for k in typing.get_args(kind) if k is not NoneType), kind) if is_optional(kind) else kind
    told = field.metadata
    text = told["help"]
    if field.default is not None and field.default not in ("", False, (), Path()) and "default" not in text:
        text += f" (default: {shown(field.default)})"
    # What was not given is absent: a file of options may say it, or the run that goes on.
    settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if kind is bool:
        action = argparse.BooleanOptionalAction if field.default else "store_true"
        parser.add_argument(flag(field), action=action, **settings)
        for letter in told["flags"]:  # llm.c's take a number
            parser.add_argument(letter, type=zero_or_one, **settings | {"help": argparse.SUPPRESS})
        return
    if told["choices"]:
        settings["choices"] = told["choices"]
    else:
        settings["metavar"] = told["metavar"] or {int: "N", float: "X"}.get(kind, "TEXT")
    inner = kind
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        settings |= {"action": "append"} if told["each"] else {"action": "extend", "nargs": "+"}
    settings["type"] = named if inner is Path else inner
    if told["word"]:
        if typing.get_origin(kind) is tuple:
            settings["nargs"] = "*"
        parser.add_argument(settings.pop("dest"), **settings)
    else:
        parser.add_argument(*told["flags"], flag(field), **settings)


def zero_or_one(word: str) -> bool:
    """0 → False, 1 → True."""
    if word not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"use 0 or 1, not {word!r}")
    return word == "1"


def named(word: str) -> Path:
    """A file or folder. Path("") is the current folder, which nobody means by a shell variable that is not set."""
    if not word:
        raise argparse.ArgumentTypeError("the name of a file or folder is empty")
    return Path(word)


def is_optional(kind: Any) -> bool:
    """Whether a type is `… | None`."""
    return NoneType in typing.get_args(kind)


def shown(value: Any) -> str:
    """A default as the user would type it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
