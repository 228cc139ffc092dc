"""`llmpy bench peers`: this and other programs on the same work, interleaved, each in its own process.

    llm.py           fp32, bf16: llmpy bench step
    PyTorch          eager and torch.compile, fp32 and bf16: torch_step.py, in any Python with PyTorch
    --peer           any other command

All print llm.c's line  step N: train loss X (took Y ms)  and get the same sizes, random tokens, threads and steps. The
first WARM_STEPS of each process are not counted. Each program runs once per round, so that a slow phase of the machine
affects all. If installed, tcmalloc is preloaded for PyTorch, which is faster with it.

This process does not load the CPU backend, which would leave OpenMP settings in the environment of the others.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib.util
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ..errors import LlmpyError
from ..model.config import ModelConfig
from ..options.bench import PeersOptions
from ..system.durable import write_whole
from ..system.resources import cores, cpu_name
from ..system.terminal import aside
from ..system.words import columns, count_of
from . import high_water
from .step import WARM_STEPS

STEP_LINE = re.compile(r"\s*step\s+\d+\b.*\(took\s+([0-9.eE+-]+)\s*ms\)")
TORCH_STEP = Path(__file__).with_name("torch_step.py")
OURS = "llm.py"
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
THREAD_COUNTS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass
class Peer:
    """A program to measure: a list of words or a shell command."""

    name: str
    dtype: str
    command: Sequence[str] | str
    environment: Mapping[str, str] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)  # ms
    memory: float | None = None  # MB of 10⁶ bytes; None if unknown
    error: str = ""

    def run(self, steps: int) -> list[float]:
        """Run once; return and record the times of `steps` steps, in ms. Raises LlmpyError."""
        times: list[float] = []
        peak, last = 0, ""
        try:
            process = subprocess.Popen(
                self.command, shell=isinstance(self.command, str), env={**os.environ, **self.environment},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
            )  # fmt: skip
        except OSError as error:
            raise LlmpyError("bench.cannot-run", f"cannot run: {error.strerror}") from None
        assert process.stdout is not None
        with process:
            try:
                for line in process.stdout:
                    last = line.strip() or last
                    if match := STEP_LINE.match(line):
                        times.append(float(match[1]))
                        peak = max([peak, *(high_water(p.pid) for p in tree(process.pid))])
                    if len(times) == WARM_STEPS + steps:
                        break
                else:
                    process.wait()
            finally:
                for member in tree(process.pid) if process.poll() is None else ():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.kill()
        if len(times) < WARM_STEPS + steps:
            expected = f"{WARM_STEPS + steps} lines like 'step 1: train loss 5.3 (took 99 ms)'"
            what = f"printed {len(times)} of {expected}"
            if code := process.returncode:
                what = f"exited with code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
                what += f": {last.removeprefix('llmpy: error: ')}" if last else ""
            raise LlmpyError("bench.peer-failed", what)
        if peak:
            # The minimum over rounds: the first one may compile, later ones load from the cache.
            self.memory = min(peak / 1e6, self.memory or peak / 1e6)
        self.times += times[WARM_STEPS:]
        return times[WARM_STEPS:]


def tree(pid: int) -> list[psutil.Process]:
    """Return a process and its descendants; nothing if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def our_peers(o: PeersOptions, threads: int) -> list[Peer]:
    """Return this program in both dtypes."""
    work = f"--model {o.model} -B {o.batch_size} -T {o.sequence_length} --steps {o.steps} --threads {threads}".split()
    command = [sys.executable, "-m", "llmpy", "bench", "step", *work]
    return [Peer(f"{OURS} {short}", dtype, [*command, "--dtype", dtype]) for dtype, short in SHORT.items()]


def torch_peers(o: PeersOptions, threads: int) -> list[Peer]:
    """Return eager and compiled PyTorch in both dtypes; if it is not installed, print a note and return nothing."""
    if o.torch_python is None and importlib.util.find_spec("torch") is None:
        aside("note: skipping PyTorch, which is not installed here. Use another Python: --torch-python")
        return []
    environment = dict.fromkeys(THREAD_COUNTS, str(threads))
    if library := tcmalloc():
        environment["LD_PRELOAD"] = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), library]))
    aside(f"PyTorch runs with {library} preloaded" if library else "PyTorch runs without tcmalloc (not found)")
    config = ModelConfig.from_dial(o.model)
    size = config.record() | {"padded_vocab_size": config.padded_vocab_size}
    work = {"model": size, "B": o.batch_size, "T": o.sequence_length, "steps": o.steps + WARM_STEPS, "threads": threads}
    peers = []
    for compiled in (False, True):
        for dtype, short in SHORT.items():
            words = json.dumps({**work, "dtype": dtype, "compile": compiled})
            command = [str(o.torch_python or sys.executable), str(TORCH_STEP), words]
            peers.append(Peer(f"{'torch.compile' if compiled else 'PyTorch'} {short}", dtype, command, environment))
    return peers


