"""`llmpy bench peers`: this program and others on the same work, interleaved, each in a process of its own.

    llm.py           fp32, bf16                  llmpy bench step
    PyTorch          eager and torch.compile, fp32 and bf16: torch_step.py, by any Python that has PyTorch
    --peer           anything that prints llm.c's line  step N: train loss X (took Y ms)

Every program gets the same sizes, random tokens, number of threads and steps; the first WARM_STEPS of each
process are left out. All of them run once in every round, so that a slow minute of the machine meets all.
tcmalloc, where the system has it, is preloaded for PyTorch, which is faster with it.

This process stays small and computes nothing: the CPU backend would leave settings of OpenMP in the environment of
the others.
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
from ..system.resources import cores, cpu_name
from ..system.words import columns
from ..version import __version__
from . import high_water
from .step import WARM_STEPS

STEP_LINE = re.compile(r"\s*step\s+\d+\b.*\(took\s+([0-9.eE+-]+)\s*ms\)")
TORCH_STEP = Path(__file__).with_name("torch_step.py")
OURS = "llm.py"
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
THREAD_COUNTS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class PeerError(Exception):
    """A program that could not be measured; the others continue."""


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
    error: str = ""

    def run(self, steps: int) -> list[float]:
        """Run once; return and keep the times of `steps` steps, in ms. Raises PeerError."""
        times, memory = self._by_lines(steps) if isinstance(self.command, str) else self._by_json(self.command)
        if memory:
            # The least of all rounds: what a first run compiles is kept on disk, and stays out of the others.
            self.memory = min(memory, self.memory or memory)
        self.times += times
        return times

    def _by_json(self, command: list[str]) -> tuple[list[float], float | None]:
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, encoding="utf-8")
        if done.returncode:
            raise PeerError(ending(done.returncode, done.stderr))
        found = json.loads(done.stdout)
        self.program = found.get("program", self.program)
        return found["step_ms"], found["peak_rss_mb"]

    def _by_lines(self, steps: int) -> tuple[list[float], float]:
        times: list[float] = []
        peak, last = 0, ""
        process = subprocess.Popen(
            self.command, shell=True, env=os.environ | self.environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
        )  # fmt: skip
        assert process.stdout is not None
        with process:
            try:
                for line in process.stdout:
                    last = line if line.strip() else last
                    if match := STEP_LINE.match(line):
                        times.append(float(match[1]))
                        peak = max([peak, *(high_water(p.pid) for p in tree(process.pid))])
                    if len(times) == WARM_STEPS + steps:
                        return times[WARM_STEPS:], peak / 1e6
                process.wait()
            finally:
                for member in tree(process.pid) if process.poll() is None else ():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.kill()
        if process.returncode:
            raise PeerError(ending(process.returncode, last))
        wanted = f"{WARM_STEPS + steps} lines like 'step 1: train loss 5.3 (took 99 ms)'"
        raise PeerError(f"printed {len(times)} of {wanted}")

    def result(self, tokens: int, ours: float | None) -> dict[str, Any]:
        """Return what was measured, `tokens` a step; `ours` is llm.py's median in ms at this dtype."""
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


