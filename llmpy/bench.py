"""`llmpy bench step`: whole training steps against the machine's own peak, both measured in one run.

A step is what training does: loss and gradients, global norm, clipping, AdamW. The multiply-add peak
is measured before, between and after the steps, so that both see the same machine; each is
represented by its median.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import cast

import numpy as np
import psutil

from . import backend
from .config import ModelConfig
from .gpt2 import GPT2
from .init import initialise
from .optimizer import AdamW
from .options import BenchOptions
from .preflight import Machine

WARM_STEPS = 2  # the first touches every page for the first time
STEPS_A_PEAK = 3  # steps between two measurements of the peak
LEARNING_RATE = 1e-4


def bench_step(options: BenchOptions, machine: Machine | None = None) -> dict[str, float]:
    """Time `options.steps` steps. Times in ms, rates in GFLOP/s, memory in MB of 10⁶ bytes."""
    config = ModelConfig.from_dial(options.model)
    B, T = options.batch_size, options.sequence_length
    ops = machine or cast(Machine, backend.load("cpu", threads=options.threads))
    model = GPT2(config, ops)
    model.reserve(B, T, training=True)
    ops.warm_up(lambda line: print(line, file=sys.stderr))
    initialise(model.params, config)
    optimizer = AdamW(model)
    text = np.random.default_rng(0).integers(0, config.vocab_size, B * T + 1, dtype=np.int32)
    tokens, targets = text[:-1].reshape(B, T), text[1:].reshape(B, T)

    def step() -> float:
        start = time.perf_counter()
        model.loss_and_grads(tokens, targets)
        optimizer.step(LEARNING_RATE)
        return 1e3 * (time.perf_counter() - start)

    for _ in range(WARM_STEPS):
        step()
    peaks, times = [ops.measure_peak()], []
    for n in range(1, options.steps + 1):
        times.append(step())
        if n % STEPS_A_PEAK == 0 or n == options.steps:
            peaks.append(ops.measure_peak())
    return summary(config, B, T, times, peaks)


def summary(config: ModelConfig, B: int, T: int, times: list[float], peaks: list[float]) -> dict[str, float]:
    """What the acceptance checks and the README's table read; `times` in ms, `peaks` in GFLOP/s."""
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


def peak_memory() -> int:
    """The most memory this process ever held, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def table(numbers: dict[str, float]) -> str:
    """The same for a reader."""
    n = numbers
    rows = [
        ("step, median", f"{n['median_ms']:,.1f} ms"),
        ("step, fastest", f"{n['min_ms']:,.1f} ms"),
        ("rate", f"{n['gflops']:,.1f} GFLOP/s"),
        ("machine's peak", f"{n['peak_gflops']:,.1f} GFLOP/s"),
        ("share of peak", f"{100 * n['share_of_peak']:.1f} %"),
        ("tokens a second", f"{n['tokens_per_s']:,.0f}"),
        ("peak memory", f"{n['peak_rss_mb']:,.0f} MB"),
    ]
    return "\n".join(f"{name:<16}{value:>18}" for name, value in rows)
