"""`llmpy plan`: estimate the memory, time and disk of a run before it starts, on one or more machines like this.

memory   the model's tables, as `train.memory` counts them
step     = G · Σ calls · time of each operation (forward, loss, backward; G micro-batches)
         + norm and AdamW, divided by N machines + exposed communication (`distributed.cost`)
         A recording backend lists the calls of the model and the optimizer.
time     of an operation: measured now with `bench ops` on this model's sizes, at most as many rows as it needs to
         reach its full rate; more rows are extrapolated
tokens   Chinchilla's 20 per parameter (Hoffmann et al. 2022), and those of llm.c's script for this size
"""

from __future__ import annotations

import bisect
import math
import shutil
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from .. import backend
from ..backend import Ops
from ..backend.machine import Machine
from ..backend.recorder import Recorder
from ..bench.ops import UNSTEADY, Case, rates_of, time_case
from ..distributed.cost import communication
from ..formats import config_of
from ..model.config import ModelConfig
from ..model.families import flops_per_token, language_model, params_table, trained_table
from ..options.tools import PlanOptions
from ..options.train import TrainOptions
from ..options.yaml_files import SCRIPTS, read_recipe
from ..system.resources import available_memory
from ..system.terminal import aside
from ..system.words import columns, count_of, duration, gigabytes
from ..train.memory import LOGITS_ROWS, disk_needed, memory_parts
from ..train.optimizer import AdamW
from ..train.preflight import check_length

CHINCHILLA = 20  # tokens per parameter
FINEWEB_TOKENS = 10_000_000_000  # one epoch of llm.c's scripts: FineWeb's 10B sample
PRODUCT_ROWS, OTHER_ROWS, FLAT = 1024, 8192, 16 << 20  # above these sizes rates are constant
ROWS = 1024  # tokens per sequence, unless given
MATRIX = 40_000_000  # elements of a weight, likewise: exceeds the caches, and fits in any memory
ROUNDS, BUDGET, REPEATS = 3, 0.05, 1  # rounds over all operations; seconds and calls of each per round
CACHES = 24 << 20  # floats read between calls (96 MiB), because in a step most operands come from memory
SAMPLED = 1 + TrainOptions().sample_tokens  # with end-of-text at the start
KINDS = {"linear": "products", "attention": "attention", "classifier": "head"}  # by first word of the operation


@dataclass(frozen=True)
class Part:
    """An operation of a step on one size, and the number of its calls."""

    stage: str  # forward, loss, backward or update
    op: str
    case: Case
    calls: int

    @property
    def kind(self) -> str:
        """The row of the time table: products, attention, head, update or rest."""
        return "update" if self.stage == "update" else KINDS.get(self.op.partition("_")[0], "rest")


def step_parts(config: ModelConfig, B: int, T: int, recompute: int, dtype: Any) -> list[Part]:
    """Return every call of a step on (B, T), recorded from the model and the optimizer."""
    recorder = Recorder(dtype)
    model = language_model(config, cast(Ops, recorder), recompute=recompute)
    tokens = np.zeros((B, T), np.int32)
    model.loss_and_grads(tokens, tokens)
    AdamW(model).step(lr=0.0)
    ops = [op for op, _ in recorder.calls]
    loss, update = ops.index("classifier"), ops.index("global_norm")
    found: Counter[tuple[str, str, Case]] = Counter()
    for i, (op, arguments) in enumerate(recorder.calls):
        stage = "update" if i >= update else "backward" if i > loss else "loss" if i == loss else "forward"
        found[stage, op, case_of(op, arguments)] += 1
    return [Part(*call, count) for call, count in found.items()]


