"""The command `llmpy`: a table of verbs. Flags come from the dataclasses in `options/`, examples from `help_text`.

Plain argparse: cyclopts, tyro and jsonargparse were measured on the same dataclasses (dev/LOG.md). NumPy and Numba are
imported when a verb is called, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from ..errors import LlmpyError, Stopped
from ..options.bench import BenchOptions, DecodeOptions, OpsOptions, PeersOptions
from ..options.data import DataOptions
from ..options.fields import Options, Reported, flags_of
from ..options.llmc_letters import LETTERS, translated
from ..options.sample_chat import ChatOptions, SampleOptions
from ..options.tools import CompletionOptions, ConvertOptions, DoctorOptions, PlanOptions, SelftestOptions
from ..options.train import TrainOptions
from ..options.watch import PlotOptions, WatchOptions
from ..options.yaml_files import as_yaml
from ..system.interrupts import on_signal
from ..system.terminal import paint, silence
from ..system.words import did_you_mean
from ..version import __version__
from .help_text import EPILOGS
from .parser import Parser, add_flags


def train(options: TrainOptions) -> int:
    """Train a model, alone or as one of several ranks, or start the ranks."""
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
    """End a run that has not started, and discard its folder."""
    # An exception would not do: libraries catch them, and LLVM's callbacks lose them.
    folders, launch = (sys.modules.get(f"llmpy.{name}") for name in ("run.folder", "distributed.launch"))  # no imports
    with on_signal(lambda *_: None):
        for folder in [*getattr(folders, "HELD", ())]:
            folder.discard()
        stopped = Stopped(number)
        gather_values = getattr(launch, "leave_word", None)
        if gather_values is None or not gather_values("stopped", str(number)):
            with contextlib.suppress(OSError):  # the terminal is gone
                os.write(2, f"llmpy: error: {stopped}\n".encode())
        os._exit(stopped.exit_code)


def data(options: DataOptions) -> int:
    """Make token files; runs are no text."""
    from ..data.pack import data
    from ..run.folder import is_ours

    data(options, log, is_ours)
    return 0


def doctor(options: DoctorOptions) -> int:
    """Print the checks of this machine; 1 if something prevents training."""
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
    """Return a verb: a module's function, imported when it is called; numbers of a Reported one are printed."""

    def verb(options: Any) -> int:
        imported = importlib.import_module(f"llmpy.{module}")
        found = getattr(imported, name)(options, *more)
        if isinstance(options, Reported):
            print(json.dumps(found) if options.json else imported.table(found))
        return found if isinstance(found, int) else 0

    return verb


def write(text: str) -> None:
    """Print text at once: generated text is read as it comes."""
    print(text, end="", flush=True)


def log(line: str) -> None:
    """Print a line of a verb at work, which continues without its reader."""
    try:
        print(line, flush=True)
    except OSError:
        silence()


class Verb(NamedTuple):
    """A verb of the command line: its name, options and function, and what --help says of it."""

    name: str
    options: type[Options]
    call: Callable[[Any], int]
    text: str


# fmt: off
VERBS = (
    Verb("train", TrainOptions, train, "Train a model"),
    Verb("sample", SampleOptions, calling("cli.sample", "sample", write), "Continue a text with a trained model"),
    Verb("chat", ChatOptions, calling("cli.chat", "chat"), "Chat with a model fine-tuned on messages"),
    Verb("watch", WatchOptions, calling("watch.server", "watch", log), "Show runs as they train, in the browser"),
    Verb("plot", PlotOptions, calling("watch.plot", "plot", log), "Draw the curves of runs: a file or the terminal"),
    Verb("data", DataOptions, data, "Make token files of a data set or of your own text"),
    Verb("plan", PlanOptions, calling("tools.plan", "plan"), "Estimate memory, time, tokens and disk of a run"),
    Verb("convert", ConvertOptions, calling("formats.convert", "convert", log), "Write a model in another format"),
    Verb("doctor", DoctorOptions, doctor, "Check this machine; print a fix for each problem"),
    Verb("selftest", SelftestOptions, calling("tools.selftest", "selftest", log), "Check that kernels compute right"),
    Verb("bench step", BenchOptions, calling("bench.step", "bench_step"), "Time training steps against the peak"),
    Verb("bench ops", OpsOptions, calling("bench.ops", "bench_ops"), "Time each operation against the peaks"),
    Verb("bench decode", DecodeOptions, calling("bench.decoding", "bench_decode"), "Time generation"),
    Verb("bench peers", PeersOptions, calling("bench.peers", "bench_peers", log), "Time other programs on this work"),
    Verb("completion", CompletionOptions, completion, "Print a shell-completion script"),
)
# fmt: on


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code. Errors of the user and the machine are one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that lacks a character shows "?" for it
    try:
        try:
            return run(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()  # where a broken pipe is expected, and not at the interpreter's end
    except LlmpyError as error:
        return fail(f"{error} [{error.code}]", error.exit_code)
    except MemoryError as error:
        return fail(f"out of memory: {error}. Use a smaller -B, -T or --model [out-of-memory]")
    except OSError as error:
        silence()
        if isinstance(error, BrokenPipeError):  # the reader has left (`| head`)
            return 1
        return fail(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except KeyboardInterrupt:
        return fail("stopped by Ctrl-C", 130)


def fail(message: str, code: int = 1) -> int:
    """Print one line to stderr, if that is still there; return the exit code."""
    with contextlib.suppress(OSError):
        print(paint("llmpy: error:", "red", sys.stderr), " ".join(message.split()), file=sys.stderr, flush=True)
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
            print(f"llmpy: note: ignored, as without effect here: {hints}", file=sys.stderr)
    found, unknown = parser.parse_known_args(arguments)
    if unknown:
        word = unknown[0].partition("=")[0]
        near = did_you_mean(word, [flag for action in found.parser._actions for flag in action.option_strings])
        near = near or (found.VERB == "train" and not word.startswith("-") and "Pass text with --data PATH") or ""
        found.parser.error(". ".join(filter(None, (f"unknown argument {unknown[0]}", near))))
    given = {f.name: getattr(found, f.name) for f in flags_of(found.verb.options) if f.name in found}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return int(found.verb.call(found.verb.options.gather(given)))


def build_parser() -> Parser:
    """Return the parser of the whole command line."""
    usage = "llmpy [--help] [--version] VERB [--help] …"
    about = "Train and sample GPT-2 on the CPU, in pure Python."
    parser = Parser(prog="llmpy", description=about, usage=usage, epilog=EPILOGS[""], add_help=False)
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"llmpy {__version__}", help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(
        title="verbs, in order of use", metavar="VERB", dest="VERB", required=True, prog="llmpy"
    )
    groups = {"": verbs}
    for verb in VERBS:
        group, _, word = verb.name.rpartition(" ")
        if group not in groups:
            text = "Measure against this machine's peak"
            below = verbs.add_parser(group, help=text, description=f"{text}.")
            groups[group] = below.add_subparsers(metavar="WHAT", dest="WHAT", required=True)
        leaf = groups[group].add_parser(
            word, help=verb.text, description=f"{verb.text}.", epilog=EPILOGS.get(verb.name)
        )
        leaf.set_defaults(verb=verb, parser=leaf)
        add_flags(leaf, verb.options)
    return parser