def tcmalloc() -> str | None:
    """Return the library to preload, as named for the loader."""
    names = ("tcmalloc_minimal", "tcmalloc") if sys.platform == "linux" else ()
    return next(filter(None, map(ctypes.util.find_library, names)), None)


def given_peers(o: PeersOptions, threads: int) -> list[Peer]:
    """Return the programs of --peer; float32, like llm.c, unless the name contains bf16."""
    work = {"B": o.batch_size, "T": o.sequence_length, "STEPS": o.steps + WARM_STEPS, "THREADS": threads}
    environment = dict.fromkeys(THREAD_COUNTS, str(threads)) | {name: str(value) for name, value in work.items()}
    peers = []
    for text in o.peer or ():
        name, _, command = (part.strip() for part in text.partition("="))
        dtype = "bfloat16" if re.search(r"bf16|bfloat16", name, re.IGNORECASE) else "float32"
        peers.append(Peer(name, dtype, command, environment))
    return peers


def bench_peers(o: PeersOptions, log: Callable[[str], object]) -> dict[str, Any]:
    """Measure all, log the table, write --json. Raises LlmpyError at the end if a program failed.

    Times in ms, memory in MB of 10⁶ bytes; ratio: median over llm.py's of the same dtype.
    """
    if o.json is not None and not o.json.absolute().parent.is_dir():
        raise LlmpyError("file.unwritable", f"cannot write {o.json}: no folder {o.json.parent}", "Create it first")
    config = ModelConfig.from_dial(o.model)
    if config.family != "gpt2":
        what = f"--model {o.model} is a {config.family.title()}; the other programs run GPT-2"
        raise LlmpyError("bench.unsupported-model", what, "Use a size of GPT-2, or llmpy bench step")
    if o.sequence_length > config.context:
        what = f"-T {o.sequence_length} exceeds the context of {o.model} ({config.context})"
        raise LlmpyError("model.context-exceeded", what, "Use a smaller -T")
    threads = cores() if o.threads is None else o.threads
    peers = [*our_peers(o, threads), *torch_peers(o, threads), *given_peers(o, threads)]
    peers = [p for p in peers if not any(word in p.name for word in o.without or ())]
    try:
        for number in range(1, o.rounds + 1):
            for peer in (p for p in peers if not p.error):
                try:
                    found = f"{statistics.median(peer.run(o.steps)):,.1f} ms"
                except LlmpyError as error:
                    found = peer.error = str(error)
                aside(f"round {number}/{o.rounds}  {peer.name} {found}")
    finally:  # Ctrl-C keeps what was measured
        numbers = report(o, threads, peers)
        if numbers["peers"]:
            log(table(numbers))
            if o.json is not None:
                text = json.dumps(numbers, indent=1) + "\n"
                write_whole(o.json, lambda to: to.write_text(text, encoding="utf-8"))
    if numbers["failed"]:
        failed = "; ".join(f"{name} {error}" for name, error in numbers["failed"].items())
        raise LlmpyError("bench.peer-failed", failed, "Run it alone, or skip it: --without")
    return numbers


def report(o: PeersOptions, threads: int, peers: list[Peer]) -> dict[str, Any]:
    """Return all measurements, for JSON."""
    medians = {p.name: statistics.median(p.times) for p in peers if p.times}
    ours = {dtype: medians.get(f"{OURS} {short}") for dtype, short in SHORT.items()}
    return {
        "model": o.model, "batch_size": o.batch_size, "sequence_length": o.sequence_length, "steps": o.steps,
        "rounds": o.rounds, "threads": threads, "tcmalloc": tcmalloc(),
        "machine": {"cpu": cpu_name(), "system": platform.platform(), "python": platform.python_version()},
        "peers": [
            {
                "name": p.name, "dtype": p.dtype, "median_ms": medians[p.name], "min_ms": min(p.times),
                "tokens_per_s": 1e3 * o.batch_size * o.sequence_length / medians[p.name], "peak_rss_mb": p.memory,
                "ratio": medians[p.name] / our if (our := ours[p.dtype]) else None, "step_ms": p.times,
            }
            for p in peers if p.times
        ],
        "failed": {p.name: p.error for p in peers if p.error},
    }  # fmt: skip


def table(n: dict[str, Any]) -> str:
    """Return the result of `bench_peers` as a table."""
    head = (
        f"a step of {n['model']}, {n['batch_size']} x {n['sequence_length']} tokens, "
        f"{count_of(n['threads'], 'thread')}; {n['rounds']} rounds of {n['steps']} steps; {n['machine']['cpu']}"
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
