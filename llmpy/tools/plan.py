"""`llmpy plan`: what a run will need and take, before it starts, on this machine or on several like it.

memory   the tables of the model, as `preflight` counts them
step     = G · Σ calls · time of each operation    (forward, loss, backward: `step_parts`; G batches gathered)
         + norm and AdamW
time     of an operation: measured now, by `bench ops`, on the sizes of this model (rows beyond what products need
         to reach their rate are not computed but multiplied). Of another machine: by its peak, at the share of
         the peak that was measured here; what memory bounds by its bandwidth.
tokens   Chinchilla's 20 a parameter (Hoffmann et al. 2022), and what llm.c's script for this size trains on

step     of N machines: G · (forward, loss, backward) + update/N + what `distributed.cost` says that training waits for
         messages, and that carrying them takes of the computing
"""

from __future__ import annotations

import bisect
import math
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from .. import backend
from ..backend.machine import Machine
from ..bench.ops import FLOPS, UNSTEADY, Case, time_case
from ..distributed.cost import Communication, Line, Work, communication
from ..errors import LlmpyError
from ..model.config import ModelConfig
from ..model.gpt2 import PARAMS, computed_again
from ..model.partition import BUCKET
from ..options.recipes import RECIPES
from ..options.tools import PlanOptions
from ..options.train import TrainOptions
from ..system.resources import available_memory
from ..system.words import columns, duration, gigabytes
from ..train.memory import LOGITS_ROWS, disk_needed, memory_parts
from ..train.preflight import check_length

CHINCHILLA = 20  # tokens a parameter
FINEWEB_TOKENS = 10_000_000_000  # of llm.c's scripts that say "one epoch": FineWeb's sample of 10B
PRODUCT_ROWS, OTHER_ROWS, FLAT = 1024, 8192, 16 << 20  # sizes beyond which an operation's rate does not change
MATRIX = 40_000_000  # elements of a weight, likewise: beyond the caches, and no machine is too small to be asked
ROUNDS, BUDGET, REPEATS = 3, 0.05, 1  # over all operations; seconds and calls of each in a round
CACHES = 24 << 20  # floats that are read between calls: 96 MiB, for in a step most operands come from memory
SAMPLED = 1 + TrainOptions().sample_tokens  # tokens of a sample, and where a text begins
SHOWN_RECIPES = tuple(name for name in RECIPES if name.startswith("gpt"))  # each has a short name too


@dataclass(frozen=True)
class Part:
    """An operation of a step on one size, and how often it is called; `stage`: when, `kind`: what it is called."""

    stage: str  # forward, loss, backward or update
    kind: str  # products, attention, head, rest, update
    op: str
    case: Case
    calls: int


def step_parts(
    config: ModelConfig, B: int, T: int, recompute: int, mixed: bool, recomputed: int | None = None
) -> list[Part]:
    """Every call of `GPT2.loss_and_grads` on (B, T), and of the optimizer."""
    again = len(computed_again(config, recomputed))
    L, C, NH = config.layers, config.channels, config.heads
    rows = Case(B, T, C=C)
    embedding = Case(B, T, C=C, V=config.vocab_size, Vp=config.padded_vocab_size)
    flat = Case(n=sum(t.size for t in PARAMS(config)))

    def product(stage: str, i: int, o: int, variant: str) -> Part:
        return Part(stage, "products", f"linear_{stage}", Case(B, T, C=i, OC=o, variant=variant), L)

    parts = [
        Part("forward", "rest", "embedding_forward", embedding, 1),
        Part("forward", "rest", "layernorm_forward", rows, 1),
        Part("forward", "rest", "residual_layernorm_forward", rows, 2 * L),
        product("forward", C, 3 * C, "bias"),
        product("forward", C, C, "bias"),
        product("forward", C, 4 * C, "bias gelu"),
        product("forward", 4 * C, C, "bias"),
        Part("forward", "attention", "attention_forward", Case(B, T, C=C, NH=NH), L),
        Part("loss", "head", "classifier", embedding, 1),
        Part("backward", "rest", "layernorm_backward", rows, 2 * L + 1),
        product("backward", 4 * C, C, "bias gelu"),
        product("backward", C, 4 * C, "bias"),
        product("backward", C, C, "bias"),
        product("backward", C, 3 * C, "bias"),
        Part("backward", "attention", "attention_backward", Case(B, T, C=C, NH=NH), L),
        Part("backward", "rest", "embedding_backward", embedding, 1),
        Part("update", "update", "global_norm", flat, 1),
        Part("update", "update", "adamw", flat, 1),
    ]
    if recompute >= 1:
        parts.append(Part("backward", "rest", "gelu_forward", replace(rows, C=4 * C), again))
    if recompute >= 2:
        parts.append(Part("backward", "rest", "layernorm_forward", rows, 2 * again))
    if mixed:
        parts.append(Part("backward", "rest", "narrow", Case(n=B * T * C), 2 * L))
    return parts