def case_of(op: str, arguments: dict[str, Any]) -> Case:
    """Return the size of a recorded call for `bench ops`; all rows are one sequence, except in attention."""
    shape = {name: x.shape for name, x in arguments.items() if isinstance(x, np.ndarray)}
    if op in ("adamw", "global_norm", "narrow", "zero"):
        return Case(n=math.prod(next(iter(shape.values()))))
    if op == "rope" or op.startswith("head_"):
        *rows, W = shape["x" if op == "rope" else "inp"]
        HS = 2 * shape["cos"][1] if op == "rope" else shape["q_weight"][0]
        heads = arguments["heads"] if op == "rope" else shape["rstd"][-1]
        NKV = W // HS - heads
        return Case(T=math.prod(rows), C=(heads - NKV) * HS, NH=heads - NKV, NKV=NKV)
    *rows, C = next(shape[name] for name in ("inp", "inp1", "out", "dout") if name in shape)
    if "stats" in shape:
        B, NH, T = shape["stats"]
        NKV = (shape["qkv"][-1] * NH // C - NH) // 2
        return Case(B, T, C, NH, 0 if NKV == NH else NKV)
    case = Case(T=math.prod(rows), C=C)
    frozen = any(name in arguments and arguments[name] is None for name in ("dweight", "dwte"))
    if op.startswith(("linear", "activation")):
        if "weight" in shape:
            OC, C = shape["weight"]
            case = replace(case, C=C, OC=shape["out"][-1] if "out" in shape else OC)
        active = case.OC if op == "linear_forward" else C  # columns of the activation
        words = [("bias", "bias" in shape or "dbias" in shape), ("frozen", frozen)]
        words += [("gelu", shape.get("pre", (0,))[-1] == active), ("swiglu", shape.get("pre", (0,))[-1] == 2 * active)]
        return replace(case, variant=" ".join(word for word, there in words if there))
    if op.endswith("columns"):
        return replace(case, C=min(shape["out"][-1], shape["x"][-1]))
    if op.startswith("embedding") and not shape.keys() & {"wpe", "dwpe"}:
        case = replace(case, variant="tokens")
    Vp, _ = shape.get("wte") or shape.get("dwte") or (1, 1)
    return replace(case, V=arguments.get("vocab_size", Vp), Vp=Vp, variant="frozen" if frozen else case.variant)


def smaller(part: Part) -> tuple[Case, float]:
    """Return a smaller size with the same rate, and the ratio of the work."""
    case = part.case
    if case.n > 1:
        return replace(case, n=min(case.n, FLAT)), case.n / min(case.n, FLAT)
    if part.kind == "attention":  # work grows with T²
        B = min(case.B, max(1, PRODUCT_ROWS // case.T))
        return replace(case, B=B), case.B / B
    rows = min(case.T, {"head": LOGITS_ROWS, "products": PRODUCT_ROWS}.get(part.kind, OTHER_ROWS))
    Vp, OC = (min(width, max(1, MATRIX // case.C)) for width in (case.Vp, case.OC))
    small = replace(case, T=rows, V=min(case.V, Vp), Vp=Vp, OC=OC)
    # the embedding reads only the rows of its tokens
    return small, case.T / rows * (case.OC / OC) * (case.Vp / Vp if part.kind == "head" else 1)


class Measured(NamedTuple):
    """Seconds of all calls of each part, and the rates of the machine; `steady`: they did not change meanwhile."""

    seconds: list[float]
    peak: float  # GFLOP/s
    bandwidth: float  # GB/s
    steady: bool


def measure(machine: Machine, parts: Sequence[Part]) -> Measured:
    """Time the parts on this machine; the median over rounds discards a disturbance of one round."""
    other = machine.empty(CACHES, machine.wide)
    machine.zero(other)

    def seconds(part: Part) -> float:
        case, times = smaller(part)
        # All threads read `other`, which evicts the caches and keeps the helper threads awake, as in a step.
        median = time_case(machine, part.op, case, BUDGET, REPEATS, lambda: machine.global_norm(other))["median_ms"]
        return part.calls * times * median / 1e3

    rates, rounds = [rates_of(machine)], []
    for _ in range(ROUNDS):
        rounds.append([seconds(part) for part in parts])
        rates.append(rates_of(machine))
    peaks, streams = zip(*rates, strict=True)
    steady = all(max(x) < UNSTEADY * min(x) for x in (peaks, [sum(r) for r in rounds]))
    medians = [statistics.median(x) for x in zip(*rounds, strict=True)]
    return Measured(medians, statistics.median(peaks), statistics.median(streams), steady)


def plan(options: PlanOptions, machine: Machine | None = None) -> dict[str, Any]:
    """Return the numbers of --json: bytes, seconds, GFLOP/s, GB/s (10⁹). Raises LlmpyError for an invalid batch."""
    o, config = options, config_of(options.model, lora=options.lora)
    config = config if o.vocab_size is None else replace(config, vocab_size=o.vocab_size)
    T = o.sequence_length or min(ROWS, config.context)
    check_length(T, config.context)
    run = TrainOptions(
        model=o.model, batch_size=o.batch_size, sequence_length=T, total_batch=o.total_batch,
        checkpoint_every=o.checkpoint_every, keep=o.keep, ranks=o.nodes,
    )  # fmt: skip
    gathered = run.micro_steps  # refuses an invalid total before anything compiles
    ops = machine or cast(Machine, backend.load("cpu", threads=o.threads, dtype=o.dtype))
    ops.warm_up(aside, kinds=config.kinds)
    available = available_memory()

    def needed(B: int) -> dict[str, int]:
        copied = o.checkpoint_every > 0
        return memory_parts(config, B, T, ops, o.recompute, copied, SAMPLED, ranks=o.nodes)

    tables = needed(o.batch_size)
    largest = bisect.bisect_right(range(1, 1 << 20), available, key=lambda B: sum(needed(B).values()))
    parts = step_parts(config, o.batch_size, T, o.recompute, ops.dtype)
    measured = measure(ops, parts)

    def took(name: str) -> float:
        """Return the seconds of the parts of this stage or kind."""
        return sum(s for p, s in zip(parts, measured.seconds, strict=True) if name in (p.stage, p.kind))

    update = took("update") / o.nodes
    messages = communication(
        config, o.nodes, (o.bandwidth or math.inf) * 1e9 / 8, o.latency * 1e-6, took("forward"), took("backward"),
        ops.dtype != ops.wide,
    )  # fmt: skip
    computing = gathered * sum(map(took, ("forward", "loss", "backward")))
    seconds, tokens = computing + update + messages.exposed, run.batch_tokens * gathered
    flops = flops_per_token(config, T) * tokens
    parameters, trained = (sum(t.size for t in table(config)) for table in (params_table, trained_table))
    steps = math.ceil((o.tokens or CHINCHILLA * parameters) / tokens)
    return {
        "model": {
            "name": o.model, "shape": str(config), "family": config.family, "layers": config.layers,
            "heads": config.heads, "channels": config.channels, "context": config.context,
            "vocab_size": config.vocab_size, "parameters": parameters, "trained": trained,
        },
        "machine": {
            "threads": ops.threads, "isa": ops.isa, "dtype": str(ops.dtype), "peak_gflops": measured.peak,
            "bandwidth_gb_s": measured.bandwidth, "steady": measured.steady,
        },
        "memory": {
            "parts": tables, "total": sum(tables.values()), "available": available,
            "largest_batch": largest,  # 0: no batch fits
        },
        "batch": {
            "batch_size": o.batch_size, "sequence_length": T, "gathered": gathered, "nodes": o.nodes,
            "tokens": tokens,
        },
        "step": {
            "ms": 1e3 * seconds,
            "ms_a_batch": {kind: 1e3 * took(kind) for kind in (*KINDS.values(), "rest")} | {"update": 1e3 * update},
            "gflop": flops / 1e9,
            "tokens_per_s": tokens / seconds,
            "share_of_peak": flops / seconds / o.nodes / measured.peak / 1e9,
        },
        "network": None if o.nodes == 1 else {
            "gbit_s": o.bandwidth, "latency_us": o.latency, "sent_mb": messages.sent / 1e6,
            "comm_ms": 1e3 * messages.seconds, "exposed_ms": 1e3 * messages.exposed,
            "efficiency": (computing + update * o.nodes) / seconds,
        },
        "training": [
            {
                "what": what, "tokens": n, "steps": math.ceil(n / tokens), "seconds": n / tokens * seconds,
                "machine_hours": o.nodes * n / tokens * seconds / 3600,
            }
            for what, n in targets(config, o, parameters)
        ],
        "disk": {
            "checkpoint": 12 * trained,  # float32 weights and two moments
            "total": disk_needed(replace(run, steps=steps), config),
            "free": shutil.disk_usage(Path()).free,
        },
    }  # fmt: skip


def targets(config: ModelConfig, o: PlanOptions, parameters: int) -> list[tuple[str, int]]:
    """Return (source, tokens): recommended numbers of training tokens."""
    found = [("--tokens", o.tokens)] if o.tokens else []
    if config.lora is None:  # otherwise it is not a training from scratch
        found.append((f"Chinchilla, {CHINCHILLA} per parameter", CHINCHILLA * parameters))
    for name in SCRIPTS if config.family == "gpt2" and config.lora is None else ():
        recipe = read_recipe(TrainOptions, name)
        of = ModelConfig.from_dial(recipe["model"])
        if (of.layers, of.channels) == (config.layers, config.channels):
            n = FINEWEB_TOKENS if recipe["steps"] < 0 else recipe["steps"] * recipe["total_batch"]
            found.append((f"llm.c's {name}", n))
    return found


def table(n: dict[str, Any]) -> str:
    """Return the plan as text."""
    m, b, machine, memory, step, network, disk = (
        n[k] for k in ("model", "batch", "machine", "memory", "step", "network", "disk")
    )
    gathered = f", {b['gathered']} micro-batches" if b["gathered"] > 1 else ""
    adapters = f", {m['trained']:,} of adapters trained" if m["trained"] != m["parameters"] else ""
    nodes = f" on each of {b['nodes']} machines" if b["nodes"] > 1 else ""
    sizes = [*memory["parts"].items(), ("total", memory["total"]), ("available", memory["available"])]
    waits = {"exposed communication": network["exposed_ms"]} if network else {}
    times = [*(step["ms_a_batch"] | waits).items(), ("step", step["ms"])]
    largest = f"largest batch that fits: -B {memory['largest_batch']}"
    if not memory["largest_batch"]:
        largest = "no batch fits: use a smaller -T or --model, or --checkpoint-every 0"
    elif memory["total"] > memory["available"]:
        largest = f"too large for memory; {largest}"
    trainings = [
        (t["what"], f"{t['tokens']:,}", f"{t['steps']:,}", duration(t["seconds"]), f"{t['machine_hours']:,.1f}")
        for t in n["training"]
    ]
    lines = [
        f"model    {m['name']}: {m['parameters']:,} parameters{adapters}",
        f"         {m['shape']}",
        f"machine  {count_of(machine['threads'], 'thread')}, {machine['isa']}, {machine['dtype']}; "
        f"{machine['peak_gflops']:,.0f} GFLOP/s, {machine['bandwidth_gb_s']:,.0f} GB/s",
        f"batch    {b['batch_size']} x {b['sequence_length']}{gathered}{nodes}: {b['tokens']:,} tokens per step",
        "" if machine["steady"] else "caution  other programs ran during the measurement: plan again without them\n",
        columns([("memory", "MB"), *((name, f"{bytes_ / 1e6:,.0f}") for name, bytes_ in sizes if bytes_)]),
        largest + "\n",
        columns([("time", "ms"), *((name, f"{ms:,.1f}") for name, ms in times)]),
        f"{step['tokens_per_s']:,.0f} tokens/s, {step['gflop']:,.0f} GFLOP per step, "
        f"{100 * step['share_of_peak']:.0f} % of the peak",
    ]
    if gathered:
        lines.append(f"products, attention, head and rest: per micro-batch, {b['gathered']} per step")
    if network:
        speed = f"{100 * network['efficiency']:.0f} % of the speed of a single machine"
        lines.append(f"each machine sends {network['sent_mb']:,.0f} MB per step and runs at {speed}")
    if trainings:
        lines.append("\n" + columns([("training", "tokens", "steps", "time", "machine hours"), *trainings]))
    lines += [
        f"\ndisk     {gigabytes(disk['checkpoint'])} per checkpoint, {gigabytes(disk['total'])} at most; "
        f"{gigabytes(disk['free'])} free here",
    ]
    return "\n".join(lines)
