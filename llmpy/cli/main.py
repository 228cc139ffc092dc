"""The command `llmpy`: a table of verbs. Flags come from the dataclasses in `options/`, examples from `help_text`.

Plain argparse: cyclopts, tyro and jsonargparse were measured on the same dataclasses (dev/LOG.md). A verb imports NumPy
and Numba when it is called, which keeps --help fast.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

from ..errors import LlmpyError, Stopped, unusable_library
from ..options.bench import BenchOptions, DecodeOptions, OpsOptions, PeersOptions
from ..options.data import DataOptions
from ..options.fields import Options, Reported, flags_of
from ..options.llmc_letters import LETTERS, translated
from ..options.sample_chat import ChatOptions, SampleOptions
from ..options.serve import ServeOptions
from ..options.tools import (
    CompletionOptions,
    ConvertOptions,
    DoctorOptions,
    PlanOptions,
    SelftestOptions,
    WarmupOptions,
)
from ..options.train import TrainOptions
from ..options.watch import PlotOptions, ReportOptions, WatchOptions
from ..options.yaml_files import as_yaml
from ..system.interrupts import on_signal
from ..system.terminal import generated, paint, printable, silence
from ..system.words import did_you_mean
from ..version import __version__
from .help_text import EPILOGS
from .parser import Parser, add_flags


def train(options: TrainOptions) -> int:
    """Train a model in this process, join as a rank, or launch the ranks."""
    if options.print_config:
        write(as_yaml(options))
        return 0
    from ..distributed import launch

    with on_signal(end):  # until the trainer handles them
        what = launch.needed(options.ranks, "ranks" in options.given)
        if what == "launch":
            return launch.run(options.ranks, sys.argv[1:])
        from ..train.assemble import train

        if what == "join":
            from ..distributed.world import join

            if (joined := join(options)) is not None:
                with joined as world:
                    code = train(options, world=world)
                return launch.conclude(code)
        return train(options)


def end(number: int, _frame: Any) -> NoReturn:
    """Exit before training has started, and discard the run's folder."""
    # Not an exception: libraries catch it, and LLVM's callbacks lose it. Import nothing here.
    folders, launch = (sys.modules.get(f"llmpy.{name}") for name in ("run.folder", "distributed.launch"))
    with on_signal(lambda *_: None):
        for folder in [*getattr(folders, "HELD", ())]:
            folder.discard()
        stopped = Stopped(number)
        leave_word = getattr(launch, "leave_word", None)
        if leave_word is None or not leave_word("stopped", str(number)):
            with contextlib.suppress(OSError):  # the terminal is gone
                os.write(2, f"llmpy: error: {stopped} [{stopped.code}]\n".encode())
        os._exit(stopped.exit_code)


def data(options: DataOptions) -> int:
    """Write token files; run folders are not text."""
    from ..data.dataset_folder import data
    from ..run.folder import is_ours

    data(options, log, is_ours)
    return 0


def doctor(options: DoctorOptions) -> int:
    """Print the checks of this machine; return 1 if an error prevents training."""
    from ..tools.doctor import doctor, record, table

    numbers = record(doctor(options))
    print(json.dumps(numbers) if options.json else table(numbers))
    return 0 if numbers["can_train"] else 1


def completion(options: CompletionOptions) -> int:
    """Print a shell-completion script."""
    import shtab

    write(shtab.complete(build_parser(), options.shell))
    return 0


def calling(module: str, name: str, *more: Any) -> Callable[[Any], int]:
    """Return a verb that imports and calls a module's function, and prints its result if its options are Reported."""

    def verb(options: Any) -> int:
        imported = importlib.import_module(f"llmpy.{module}")
        found = getattr(imported, name)(options, *more)
        if isinstance(options, Reported):
            print(json.dumps(found) if options.json else imported.table(found))
        return found if isinstance(found, int) else 0

    return verb


def write(text: str) -> None:
    """Print text without buffering: users read it while it is generated."""
    print(generated(text), end="", flush=True)


def log(line: str, spelled: Callable[[str], str] = printable) -> None:
    """Print a line of progress; work continues when the reader has closed the pipe."""
    try:
        print(spelled(line), flush=True)
    except OSError:
        silence()


show = partial(log, spelled=str)  # several lines, of our own


class Verb(NamedTuple):
    """A verb of the command line; `text` is its line in --help."""

    name: str
    options: type[Options]
    call: Callable[[Any], int]
    text: str


