"""`llmpy bench peers`: this program and others on the same work, by turns, each in a process of its own.

    llm.py           fp32, bf16                  llmpy bench step
    PyTorch          eager and torch.compile, fp32 and bf16: bench/torch_step.py of the repository
    NumPy            its BLAS, fp32: the products of a step alone (bench.blas)
    --peer           anything that prints llm.c's line  step N: train loss X (took Y ms)

Every program gets the same sizes, random tokens, number of threads and steps; the first WARM_STEPS of each
process are left out. All of them run once in every round, so that a slow minute of the machine meets all.
tcmalloc, where the system has it, is preloaded for PyTorch, which is faster with it.

This process stays small and computes nothing. Above all it does not load the CPU backend, which would
leave settings of OpenMP in the environment of the others.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import dataclasses
import importlib.util
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ..errors import LlmpyError
from ..model.config import ModelConfig
from ..options.bench import BenchOptions, PeersOptions
from ..options.fields import spelled
from ..system.durable import write_whole
from ..system.resources import cpu_name
from ..system.words import columns
from ..version import __version__
from . import RUSAGE_UNIT, high_water
from . import picture as plot
from .step import WARM_STEPS

STEP_LINE = re.compile(r"\s*step\s+\d+\b.*\(took\s+([0-9.eE+-]+)\s*ms\)")
TORCH_STEP = Path(__file__).parents[2] / "bench" / "torch_step.py"
OURS = "llm.py"
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


class PeerFault(Exception):
    """A program that could not be measured; the others go on."""


@dataclass
class Peer:
    """A program to measure: a list of words prints one JSON object, a shell line prints llm.c's lines."""

    name: str
    dtype: str
    command: list[str] | str
    environment: dict[str, str] = field(default_factory=dict)
    program: str = ""
    times: list[float] = field(default_factory=list)  # ms
    memory: float | None = None  # MB of 10⁶ bytes
    fault: str = ""

    def run(self, steps: int) -> list[float]:
        """Run once; returns and keeps the times of `steps` steps, in ms."""
        times, memory = self._by_lines(steps) if isinstance(self.command, str) else self._by_json(self.command)
        if memory is not None:
            # The least of all rounds: what a first run compiles is kept on disk, and stays out of the others.
            self.memory = min(memory, self.memory or memory)
        self.times += times
        return times

    def _by_json(self, command: list[str]) -> tuple[list[float], float | None]:
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, encoding="utf-8")
        if done.returncode:
            raise PeerFault(ending(done.returncode, done.stderr))
        told = json.loads(done.stdout)
        self.program = told.get("program", self.program)
        return told["step_ms"], told["peak_rss_mb"]

    def _by_lines(self, steps: int) -> tuple[list[float], float | None]:
        times: list[float] = []
        wanted = WARM_STEPS + steps
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
            process = subprocess.Popen(
                self.command,
                shell=True,
                env=os.environ | self.environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
            assert process.stdout is not None
            ended, peak = False, 0
            try:
                for line in process.stdout:
                    if match := STEP_LINE.match(line):
                        times.append(float(match[1]))
                    if len(times) == wanted:
                        peak = tree_memory(process.pid)
                        break
                else:
                    ended = True
            finally:
                if not ended:
                    kill_tree(process)
                peak = max(peak, wait(process))
                process.stdout.close()
            if len(times) == wanted:
                return times[WARM_STEPS:], peak / 1e6 if peak else None
            errors.seek(0)
            if process.returncode:
                raise PeerFault(ending(process.returncode, errors.read()))
        raise PeerFault(f"printed {len(times)} of {wanted} lines like 'step 1: train loss 5.3 (took 99 ms)'")

    def result(self, tokens: int, ours: float | None) -> dict[str, Any]:
        """What was measured, `tokens` a step; `ours` is llm.py's median in ms at this dtype."""
        median = statistics.median(self.times)
        return {
            "name": self.name,
            "dtype": self.dtype,
            "program": self.program,
            "median_ms": median,
            "min_ms": min(self.times),
            "tokens_per_s": 1e3 * tokens / median,
            "peak_rss_mb": self.memory,
            "ratio": median / ours if ours else None,
            "step_ms": self.times,
        }


def tree_memory(pid: int) -> int:
    """The most bytes that any of a process and its children ever held, 0 where the system does not tell."""
    try:
        process = psutil.Process(pid)
        return max(high_water(p.pid) for p in (process, *process.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0  # it has ended; `wait` knows


def kill_tree(process: subprocess.Popen[str]) -> None:
    """End a shell line and all that it started."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS has no right to the dead
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def wait(process: subprocess.Popen[str]) -> int:
    """Wait for the end; returns the most bytes held, as far as the system tells, else 0.

    Linux counts what this process held when it started the other: at least some 60 MB are shown.
    """
    if not hasattr(os, "wait4"):
        process.wait()
        return 0
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * RUSAGE_UNIT


def ending(code: int, errors: str) -> str:
    """How a program ended, with the last line it said."""
    how = f"ended with exit code {code}" if code > 0 else f"was ended by signal {signal.Signals(-code).name}"
    said = [line.strip() for line in errors.splitlines() if line.strip()]
    return f"{how}: {said[-1].removeprefix('llmpy: error: ')}" if said else how


def our_peers(options: PeersOptions, threads: int) -> list[Peer]:
    """This program, in both arithmetics."""
    o = options
    peers = []
    for dtype in SHORT:
        asked = BenchOptions(o.model, o.batch_size, o.sequence_length, o.steps, threads=threads, dtype=dtype, json=True)
        command = [sys.executable, "-m", "llmpy", "bench", "step", *spelled(asked)]
        peers.append(Peer(f"{OURS} {SHORT[dtype]}", dtype, command, program=f"{OURS} {__version__}"))
    return peers


def numpy_peer(options: PeersOptions) -> Peer:
    """NumPy's BLAS, by whatever library NumPy was built with."""
    o = options
    work = [o.model, str(o.batch_size), str(o.sequence_length), str(o.steps), str(WARM_STEPS)]
    return Peer("NumPy products fp32", "float32", [sys.executable, "-m", "llmpy.bench.blas", *work])


def torch_peers(options: PeersOptions, threads: int, say: Callable[[str], object]) -> list[Peer]:
    """PyTorch eager and compiled in both arithmetics; none, with the reason said, where it is not installed.

    Raises LlmpyError if --torch-python names a Python that has no PyTorch.
    """
    o = options
    if o.torch_python is None and importlib.util.find_spec("torch") is None:
        say("PyTorch is left out: this Python has none (--torch-python names one that has)")
        return []
    if not TORCH_STEP.is_file():
        say("PyTorch is left out: its program, bench/torch_step.py, comes with a clone of the repository only")
        return []
    python = sys.executable if o.torch_python is None else str(o.torch_python)
    try:
        probe = subprocess.run([python, "-c", "import torch"], capture_output=True, encoding="utf-8")
    except OSError as fault:
        raise LlmpyError(f"--torch-python {python}: {fault.strerror}", "name a Python that can be run") from fault
    if probe.returncode:
        raise LlmpyError(f"{python}: {ending(probe.returncode, probe.stderr)}", "name another with --torch-python")
    environment = {}
    library = tcmalloc()
    if library:
        environment["LD_PRELOAD"] = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), library]))
    say(f"PyTorch runs with {library} preloaded" if library else "PyTorch runs without tcmalloc: not found")
    config = ModelConfig.from_dial(o.model)
    size = dataclasses.asdict(config) | {"padded_vocab_size": config.padded_vocab_size}
    work = ["--model", json.dumps(size), "-B", str(o.batch_size), "-T", str(o.sequence_length)]
    work += ["--steps", str(o.steps), "--warm-steps", str(WARM_STEPS), "--threads", str(threads)]
    return [
        Peer(
            f"{name} {SHORT[dtype]}",
            dtype,
            [python, str(TORCH_STEP), *work, "--dtype", dtype, "--attention", o.attention, *extra],
            environment,
        )
        for name, extra in (("PyTorch", []), ("torch.compile", ["--compile"]))
        for dtype in SHORT
    ]