def smaller(part: Part) -> tuple[Case, float]:
    """A size on which the operation is as fast, and how many times as much work its own is."""
    case = part.case
    if case.n > 1:
        return replace(case, n=min(case.n, FLAT)), case.n / min(case.n, FLAT)
    if part.kind == "attention":  # its work goes with T²
        B = min(case.B, max(1, PRODUCT_ROWS // case.T))
        return replace(case, B=B), case.B / B
    most = LOGITS_ROWS if part.kind == "head" else PRODUCT_ROWS if part.kind == "products" else OTHER_ROWS
    rows = min(case.rows, most)
    small, times = replace(case, B=1, T=rows), case.rows / rows
    if small.Vp * small.C > MATRIX:
        Vp = max(1, MATRIX // small.C)
        small = replace(small, V=min(small.V, Vp), Vp=Vp)
        times *= case.Vp / Vp if part.kind == "head" else 1  # of the embedding only rows are touched
    if small.OC * small.C > MATRIX:
        OC = MATRIX // small.C
        small, times = replace(small, OC=OC), times * case.OC / OC
    return small, times


@dataclass(frozen=True)
class Rates:
    """What bounds a machine, GFLOP/s and GB/s; not `steady`: it changed while it was measured."""

    peak: float
    bandwidth: float
    steady: bool = True


def measure(machine: Machine, parts: Sequence[Part]) -> tuple[list[float], Rates]:
    """Seconds of all calls of each part on this machine, and its rates.

    Medians of rounds over all parts: what disturbs the machine for some seconds disturbs one of them.
    """
    other = machine.empty(CACHES, machine.wide)
    machine.zero(other)

    def seconds(part: Part) -> float:
        case, times = smaller(part)
        # Read by all threads: what was in the caches leaves them, and no helper sleeps, as none does within a step.
        median = time_case(machine, part.op, case, BUDGET, REPEATS, lambda: machine.global_norm(other))["median_ms"]
        return part.calls * times * median / 1e3

    peaks, streams, rounds = [machine.measure_peak()], [machine.measure_bandwidth()], []
    for _ in range(ROUNDS):
        rounds.append([seconds(part) for part in parts])
        peaks.append(machine.measure_peak())
        streams.append(machine.measure_bandwidth())
    steady = all(max(x) < UNSTEADY * min(x) for x in (peaks, [sum(r) for r in rounds]))
    rates = Rates(statistics.median(peaks), statistics.median(streams), steady)
    return [statistics.median(x) for x in zip(*rounds, strict=True)], rates


def measure_copying() -> float:
    """Bytes/s at which one thread copies a bucket of gradients, as the one that carries messages does."""
    bucket, packed = np.ones(BUCKET, np.float32), np.ones(BUCKET, np.float32)
    found = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        packed[...] = bucket
        found.append(bucket.nbytes / (time.perf_counter() - start))
    return statistics.median(found)


@dataclass(frozen=True)
class Timed:
    """A batch and an update of one machine: (part, seconds of all its calls), and the rates they hold for."""

    parts: list[tuple[Part, float]]
    rates: Rates
    copying: float  # bytes/s of the thread that carries messages

    def of(self, *, stage: str = "", kind: str = "") -> float:
        """Seconds of the parts of a stage, or of a kind."""
        return sum(seconds for part, seconds in self.parts if part.stage == stage or part.kind == kind)


def time_batch(config: ModelConfig, o: PlanOptions, ops: Machine) -> Timed:
    """Measured here, and counted over to the machine that the options tell of."""
    mixed = ops.dtype != ops.wide
    parts = step_parts(config, o.batch_size, o.sequence_length, o.recompute, mixed, o.recompute_layers)
    seconds, here = measure(ops, parts)
    there = Rates(o.peak or here.peak, o.memory_bandwidth or here.bandwidth, here.steady)
    slower = here.peak / there.peak, here.bandwidth / there.bandwidth
    counted = [(part, s * slower[part.op not in FLOPS]) for part, s in zip(parts, seconds, strict=True)]
    return Timed(counted, there, measure_copying() / slower[1] if o.nodes > 1 else math.inf)


def messages(config: ModelConfig, o: PlanOptions, ops: Machine, timed: Timed, gathered: int) -> Communication:
    """What the messages of a step cost each machine."""
    line = Line((o.bandwidth or math.inf) * 1e9 / 8, o.latency * 1e-6)
    work = Work(
        forward=timed.of(stage="forward"),
        head=timed.of(stage="loss"),
        backward=timed.of(stage="backward"),
        update=timed.of(stage="update") / o.nodes,
        batches=gathered,
        threads=ops.threads,
        copying=timed.copying,
    )
    return communication(config, o.nodes, line, work, ops.dtype != ops.wide)


def gathered_batches(o: PlanOptions) -> int:
    """Batches of every machine for an update. Raises LlmpyError if --total-batch is no multiple of a batch."""
    batch = o.batch_size * o.sequence_length * o.nodes
    total = o.total_batch or batch
    if total % batch:
        raise LlmpyError(
            f"--total-batch {total} is no multiple of -B {o.batch_size} x -T {o.sequence_length} on {o.nodes} "
            f"machine{'s' * (o.nodes > 1)} = {batch}",
            f"use --total-batch {max(1, round(total / batch)) * batch}, or another -B",
        )
    return total // batch


def plan(options: PlanOptions, machine: Machine | None = None) -> dict[str, Any]:
    """What `--json` tells: bytes, seconds, GFLOP/s, GB/s (10⁹), money as given. Raises LlmpyError for what cannot be.

    `machine` None: the CPU.
    """
    o = options
    config = ModelConfig.from_dial(o.model, vocab_size=o.vocab_size)
    check_length(o.sequence_length, config.context)
    gathered = gathered_batches(o)
    ops = machine or cast(Machine, backend.load("cpu", threads=o.threads, dtype=o.dtype))
    ops.warm_up(lambda line: print(line, file=sys.stderr, flush=True))
    memory = memory_of(config, options, ops)
    timed = time_batch(config, options, ops)
    step = step_of(config, options, gathered, timed, messages(config, options, ops, timed, gathered))
    parameters, tokens = sum(t.size for t in PARAMS(config)), step["batch"]["tokens"]
    return {
        "model": {
            "name": o.model, "layers": config.layers, "heads": config.heads, "channels": config.channels,
            "context": config.context, "vocab_size": config.vocab_size, "parameters": parameters,
        },
        "machine": {
            "threads": ops.threads, "isa": ops.isa, "dtype": str(ops.dtype), "peak_gflops": timed.rates.peak,
            "bandwidth_gb_s": timed.rates.bandwidth, "peak_measured": o.peak is None,
            "bandwidth_measured": o.memory_bandwidth is None, "steady": timed.rates.steady,
        },
        "memory": memory,
        **step,
        "training": [
            {"what": what, "tokens": n, "steps": math.ceil(n / tokens), **bill(n / step["step"]["tokens_per_s"], o)}
            for what, n in targets(config, options, parameters)
        ],
        "disk": disk_of(config, options, tokens),
    }  # fmt: skip


def step_of(config: ModelConfig, o: PlanOptions, gathered: int, timed: Timed, cost: Communication) -> dict[str, Any]:
    """The "batch" and "step" of a plan, and its "network" where there is one."""
    once = sum(timed.of(stage=stage) for stage in ("forward", "loss", "backward"))
    update = timed.of(stage="update")
    seconds = gathered * once + update / o.nodes + cost.exposed_seconds + cost.taken
    tokens = o.batch_size * o.sequence_length * o.nodes * gathered
    flops = config.flops_per_token(o.sequence_length) * tokens
    kinds = {kind: timed.of(kind=kind) for kind in ("products", "attention", "head", "rest")} | {
        "update": update / o.nodes
    }
    waits = {
        "waiting for gradients": cost.gradients_exposed, "waiting for weights": cost.weights_exposed,
        "waiting for agreement": cost.agreements, "waiting for the slowest": cost.slowest,
        "carrying messages": cost.taken,
    }  # fmt: skip
    return {
        "batch": {
            "batch_size": o.batch_size, "sequence_length": o.sequence_length, "gathered": gathered, "nodes": o.nodes,
            "tokens": tokens,
        },
        "step": {
            "ms": 1e3 * seconds,
            "ms_a_batch": {name: 1e3 * s for name, s in kinds.items()},
            "gflop": flops / 1e9,
            "tokens_per_s": tokens / seconds,
            "share_of_peak": flops / seconds / o.nodes / timed.rates.peak / 1e9,
        },
        "network": None if o.nodes == 1 else {
            "gbit_s": o.bandwidth, "latency_us": o.latency, "comm_ms": 1e3 * cost.seconds,
            "exposed_ms": 1e3 * cost.exposed_seconds, "waits_ms": {name: 1e3 * s for name, s in waits.items()},
            "sent_mb": (cost.reduce_bytes + cost.gather_bytes) / 1e6,
            "efficiency": (gathered * once + update) / seconds,
        },
    }  # fmt: skip


def memory_of(config: ModelConfig, options: PlanOptions, ops: Machine) -> dict[str, Any]:
    """Bytes by part and in all, what is available, and the largest batch that fits into it (0: none does)."""
    o = options
    available = available_memory() if o.memory is None else int(o.memory * 1e9)

    def parts(B: int) -> dict[str, int]:
        copied = o.checkpoint_every > 0
        again = o.recompute, o.recompute_layers
        return memory_parts(config, B, o.sequence_length, ops, again, copied, SAMPLED, ranks=o.nodes)

    needed = parts(o.batch_size)
    largest = bisect.bisect_right(range(1, 1 << 20), available, key=lambda B: sum(parts(B).values()))
    return {"parts": needed, "total": sum(needed.values()), "available": available, "largest_batch": largest}


def targets(config: ModelConfig, options: PlanOptions, parameters: int) -> list[tuple[str, int]]:
    """On how many tokens to train, by whose word."""
    found = [("--tokens", options.tokens)] if options.tokens else []
    found.append((f"Chinchilla, {CHINCHILLA} a parameter", CHINCHILLA * parameters))
    for name in SHOWN_RECIPES:
        recipe = RECIPES[name]
        of = ModelConfig.from_dial(recipe["model"])
        if (of.layers, of.channels) == (config.layers, config.channels):
            steps = recipe["steps"]
            found.append((f"llm.c's {name}", FINEWEB_TOKENS if steps < 0 else steps * recipe["total_batch"]))
    return found


def bill(seconds: float, options: PlanOptions) -> dict[str, Any]:
    """What so long a training costs: machine hours, and money if there is a price."""
    hours = options.nodes * seconds / 3600
    price = options.price_per_hour
    return {"seconds": seconds, "machine_hours": hours, "cost": None if price is None else hours * price}


def disk_of(config: ModelConfig, options: PlanOptions, tokens: int) -> dict[str, Any]:
    """Bytes of a checkpoint and of all that are there at once, and what is free where runs are written."""
    o = options
    parameters = sum(t.size for t in PARAMS(config))
    steps = math.ceil((o.tokens or CHINCHILLA * parameters) / tokens)
    told = TrainOptions(
        model=o.model, steps=steps, checkpoint_every=o.checkpoint_every, keep=o.keep, keep_every=o.keep_every
    )
    return {
        "checkpoint": 12 * sum(t.size for t in PARAMS(config)),  # float32 weights and two moments
        "total": disk_needed(told, config),
        "free": shutil.disk_usage(Path()).free,
    }


def table(n: dict[str, Any]) -> str:
    """The same for a reader."""
    m, b, machine, memory, step, disk = (n[k] for k in ("model", "batch", "machine", "memory", "step", "disk"))
    gathered = f", {b['gathered']} gathered" if b["gathered"] > 1 else ""
    nodes = f" on each of {b['nodes']} machines" if b["nodes"] > 1 else ""
    peak, stream = ("measured" if machine[f"{rate}_measured"] else "given" for rate in ("peak", "bandwidth"))
    lines = [
        f"model    {m['name']}: {m['layers']} layers, {m['heads']} heads, {m['channels']} channels, context "
        f"{m['context']}, vocabulary {m['vocab_size']:,}: {m['parameters']:,} parameters",
        f"machine  {machine['threads']} thread{'s' * (machine['threads'] > 1)}, {machine['isa']}, {machine['dtype']}; "
        f"{machine['peak_gflops']:,.0f} GFLOP/s ({peak}), {machine['bandwidth_gb_s']:,.0f} GB/s ({stream})",
        f"batch    {b['batch_size']} x {b['sequence_length']}{gathered}{nodes}: {b['tokens']:,} tokens a step",
        *([] if machine["steady"] else ["caution  other programs ran meanwhile: plan again without them"]),
        "",
        columns([("memory", "MB"), *((k, f"{v / 1e6:,.0f}") for k, v in
                 [*memory["parts"].items(), ("in all", memory["total"]), ("available", memory["available"])] if v)]),
        f"{'' if memory['total'] <= memory['available'] else 'this does not fit; '}"
        f"largest batch that fits: -B {memory['largest_batch']}" if memory["largest_batch"] else
        "no batch fits: use a smaller -T or --model, or --checkpoint-every 0",
        "",
        columns([("time", "ms"), *((k, f"{v:,.1f}") for k, v in
                 [*step["ms_a_batch"].items(), *(n["network"]["waits_ms"] if n["network"] else {}).items(),
                  ("a step", step["ms"])])]),
        f"{step['tokens_per_s']:,.0f} tokens/s, {step['gflop']:,.0f} GFLOP a step, "
        f"{100 * step['share_of_peak']:.0f} % of the peak",
    ]  # fmt: skip
    if b["gathered"] > 1:
        lines.append(f"products, attention, head and rest are of one of {b['gathered']} batches")
    if n["network"]:
        lines.append(
            f"each machine sends {n['network']['sent_mb']:,.0f} MB a step and is as fast as "
            f"{100 * n['network']['efficiency']:.0f} % of one that is alone"
        )
    rows = [("training", "tokens", "steps", "time", "machine hours", "cost")]
    for t in n["training"]:
        cost = "" if t["cost"] is None else f"{t['cost']:,.2f}"
        rows.append((t["what"], f"{t['tokens']:,}", f"{t['steps']:,}", duration(t["seconds"]),
                     f"{t['machine_hours']:,.1f}", cost))  # fmt: skip
    lines += [
        "",
        columns([row if n["training"][0]["cost"] is not None else row[:5] for row in rows]),
        "",
        f"disk     {gigabytes(disk['checkpoint'])} a checkpoint, {gigabytes(disk['total'])} at most; "
        f"{gigabytes(disk['free'])} are free here",
    ]
    return "\n".join(lines)