# fmt: off
VERBS = (  # in the order of --help
    Verb("train", TrainOptions, train, "Train or fine-tune a model, or resume a run"),
    Verb("sample", SampleOptions, calling("cli.sample", "sample", write), "Continue prompts with a model"),
    Verb("chat", ChatOptions, calling("cli.chat", "chat"), "Chat with a model fine-tuned on messages"),
    Verb("serve", ServeOptions, calling("serve.openai_server", "serve", log), "Serve a model over HTTP like OpenAI"),
    Verb("watch", WatchOptions, calling("watch.server", "watch", log), "Show live charts of runs in the browser"),
    Verb("plot", PlotOptions, calling("watch.plot", "plot", show), "Plot runs to a file or in the terminal"),
    Verb("report", ReportOptions, calling("watch.run_report", "report", log), "Write a run as a page that repeats it"),
    Verb("data", DataOptions, data, "Tokenize text or a named dataset"),
    Verb("convert", ConvertOptions, calling("formats.convert", "convert", log), "Convert a model to another format"),
    Verb("plan", PlanOptions, calling("tools.plan", "plan"), "Estimate memory, time, tokens and disk of a run"),
    Verb("doctor", DoctorOptions, doctor, "Check this machine and print fixes"),
    Verb("selftest", SelftestOptions, calling("tools.selftest", "selftest", log), "Check the kernels for correctness"),
    Verb("warmup", WarmupOptions, calling("tools.warmup", "warmup", log), "Compile all kernels into the cache"),
    Verb("bench step", BenchOptions, calling("bench.step", "bench_step"), "Time training steps"),
    Verb("bench ops", OpsOptions, calling("bench.ops", "bench_ops"), "Time each operation"),
    Verb("bench decode", DecodeOptions, calling("bench.decoding", "bench_decode"), "Time generation"),
    Verb("bench peers", PeersOptions, calling("bench.peers", "bench_peers", show), "Time other programs on this work"),
    Verb("completion", CompletionOptions, completion, "Print a shell-completion script"),
)
# fmt: on


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code. Print an error as one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # print "?" for a character that the console lacks
    try:
        try:
            return run(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()  # raise BrokenPipeError here, not when the interpreter exits
    except LlmpyError as error:
        return fail(f"{error} [{error.code}]", error.exit_code)
    except MemoryError as error:
        return fail(f"out of memory: {error}. Use a smaller -B, -T or --model [memory.exhausted]")
    except OSError as error:
        silence()
        if isinstance(error, BrokenPipeError):  # the reader has exited (`| head`)
            return 1
        return fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''} [system.os-error]")
    except KeyboardInterrupt as error:
        stopped = Stopped(*error.args or (signal.SIGINT,))
        return fail(f"{stopped} [{stopped.code}]", stopped.exit_code)
    except Exception as error:
        if (found := unusable_library(error)) is None:
            raise
        return fail(f"{found} [{found.code}]")


def fail(message: str, code: int = 1) -> int:
    """Print one line to stderr, if it is still open; return the exit code."""
    with contextlib.suppress(OSError):
        line = printable(" ".join(message.split()))
        print(paint("llmpy: error:", "red", sys.stderr), line, file=sys.stderr, flush=True)
    return code


def run(arguments: Sequence[str]) -> int:
    """Parse the command line and call its verb."""
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return 2
    if arguments[0] == "train":
        arguments, ignored = translated(arguments)
        if ignored:
            hints = ", ".join(f"{letter} ({LETTERS[letter]})" for letter in ignored)
            print(f"llmpy: note: ignored, no effect here: {hints}", file=sys.stderr)
    found, unknown = parser.parse_known_args(arguments)
    if unknown:
        word = unknown[0].partition("=")[0]
        near = did_you_mean(word, [flag for action in found.parser._actions for flag in action.option_strings])
        near = near or (found.VERB == "train" and not word.startswith("-") and "Pass text with --data") or ""
        found.parser.error(". ".join(filter(None, (f"unknown argument {unknown[0]}", near))))
    try:
        os.getcwd()
    except FileNotFoundError:
        raise LlmpyError("system.no-folder", "the current folder no longer exists", "Change to another: cd") from None
    given = {f.name: getattr(found, f.name) for f in flags_of(found.verb.options) if f.name in found}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    writes = found.verb.name in ("data", "convert", "plot", "report", "bench peers")
    with on_signal(stop) if writes else contextlib.nullcontext():
        return int(found.verb.call(found.verb.options.gather(given)))


def stop(number: int, _frame: Any) -> NoReturn:
    """End as Ctrl-C does, also on SIGTERM: unfinished files are removed."""
    raise KeyboardInterrupt(number)


def build_parser() -> Parser:
    """Return the parser of the whole command line."""
    usage = "llmpy [--help] [--version] VERB [--help] ..."
    about = "Train, fine-tune and sample GPT-2, Llama and Qwen on the CPU, in pure Python."
    parser = Parser(prog="llmpy", description=about, usage=usage, epilog=EPILOGS[""], add_help=False)
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"llmpy {__version__}", help=argparse.SUPPRESS)
    # A metavar longer than every verb: argparse ignores their indentation when it aligns the help.
    verbs = parser.add_subparsers(title="verbs", metavar="VERB [OPTIONS]", dest="VERB", required=True, prog="llmpy")
    groups = {"": verbs}
    for verb in VERBS:
        group, _, word = verb.name.rpartition(" ")
        if group not in groups:
            text = "Measure speed against this machine's peak"
            child = verbs.add_parser(group, help=text, description=f"{text}.")
            groups[group] = child.add_subparsers(metavar="WHAT", dest="WHAT", required=True)
        leaf = groups[group].add_parser(
            word, help=verb.text, description=f"{verb.text}.", epilog=EPILOGS.get(verb.name)
        )
        leaf.set_defaults(verb=verb, parser=leaf)
        add_flags(leaf, verb.options)
    return parser