def tcmalloc() -> str | None:
    """The library to preload, by the name that the loader knows it by."""
    if sys.platform != "linux":
        return None
    return ctypes.util.find_library("tcmalloc_minimal") or ctypes.util.find_library("tcmalloc")


def given_peers(options: PeersOptions, threads: int) -> list[Peer]:
    """Those of --peer; float32, as llm.c is, unless their name says bf16."""
    o = options
    work = {"B": o.batch_size, "T": o.sequence_length, "STEPS": o.steps + WARM_STEPS, "THREADS": threads}
    peers = []
    for text in o.peer or ():
        name, _, command = (part.strip() for part in text.partition("="))
        dtype = "bfloat16" if re.search(r"bf16|bfloat16", name, re.IGNORECASE) else "float32"
        peers.append(Peer(name, dtype, command, {k: str(v) for k, v in work.items()}, command))
    return peers


def probe_machine(threads: int | None) -> dict[str, str]:
    """What the CPU backend says of itself, its number of threads above all; asked in another process."""
    program = (
        f"import json; from llmpy import backend; print(json.dumps(backend.load(threads={threads}).version_info()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8")
    if done.returncode:
        raise LlmpyError(f"the CPU backend cannot be started: {ending(done.returncode, done.stderr)}")
    return {**json.loads(done.stdout), "cpu": cpu_name(), "python": platform.python_version()}


