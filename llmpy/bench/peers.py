"""`llmpy bench peers`: this and other programs on the same work, interleaved, each in its own process.

    llm.py           fp32, bf16: llmpy bench step, with --decoding: llmpy bench decode
    PyTorch          eager and torch.compile, fp32 and bf16: torch_peer.py, in any Python with PyTorch; decoding: eager
    llama.cpp        --decoding, fp32, bf16: llama_peer.py, in any Python with llama-cpp-python
    --peer           any other command

All get the same sizes, random tokens, threads and steps. They print llm.c's line  step N: train loss X (took Y ms)
for each step, of which the first WARM_STEPS are not counted, or JSON with the `token_ms` of all counted tokens. Other
numbers and texts of their JSON are recorded: versions, the peak. Each program runs once per round, so that a slow phase
of the machine affects all. If installed, tcmalloc is preloaded for PyTorch, which is faster with it.

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
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ..errors import LlmpyError
from ..formats.gguf import write_model
from ..formats.source import Source
from ..model.arena import Arena
from ..model.config import ModelConfig
from ..model.families import params_table
from ..model.initialise import initialise
from ..options.bench import PeersOptions
from ..options.fields import flag_of, flags_of
from ..system.command import command
from ..system.durable import write_whole
from ..system.resources import cores, cpu_name
from ..system.terminal import aside
from ..system.words import columns, count_of
from ..version import __version__
from . import high_water
from .decoding import WARM_TOKENS
from .step import WARM_STEPS

STEP_LINE = re.compile(r"\s*step\s+\d+\b.*\(took\s+([0-9.eE+-]+)\s*ms\)")
TORCH_PEER, LLAMA_PEER = (Path(__file__).with_name(f"{name}_peer.py") for name in ("torch", "llama"))
OURS, LLAMA = "llm.py", "llama.cpp"
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
INT8 = {"int8": "int8"}  # decodes, too
THREAD_COUNTS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass
class Peer:
    """A program to measure: a list of words or a shell command."""

    name: str
    dtype: str
    command: Sequence[str] | str
    environment: Mapping[str, str] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)  # ms
    reports: list[dict[str, Any]] = field(default_factory=list)  # its JSON in each round
    memory: float | None = None  # MB of 10⁶ bytes; None if unknown
    error: str = ""

    def run(self, steps: int) -> list[float]:
        """Run once; return and record the times of `steps` steps, in ms. Raises LlmpyError."""
        times: list[float] = []
        about: dict[str, Any] = {}
        peak, last, total, shell = 0, "", WARM_STEPS + steps, isinstance(self.command, str)
        try:
            process = subprocess.Popen(
                self.command, shell=shell, env={**os.environ, **self.environment},
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
                        if len(times) >= total - 1:  # not at every line: it takes milliseconds of a core
                            peak = max([peak, *(high_water(p.pid) for p in tree(process.pid))])
                        if shell and len(times) == total:  # it may continue; ours print JSON and end
                            break
                    elif not shell and line.startswith("{"):
                        with contextlib.suppress(json.JSONDecodeError):  # a line of another program's log
                            about |= json.loads(line)
                else:
                    process.wait()
            finally:
                for member in tree(process.pid) if process.poll() is None else ():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.kill()
        counted = [round(ms, 3) for ms in about.get("token_ms", times[WARM_STEPS:])]
        if len(counted) < steps:
            expected = f"{total} lines like 'step 1: train loss 5.3 (took 99 ms)'"
            what = f"printed {len(times)} of {expected}"
            if code := process.returncode:
                what = f"exited with code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
                what += f": {last.removeprefix('llmpy: error: ')}" if last else ""
            raise LlmpyError("bench.peer-failed", what)
        if peak:
            # The minimum over rounds: the first one may compile, later ones load from the cache.
            self.memory = min(peak / 1e6, self.memory or peak / 1e6)
        self.times += counted
        self.reports.append(about)
        return counted


def tree(pid: int) -> list[psutil.Process]:
    """Return a process and its descendants; nothing if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def our_peers(o: PeersOptions, threads: int) -> list[Peer]:
    """Return this program in all dtypes."""
    T, steps = o.sequence_length, o.steps
    work = f"step -T {T} --steps {steps}"
    if o.decoding:
        work = f"decode --prompt-tokens {T} --prefill {T} --tokens {steps}"
    work += f" --model {o.model} -B {o.batch_size} --threads {threads} --json"
    work += f" --vocab-size {o.vocab_size}" if o.vocab_size else ""
    words = [sys.executable, "-m", "llmpy", "bench", *work.split()]
    return [Peer(f"{OURS} {short}", dtype, [*words, "--dtype", dtype]) for dtype, short in shorts(o).items()]


