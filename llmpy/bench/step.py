"""`llmpy bench step`: whole training steps against the machine's own peak, both measured in one run.

A step is what training does: loss and gradients, global norm, clipping, AdamW. The multiply-add peak
is measured before, between and after the steps, so that both see the same machine; each is
represented by its median.

With --cold the same runs in a fresh process whose kernel cache is empty: what the first start costs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, cast

import numpy as np

from .. import backend
from ..backend.machine import Machine
from ..errors import LlmpyError
from ..model.config import ModelConfig
from ..model.gpt2 import GPT2
from ..model.initialise import initialise
from ..options.bench import BenchOptions
from ..options.fields import spelled
from ..system.resources import available_memory
from ..system.words import columns
from ..train.memory import memory_parts
from ..train.optimizer import AdamW
from . import peak_memory, process_age

WARM_STEPS = 2  # the first touches every page for the first time
STEPS_A_PEAK = 3  # steps between two measurements of the peak
LEARNING_RATE = 1e-4


def bench_step(options: BenchOptions, machine: Machine | None = None) -> dict[str, Any]:
    """Time `options.steps` steps; see `summary` for what is returned."""
    if options.cold:
        return in_a_cold_process(options)
    config = ModelConfig.from_dial(options.model)
    B, T = options.batch_size, options.sequence_length
    ops = machine or cast(Machine, backend.load("cpu", threads=options.threads, dtype=options.dtype))
    refuse_what_does_not_fit(options, sum(memory_parts(config, B, T, ops).values()))
    model = GPT2(config, ops)
    model.reserve(B, T, training=True)
    ops.warm_up(lambda line: print(line, file=sys.stderr))
    initialise(model.params, config)
    model.store_weights()
    optimizer = AdamW(model)
    text = np.random.default_rng(0).integers(0, config.vocab_size, B * T + 1, dtype=np.int32)
    tokens, targets = text[:-1].reshape(B, T), text[1:].reshape(B, T)

    def step() -> float:
        start = time.perf_counter()
        model.loss_and_grads(tokens, targets)
        optimizer.step(LEARNING_RATE)
        return 1e3 * (time.perf_counter() - start)

    first = {"first_step_ms": step(), "seconds_to_first_step": process_age()}
    for _ in range(WARM_STEPS - 1):
        step()
    peaks, times = [ops.measure_peak()], []
    for n in range(1, options.steps + 1):
        times.append(step())
        if n % STEPS_A_PEAK == 0 or n == options.steps:
            peaks.append(ops.measure_peak())
    return {
        **summary(config, B, T, times, peaks),
        **first,
        "dtype": np.dtype(ops.dtype).name,
        "threads": ops.threads,
        "step_ms": times,
    }


def refuse_what_does_not_fit(options: BenchOptions, needed: int) -> None:
    """Raise LlmpyError if `needed` bytes are more than what is available."""
    available = available_memory()
    if needed > available:
        raise LlmpyError(
            f"{options.model} with -B {options.batch_size} -T {options.sequence_length} needs about "
            f"{needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are available",
            "use a smaller -B, -T or --model, or close other programs",
        )


def summary(config: ModelConfig, B: int, T: int, times: list[float], peaks: list[float]) -> dict[str, float]:
    """What the acceptance checks and the README's table read; `times` in ms, `peaks` in GFLOP/s.

    Times in ms, rates in GFLOP/s and tokens/s, memory in MB of 10⁶ bytes.
    """
    median, peak = statistics.median(times), statistics.median(peaks)
    gflops = config.flops_per_token(T) * B * T / median / 1e6
    return {
        "median_ms": median,
        "min_ms": min(times),
        "gflops": gflops,
        "peak_gflops": peak,
        "share_of_peak": gflops / peak,
        "tokens_per_s": 1e3 * B * T / median,
        "peak_rss_mb": peak_memory() / 1e6,
    }


def in_a_cold_process(options: BenchOptions) -> dict[str, Any]:
    """The same by another process, which has to compile every kernel first; its progress and errors go to stderr."""
    words = spelled(dataclasses.replace(options, cold=False, json=True))
    command = [sys.executable, "-m", "llmpy", "bench", "step", *words]
    with tempfile.TemporaryDirectory(prefix="llmpy-cold-") as folder:
        environment = {**os.environ, "LLMPY_CACHE_DIR": folder}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        raise SystemExit(done.returncode)  # it has printed its error
    return cast(dict[str, Any], json.loads(done.stdout))


def table(numbers: dict[str, Any]) -> str:
    """The same for a reader."""
    n = numbers
    return columns(
        [
            ("arithmetic", f"{n['dtype']}, {n['threads']} thread{'s' * (n['threads'] > 1)}"),
            ("step, median", f"{n['median_ms']:,.1f} ms"),
            ("step, fastest", f"{n['min_ms']:,.1f} ms"),
            ("rate", f"{n['gflops']:,.1f} GFLOP/s"),
            ("machine's peak", f"{n['peak_gflops']:,.1f} GFLOP/s"),
            ("share of peak", f"{100 * n['share_of_peak']:.1f} %"),
            ("tokens a second", f"{n['tokens_per_s']:,.0f}"),
            ("peak memory", f"{n['peak_rss_mb']:,.0f} MB"),
            ("first step", f"{n['first_step_ms']:,.1f} ms"),
            ("start to first step", f"{n['seconds_to_first_step']:,.1f} s"),
        ]
    )