def bench_peers(options: PeersOptions, say: Callable[[str], object]) -> dict[str, Any]:
    """Measure all, say the table, write --json and --plot; then raise LlmpyError if a program failed.

    Times in ms, memory in MB of 10⁶ bytes; ratio: median over llm.py's of the same dtype.
    """
    o = options
    for path in (o.json, o.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise LlmpyError(f"{path}: there is no folder {path.parent}", "make it first")
    if o.plot is not None:
        plot.check(o.plot)
    config = ModelConfig.from_dial(o.model)
    if o.sequence_length > config.context:
        raise LlmpyError(f"-T {o.sequence_length}: {o.model} has a context of {config.context}", "use a smaller -T")

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    machine = probe_machine(o.threads)
    threads = int(machine["threads"])
    peers = [*our_peers(o, threads), *torch_peers(o, threads, progress), numpy_peer(o), *given_peers(o, threads)]
    peers = [p for p in peers if not any(word in p.name for word in o.without or ())]
    names = [p.name for p in peers]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise LlmpyError(f"--peer {twice}: two programs have this name", "give each a name of its own")
    for peer in peers:
        if not peer.name.startswith(OURS):  # which sets its own, and says so by --threads
            count = {v: str(threads) for v in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
            peer.environment = count | peer.environment
    try:
        for number in range(1, o.rounds + 1):
            for peer in peers:
                if not peer.fault:
                    progress(f"round {number}/{o.rounds}  {peer.name} {one_turn(peer, o.steps)}")
    finally:  # Ctrl-C keeps what was measured
        numbers = report(o, machine, peers)
        if numbers["peers"]:
            say(table(numbers))
            if o.json is not None:
                text = json.dumps(numbers, indent=1) + "\n"
                write_whole(o.json, lambda to: to.write_text(text, encoding="utf-8"))
            if o.plot is not None:
                plot.draw(numbers, o.plot)
    if numbers["failed"]:
        told = "; ".join(f"{name} {fault}" for name, fault in numbers["failed"].items())
        raise LlmpyError(told, "run it alone, or leave it out with --without")
    return numbers


def one_turn(peer: Peer, steps: int) -> str:
    """Run a program once; returns its median, or how it failed."""
    try:
        return f"{statistics.median(peer.run(steps)):,.1f} ms"
    except PeerFault as fault:
        peer.fault = str(fault)
        return peer.fault


def report(options: PeersOptions, machine: dict[str, str], peers: list[Peer]) -> dict[str, Any]:
    """Everything measured, as JSON has it."""
    o = options
    ours = {p.dtype: statistics.median(p.times) for p in peers if p.name.startswith(OURS) and p.times}
    tokens = o.batch_size * o.sequence_length
    return {
        "model": o.model,
        "batch_size": o.batch_size,
        "sequence_length": o.sequence_length,
        "steps": o.steps,
        "rounds": o.rounds,
        "threads": int(machine["threads"]),
        "tcmalloc": tcmalloc(),
        "machine": machine,
        "peers": [p.result(tokens, ours.get(p.dtype)) for p in peers if p.times],
        "failed": {p.name: p.fault for p in peers if p.fault},
    }


def table(numbers: dict[str, Any]) -> str:
    """The same for a reader."""
    n = numbers
    head = (
        f"a step of {n['model']}, {n['batch_size']} x {n['sequence_length']} tokens, {n['threads']} "
        f"thread{'s' * (n['threads'] > 1)}; {n['rounds']} rounds of {n['steps']} steps; {n['machine']['cpu']}"
    )
    rows = [("program", "median ms", "fastest ms", "tokens/s", "peak MB", "times llm.py's")]
    rows += [
        (
            p["name"],
            f"{p['median_ms']:,.1f}",
            f"{p['min_ms']:,.1f}",
            f"{p['tokens_per_s']:,.0f}",
            "-" if p["peak_rss_mb"] is None else f"{p['peak_rss_mb']:,.0f}",
            "-" if p["ratio"] is None else f"{p['ratio']:.2f}",
        )
        for p in n["peers"]
    ]
    return head + "\n\n" + columns(rows)