def shorts(o: PeersOptions) -> dict[str, str]:
    """Return the dtypes that this work has, and their short names."""
    return SHORT | INT8 if o.decoding else SHORT


def installed(package: str, name: str, python: Path | None, flag: str) -> bool:
    """Return whether a peer can run; if its package is not installed, print a note."""
    if python is None and importlib.util.find_spec(package) is None:
        aside(f"note: skipping {name}, which is not installed here. Use another Python: {flag}")
        return False
    return True


def torch_peers(o: PeersOptions, threads: int) -> list[Peer]:
    """Return eager and compiled PyTorch in both dtypes; nothing if it is not installed."""
    if not installed("torch", "PyTorch", o.torch_python, "--torch-python"):
        return []
    environment = dict.fromkeys(THREAD_COUNTS, str(threads))
    if library := tcmalloc():
        environment["LD_PRELOAD"] = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), library]))
    aside(f"PyTorch runs with {library} preloaded" if library else "PyTorch runs without tcmalloc (not found)")
    config = ModelConfig.from_dial(o.model, o.vocab_size)
    size = config.record() | {"padded_vocab_size": config.padded_vocab_size}
    work = {"model": size, "B": o.batch_size, "T": o.sequence_length, "threads": threads, "decoding": o.decoding}
    work["steps"] = o.steps if o.decoding else o.steps + WARM_STEPS
    peers = []
    for compiled in (False,) if o.decoding else (False, True):
        for dtype, short in SHORT.items():
            words = json.dumps({**work, "dtype": dtype, "compile": compiled})
            line = [str(o.torch_python or sys.executable), str(TORCH_PEER), words]
            peers.append(Peer(f"{'torch.compile' if compiled else 'PyTorch'} {short}", dtype, line, environment))
    return peers


def llama_peers(o: PeersOptions, threads: int, folder: Path) -> list[Peer]:
    """Return llama.cpp in all dtypes, on files of `write_files`; nothing for training, or if it is not installed."""
    if not o.decoding or not installed("llama_cpp", LLAMA, o.llama_python, "--llama-python"):
        return []
    vocabulary = ModelConfig.from_dial(o.model, o.vocab_size).vocab_size
    work = {"B": o.batch_size, "T": o.sequence_length, "steps": o.steps, "threads": threads, "vocab_size": vocabulary}
    peers = []
    for dtype, short in shorts(o).items():
        words = json.dumps({**work, "model": str(folder / f"{dtype}.gguf")})
        peers.append(Peer(f"{LLAMA} {short}", dtype, [str(o.llama_python or sys.executable), str(LLAMA_PEER), words]))
    return peers


def write_files(config: ModelConfig, folder: Path) -> None:
    """Write an untrained model for llama.cpp, in all dtypes."""
    params = Arena(params_table(config), np.empty, np.float32)
    initialise(params, config)
    source = Source(folder, "untrained", config, "float32", config.context, lambda name: getattr(params, name))
    for dtype in (*SHORT, *INT8):
        write_model(folder / f"{dtype}.gguf", source, "q8_0" if dtype in INT8 else dtype)


def tcmalloc() -> str | None:
    """Return the library to preload, as named for the loader."""
    names = ("tcmalloc_minimal", "tcmalloc") if sys.platform == "linux" else ()
    return next(filter(None, map(ctypes.util.find_library, names)), None)


def given_peers(o: PeersOptions, threads: int) -> list[Peer]:
    """Return the programs of --peer; float32, like llm.c, unless the name contains bf16 or int8."""
    work = {"B": o.batch_size, "T": o.sequence_length, "STEPS": o.steps + WARM_STEPS, "THREADS": threads}
    environment = dict.fromkeys(THREAD_COUNTS, str(threads)) | {name: str(value) for name, value in work.items()}
    peers = []
    for text in o.peer or ():
        name, _, command = (part.strip() for part in text.partition("="))
        found = re.search(r"bf16|bfloat16|int8|q8_0", name, re.IGNORECASE)
        dtype = "float32" if found is None else "bfloat16" if "f" in found[0].lower() else "int8"
        peers.append(Peer(name, dtype, command, environment))
    return peers


