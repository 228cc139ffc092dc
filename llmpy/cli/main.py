"""The command `llmpy`: one function per verb. Flags come from the dataclasses in `options/`, the rest of --help from
`help_text`.

Plain argparse: cyclopts, tyro and jsonargparse were measured on the same dataclasses (dev/LOG.md). NumPy and Numba are
imported inside the verbs, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ..errors import LlmpyError, Stopped, Unheard
from ..options.bench import BenchOptions, DecodeOptions, OpsOptions, PeersOptions
from ..options.data import DataOptions
from ..options.fields import flags_of
from ..options.llmc_letters import LETTERS, translated
from ..options.sample_chat import ChatOptions, SampleOptions
from ..options.tools import CompletionOptions, ConvertOptions, DoctorOptions, PlanOptions, SelftestOptions
from ..options.train import TrainOptions
from ..options.watch import PlotOptions, WatchOptions
from ..options.yaml_files import as_yaml
from ..system.interrupts import on_signal
from ..system.terminal import paint, silence
from ..version import __version__
from .help_text import epilog
from .parser import Parser, meant


def train(options: TrainOptions) -> int:
    """Train a model."""
    if options.print_config:
        write(as_yaml(options))
        return 0
    from ..distributed import launch

    with on_signal(end):  # until the trainer handles them
        what = launch.needed(options.ranks, "ranks" in options.given)
        if what == "launch":
            return launch.run(options.ranks, sys.argv[1:])
        if what == "join":
            return train_together(options)
        from ..train.assemble import train

        return train(options)


def end(number: int, _frame: Any) -> NoReturn:
    """End a run that has not started, and discard its folder.

    An exception would not do: libraries catch them, and LLVM's callbacks lose them.
    """
    from ..distributed import launch
    from ..run.folder import HELD

    with on_signal(lambda *_: None):
        for folder in [*HELD]:
            folder.discard()
        stopped = Stopped(number)
        if not launch.leave_word("stopped", str(number)):
            with contextlib.suppress(OSError):  # the terminal is gone
                os.write(2, f"llmpy: error: {stopped}\n".encode())
        os._exit(stopped.code)


def train_together(options: TrainOptions) -> int:
    """Train a model as one of several ranks."""
    from ..distributed import launch
    from ..distributed.world import join
    from ..train.assemble import train

    joined = join(options)
    if joined is None:
        return train(options)
    with joined as world:
        code = train(options, world=world)
    return launch.conclude(code)


def sample(options: SampleOptions) -> int:
    """Continue a text with a trained model."""
    from .sample import sample

    sample(options, write)
    return 0


def chat(options: ChatOptions) -> int:
    """Chat with a model fine-tuned on messages."""
    from .chat import chat

    chat(options)
    return 0


def data(options: DataOptions) -> int:
    """Make token files of a data set or of your own text."""
    from ..data.pack import data
    from ..run.folder import is_ours

    data(options, say, is_ours)
    return 0


def convert(options: ConvertOptions) -> int:
    """Write a model in another format: llm.c's, Hugging Face's, llmpy's, GGUF."""
    from ..formats.convert import convert

    convert(options, say)
    return 0


def plan(options: PlanOptions) -> int:
    """Estimate what a run needs: memory, time, tokens, disk; on this machine or several."""
    from ..tools.plan import plan, table

    return tell(plan(options), table, options.json)


def doctor(options: DoctorOptions) -> int:
    """Check this machine: CPU, threads, memory, caches, packages, network; a fix for each problem."""
    from ..tools.doctor import doctor, record, table

    numbers = record(doctor(options))
    tell(numbers, table, options.json)
    return 0 if numbers["can_train"] else 1


def completion(options: CompletionOptions) -> int:
    """Print a shell-completion script."""
    from .completion import script

    write(script(options.shell, build_parser()))
    return 0


def watch(options: WatchOptions) -> int:
    """Show runs as they train, in the browser."""
    from ..watch.server import watch

    watch(options, say)
    return 0


def plot(options: PlotOptions) -> int:
    """Draw the curves of runs, into a file or the terminal."""
    from ..watch.plot import plot

    plot(options, say)
    return 0


def selftest(options: SelftestOptions) -> int:
    """Check the kernels: against a reference, or llm.c's own files."""
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
    if arguments[0] == "train":
        arguments, ignored = translated(arguments)
        if ignored:
            hints = ", ".join(f"{letter} ({LETTERS[letter]})" for letter in ignored)
            print(f"llmpy: note: ignored, as without effect here: {hints}", file=sys.stderr)
    found, unknown = parser.parse_known_args(arguments)
    if unknown:
        found.parser.error(f"unknown argument {unknown[0]}{meant(found.VERB, unknown[0], found.parser)}")
    given = {f.name: getattr(found, f.name) for f in flags_of(found.options) if f.name in found}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    make = getattr(found.options, "gather", lambda values: found.options(**values))
    return int(found.verb(make(given)))


def build_parser() -> Parser:
    """Return the parser of the whole command line."""
    usage = "llmpy [--help] [--version] VERB [--help] …"
    about = "Train and sample GPT-2 on the CPU, in pure Python."
    parser = Parser(prog="llmpy", description=about, usage=usage, epilog=epilog(""), add_help=False)
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"llmpy {__version__}", help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(
        title="verbs, in order of use", metavar="VERB", dest="VERB", required=True, prog="llmpy"
    )
    groups = {"": verbs}
    for name, function, options in (
        ("train", train, TrainOptions), ("sample", sample, SampleOptions), ("chat", chat, ChatOptions),
        ("watch", watch, WatchOptions), ("plot", plot, PlotOptions), ("data", data, DataOptions),
        ("plan", plan, PlanOptions), ("convert", convert, ConvertOptions), ("doctor", doctor, DoctorOptions),
        ("selftest", selftest, SelftestOptions), ("bench step", bench, BenchOptions),
        ("bench ops", bench_ops, OpsOptions), ("bench decode", bench_decode, DecodeOptions),
        ("bench peers", bench_peers, PeersOptions), ("completion", completion, CompletionOptions),
    ):  # fmt: skip
        group, _, word = name.rpartition(" ")
        if group not in groups:
            text = "Measure against this machine's peak"
            below = verbs.add_parser(group, help=text, description=f"{text}.", epilog=epilog(group))
            groups[group] = below.add_subparsers(metavar="WHAT", dest="WHAT", required=True)
        text = str(function.__doc__)
        leaf = groups[group].add_parser(
            word, help=text.partition(":")[0].rstrip("."), description=text, epilog=epilog(name)
        )
        leaf.serve(function, options)
    return parser


if __name__ == "__main__":
    sys.exit(main())
