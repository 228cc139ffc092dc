"""`llmpy bench step`: whole training steps against the machine's FMA peak and roofline, all measured in one run.

A step is that of training: loss and gradients, global norm, clipping, AdamW. The peak is measured before, between and
after the steps, under the same conditions; medians of both are reported. Further steps record their operations.

To include the compilation of all kernels:  LLMPY_CACHE_DIR=an/empty/folder llmpy bench step
"""

from __future__ import annotations

import statistics
import time
from typing import Any, cast

import numpy as np

from .. import backend
from ..backend.machine import Machine
from ..formats import config_of
from ..model.families import flops_per_token, language_model
from ..model.initialise import initialise
from ..options.bench import BenchOptions
from ..options.train import TrainOptions
from ..system.resources import available_memory
from ..system.terminal import aside
from ..system.words import columns, count_of
from ..train.memory import check_memory
from ..train.optimizer import AdamW
from . import peak_memory, process_age
from .roofline import TimedOps

WARM_STEPS = 2  # the first touches every page for the first time
STEPS_A_PEAK = 3  # steps between two measurements of the peak
RECORDED = 3  # steps for the roofline
LEARNING_RATE = 1e-4


def bench_step(options: BenchOptions, machine: Machine | None = None) -> dict[str, Any]:
    """Time `options.steps` steps, and print a line for each to stderr, as llm.c does.

    Times in ms, rates in GFLOP/s and tokens/s, memory in MB of 10⁶ bytes.
    """
    o, config = options, config_of(options.model, lora=options.lora, vocab_size=options.vocab_size)
    B, T = o.batch_size, o.sequence_length
    ops = machine or cast(Machine, backend.load("cpu", threads=o.threads, dtype=o.dtype))
    training = TrainOptions(model=o.model, batch_size=B, sequence_length=T, checkpoint_every=0)
    check_memory(training, config, ops, available_memory())
    timed = TimedOps(ops)
    model = language_model(config, cast(Machine, timed))
    model.reserve(B, T, training=True)
    ops.warm_up(aside, kinds=config.kinds)
    initialise(model.params, config)
    if config.lora is not None:
        initialise(model.trained, config)
    model.store_weights()
    optimizer = AdamW(model)
    text = np.random.default_rng(0).integers(0, config.vocab_size, B * T + 1, dtype=np.int32)
    tokens, targets = text[:-1].reshape(B, T), text[1:].reshape(B, T)

    def work() -> float:
        loss = model.loss_and_grads(tokens, targets)
        optimizer.step(LEARNING_RATE)
        return loss

    def step(number: int) -> float:
        start = time.perf_counter()
        loss = work()
        took = 1e3 * (time.perf_counter() - start)
        aside(f"step {number}: train loss {loss:.6f} (took {took:.3f} ms)")
        return took

    first = {"first_step_ms": step(1), "seconds_to_first_step": process_age()}
    for number in range(2, WARM_STEPS + 1):
        step(number)
    peaks, times = [ops.measure_peak()], []
    for n in range(1, o.steps + 1):
        times.append(step(WARM_STEPS + n))
        if n % STEPS_A_PEAK == 0 or n == o.steps:
            peaks.append(ops.measure_peak())
    median, peak = statistics.median(times), statistics.median(peaks)
    gflops = flops_per_token(config, T) * B * T / median / 1e6
    memory = peak_memory()
    timed.on = True
    for _ in range(RECORDED):
        work()
    bandwidth = ops.measure_bandwidth()
    operations = timed.operations(RECORDED, peak, bandwidth)
    roofline = sum(row["floor_ms"] for row in operations)
    return {
        "median_ms": median, "min_ms": min(times), "gflops": gflops, "peak_gflops": peak,
        "share_of_peak": gflops / peak, "bandwidth_gb_s": bandwidth, "roofline_ms": roofline,
        "share_of_roofline": roofline / median, "tokens_per_s": 1e3 * B * T / median, "peak_rss_mb": memory / 1e6,
        **first, **ops.version_info(), "dtype": np.dtype(ops.dtype).name, "threads": ops.threads, "step_ms": times,
        "operations": operations,
    }  # fmt: skip


def table(n: dict[str, Any]) -> str:
    """Return the result of `bench_step` as a table."""
    rows = [
        ("arithmetic", f"{n['dtype']}, {count_of(n['threads'], 'thread')}"),
        ("step, median", f"{n['median_ms']:,.1f} ms"),
        ("step, fastest", f"{n['min_ms']:,.1f} ms"),
        ("rate", f"{n['gflops']:,.1f} GFLOP/s"),
        ("machine's peak", f"{n['peak_gflops']:,.1f} GFLOP/s"),
        ("share of peak", f"{100 * n['share_of_peak']:.1f} %"),
        ("memory, triad", f"{n['bandwidth_gb_s']:,.1f} GB/s"),
        ("roofline of a step", f"{n['roofline_ms']:,.1f} ms"),
        ("share of roofline", f"{100 * n['share_of_roofline']:.1f} %"),
        ("tokens a second", f"{n['tokens_per_s']:,.0f}"),
        ("peak memory", f"{n['peak_rss_mb']:,.0f} MB"),
        ("first step", f"{n['first_step_ms']:,.1f} ms"),
        ("start to first step", f"{n['seconds_to_first_step']:,.1f} s"),
    ]
    body = [("operation", "calls", "ms", "floor ms", "bound by", "of floor")]
    for r in n["operations"]:
        share = f"{100 * r['floor_ms'] / r['ms']:.0f} %"
        body.append((r["op"], f"{r['calls']:.0f}", f"{r['ms']:,.2f}", f"{r['floor_ms']:,.2f}", r["bound"], share))
    between = n["median_ms"] - sum(r["ms"] for r in n["operations"])  # of other steps: may be negative
    body.append(("median step − these", "", f"{between:,.2f}", "", "", ""))
    return columns(rows) + "\n\n" + columns(body)