def bench_peers(o: PeersOptions, log: Callable[[str], object]) -> dict[str, Any]:
    """Measure all, log the table, write --json. Raises LlmpyError at the end if a program failed.

    Times in ms, memory in MB of 10⁶ bytes; ratio: median over llm.py's of the same dtype.
    """
    if o.json is not None and not o.json.absolute().parent.is_dir():
        raise LlmpyError("file.unwritable", f"cannot write {o.json}: no folder {o.json.parent}", "Create it first")
    config = ModelConfig.from_dial(o.model, o.vocab_size)
    if config.family != "gpt2":
        what = f"--model {o.model} is a {config.family.title()}; the other programs run GPT-2"
        raise LlmpyError("bench.unsupported-model", what, "Use a size of GPT-2, or llmpy bench step")
    decoded = WARM_TOKENS + o.steps if o.decoding else 0
    if o.sequence_length + decoded > config.context:
        more = f" and {decoded} tokens" if decoded else ""
        what = f"-T {o.sequence_length}{more} exceeds the context of {o.model}"
        raise LlmpyError("model.context-exceeded", f"{what} ({config.context})", "Use a smaller -T")
    threads = cores() if o.threads is None else o.threads
    with tempfile.TemporaryDirectory() as folder:
        peers = [*our_peers(o, threads), *torch_peers(o, threads), *llama_peers(o, threads, Path(folder))]
        peers = [p for p in (*peers, *given_peers(o, threads)) if not any(word in p.name for word in o.without or ())]
        if any(p.name.startswith(LLAMA) for p in peers):
            write_files(config, Path(folder))
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
    ours = {dtype: medians.get(f"{OURS} {short}") for dtype, short in (SHORT | INT8).items()}
    tokens = o.batch_size * (1 if o.decoding else o.sequence_length)
    return {
        "command": repeated(o), "date": datetime.now(UTC).isoformat(timespec="seconds"), "llmpy": __version__,
        "model": o.model, "vocab_size": o.vocab_size, "decoding": o.decoding, "batch_size": o.batch_size,
        "sequence_length": o.sequence_length, "steps": o.steps, "rounds": o.rounds, "threads": threads,
        "tcmalloc": tcmalloc(),
        "machine": {
            "cpu": cpu_name(), "cores": cores(), "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "system": platform.platform(), "python": platform.python_version(),
        },
        "peers": [
            reported(p.reports) | {
                "name": p.name, "dtype": p.dtype, "median_ms": medians[p.name], "min_ms": min(p.times),
                "tokens_per_s": 1e3 * tokens / medians[p.name], "peak_rss_mb": p.memory,
                "ratio": medians[p.name] / our if (our := ours[p.dtype]) else None, "step_ms": p.times,
            }
            for p in peers if p.times
        ],
        "failed": {p.name: p.error for p in peers if p.error},
    }  # fmt: skip


def reported(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median over the rounds of each number and text."""
    first, *others = reports
    names = [n for n, value in first.items() if isinstance(value, int | float | str) and all(n in r for r in others)]
    return {name: statistics.median_low(about[name] for about in reports) for name in names}


def repeated(o: PeersOptions) -> str:
    """Return the command that repeats the measurement, without the paths of this machine."""
    words: list[object] = ["bench", "peers"]
    for f in flags_of(PeersOptions):
        value = getattr(o, f.name)
        if value != f.default and f.metadata["metavar"] != "FILE":
            words += [flag_of(f.name), *(() if value is True else value if isinstance(value, tuple) else [value])]
    return command(*words)


def work_of(n: dict[str, Any]) -> str:
    """Return the work of a report in words."""
    model = n["model"] + (f" (vocabulary {n['vocab_size']})" if n["vocab_size"] else "")
    if n["decoding"]:
        return f"decoding with {model}, {count_of(n['batch_size'], 'text')} after {n['sequence_length']} tokens"
    return f"a step of {model}, {n['batch_size']} x {n['sequence_length']} tokens"


def table(n: dict[str, Any]) -> str:
    """Return the result of `bench_peers` as a table."""
    head = (
        f"{work_of(n)}, {count_of(n['threads'], 'thread')}; {n['rounds']} rounds of {n['steps']} steps; "
        f"{n['machine']['cpu']}"
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