def tree(pid: int) -> list[psutil.Process]:
    """Return a process and all that it started; nothing if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def ending(code: int, errors: str) -> str:
    """Say how a program ended, with the last line of its errors."""
    how = f"ended with exit code {code}" if code > 0 else f"was ended by signal {signal.Signals(-code).name}"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return f"{how}: {lines[-1].removeprefix('llmpy: error: ')}" if lines else how


def our_peers(options: PeersOptions, threads: int) -> list[Peer]:
    """Return this program, in both arithmetics."""
    o = options
    peers = []
    for dtype in SHORT:
        step = BenchOptions(o.model, o.batch_size, o.sequence_length, o.steps, threads=threads, dtype=dtype, json=True)
        command = [sys.executable, "-m", "llmpy", "bench", "step", *spelled(step)]
        peers.append(Peer(f"{OURS} {SHORT[dtype]}", dtype, command, program=f"{OURS} {__version__}"))
    return peers


def torch_peers(options: PeersOptions, threads: int, say: Callable[[str], object]) -> list[Peer]:
    """Return PyTorch eager and compiled in both arithmetics; nothing, and say why, where it is not installed.

    Raises LlmpyError if --torch-python names a Python that has no PyTorch.
    """
    o = options
    if o.torch_python is None and importlib.util.find_spec("torch") is None:
        say("PyTorch is left out: this Python has none (--torch-python names one that has)")
        return []
    python = sys.executable if o.torch_python is None else str(o.torch_python)
    try:
        probe = subprocess.run([python, "-c", "import torch"], capture_output=True, encoding="utf-8")
    except OSError as error:
        raise LlmpyError(f"--torch-python {python}: {error.strerror}", "name a Python that can be run") from error
    if probe.returncode:
        raise LlmpyError(f"{python}: {ending(probe.returncode, probe.stderr)}", "name another with --torch-python")
    environment = dict.fromkeys(THREAD_COUNTS, str(threads))
    library = tcmalloc()
    if library:
        environment["LD_PRELOAD"] = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), library]))
    say(f"PyTorch runs with {library} preloaded" if library else "PyTorch runs without tcmalloc: not found")
    config = ModelConfig.from_dial(o.model)
    size = dataclasses.asdict(config) | {"padded_vocab_size": config.padded_vocab_size}
    work = {"model": size, "B": o.batch_size, "T": o.sequence_length, "steps": o.steps, "warm_steps": WARM_STEPS}
    peers = []
    for compiled in (False, True):
        for dtype in SHORT:
            words = json.dumps({**work, "threads": threads, "dtype": dtype, "compile": compiled})
            name = f"{'torch.compile' if compiled else 'PyTorch'} {SHORT[dtype]}"
            peers.append(Peer(name, dtype, [python, str(TORCH_STEP), words], environment))
    return peers


def tcmalloc() -> str | None:
    """Return the library to preload, by the name that the loader knows it by."""
    if sys.platform != "linux":
        return None
    return ctypes.util.find_library("tcmalloc_minimal") or ctypes.util.find_library("tcmalloc")


def given_peers(options: PeersOptions, threads: int) -> list[Peer]:
    """Return those of --peer; float32, as llm.c is, unless their name says bf16."""
    o = options
    work = {"B": o.batch_size, "T": o.sequence_length, "STEPS": o.steps + WARM_STEPS, "THREADS": threads}
    environment = dict.fromkeys(THREAD_COUNTS, str(threads)) | {name: str(value) for name, value in work.items()}
    peers = []
    for text in o.peer or ():
        name, _, command = (part.strip() for part in text.partition("="))
        dtype = "bfloat16" if re.search(r"bf16|bfloat16", name, re.IGNORECASE) else "float32"
        peers.append(Peer(name, dtype, command, environment, command))
    return peers


def bench_peers(options: PeersOptions, say: Callable[[str], object]) -> dict[str, Any]:
    """Measure all, say the table, write --json; then raise LlmpyError if a program failed.

    Times in ms, memory in MB of 10⁶ bytes; ratio: median over llm.py's of the same dtype.
    """
    o = options
    if o.json is not None and not o.json.absolute().parent.is_dir():
        raise LlmpyError(f"{o.json}: there is no folder {o.json.parent}", "make it first")
    config = ModelConfig.from_dial(o.model)
    if o.sequence_length > config.context:
        raise LlmpyError(f"-T {o.sequence_length}: {o.model} has a context of {config.context}", "use a smaller -T")

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    threads = cores() if o.threads is None else o.threads
    peers = [*our_peers(o, threads), *torch_peers(o, threads, progress), *given_peers(o, threads)]
    peers = [p for p in peers if not any(word in p.name for word in o.without or ())]
    names = [p.name for p in peers]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise LlmpyError(f"--peer {twice}: two programs have this name", "give each a name of its own")
    try:
        for number in range(1, o.rounds + 1):
            for peer in peers:
                if not peer.error:
                    progress(f"round {number}/{o.rounds}  {peer.name} {one_turn(peer, o.steps)}")
    finally:  # Ctrl-C keeps what was measured
        numbers = report(o, threads, peers)
        if numbers["peers"]:
            say(table(numbers))
            if o.json is not None:
                text = json.dumps(numbers, indent=1) + "\n"
                write_whole(o.json, lambda to: to.write_text(text, encoding="utf-8"))
    if numbers["failed"]:
        failed = "; ".join(f"{name} {error}" for name, error in numbers["failed"].items())
        raise LlmpyError(failed, "run it alone, or leave it out with --without")
    return numbers


def one_turn(peer: Peer, steps: int) -> str:
    """Run a program once; return its median, or how it failed."""
    try:
        return f"{statistics.median(peer.run(steps)):,.1f} ms"
    except PeerError as error:
        peer.error = str(error)
        return peer.error


def report(options: PeersOptions, threads: int, peers: list[Peer]) -> dict[str, Any]:
    """Return everything measured, as JSON has it."""
    o = options
    ours = {p.dtype: statistics.median(p.times) for p in peers if p.name.startswith(OURS) and p.times}
    tokens = o.batch_size * o.sequence_length
    return {
        "model": o.model,
        "batch_size": o.batch_size,
        "sequence_length": o.sequence_length,
        "steps": o.steps,
        "rounds": o.rounds,
        "threads": threads,
        "tcmalloc": tcmalloc(),
        "machine": {"cpu": cpu_name(), "system": platform.platform(), "python": platform.python_version()},
        "peers": [p.result(tokens, ours.get(p.dtype)) for p in peers if p.times],
        "failed": {p.name: p.error for p in peers if p.error},
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
            p["name"], f"{p['median_ms']:,.1f}", f"{p['min_ms']:,.1f}", f"{p['tokens_per_s']:,.0f}",
            "-" if p["peak_rss_mb"] is None else f"{p['peak_rss_mb']:,.0f}",
            "-" if p["ratio"] is None else f"{p['ratio']:.2f}",
        )
        for p in n["peers"]
    ]  # fmt: skip
    return head + "\n\n" + columns(rows)
