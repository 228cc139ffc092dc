"""Measure and plot when ranks compute, communicate and wait.

mpiexec -n 2 python dev/timeline.py --model gpt2 -B 4 -T 256 --out timeline.svg    under dev/testhosts.py: on two hosts

Communication can overlap with computation except for the embeddings: their gradients are finished last and their
weights are needed first. For comparison the same steps run without overlap, waiting for every message at once. Figures
are medians over steps, means over ranks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from llmpy import backend
from llmpy.distributed.world import World
from llmpy.distributed.zero import Zero
from llmpy.model.config import ModelConfig
from llmpy.model.gpt2 import GPT2
from llmpy.model.initialise import initialise
from llmpy.model.partition import END

WAIT, COMPUTE, REDUCE, GATHER, UPDATE = "#d6604d", "#c6d5e3", "#4393c3", "#5aae61", "#8da0cb"


class Recording(World):
    """A world that records when the main thread waits; with `at_once` it waits for every message immediately."""

    at_once = False

    def __init__(self) -> None:
        super().__init__(MPI, 0)
        self.waits: list[tuple[str, float, float]] = []

    def submit(self, job: Any) -> Future[None]:
        future = super().submit(job)
        if self.at_once:
            self.result(future)
        return future

    def result(self, future: Future[None]) -> None:
        start = time.perf_counter()
        super().result(future)
        self.waits.append(("wait", start, time.perf_counter()))


class Timed(Zero):
    """An optimizer that records the start and end of its operations."""

    log: list[tuple[str, float, float]] = []

    def _timed(self, name: str, act: Any, b: int, *more: float) -> None:
        start = time.perf_counter()
        act(b, *more)
        self.log.append((f"{name} {b}", start, time.perf_counter()))

    def _reduce(self, b: int) -> None:
        self._timed("reduce", super()._reduce, b)

    def _update(self, b: int, lr: float, scale: float) -> None:
        self._timed("update", super()._update, b, lr, scale)

    def _gather(self, b: int) -> None:
        self._timed("gather", super()._gather, b)


def steps(world: Recording, zero: Timed, model: GPT2, o: argparse.Namespace) -> list[dict[str, Any]]:
    """Run steps; return start, end and events of each."""
    rng = np.random.default_rng(world.rank)
    tokens = rng.integers(0, model.config.vocab_size, (2, o.B, o.T), dtype=np.int32)
    found = []
    for _ in range(o.steps + 1):
        world.gather(0)
        world.waits, zero.log = [], []
        start = time.perf_counter()
        zero.expect()
        model.loss_and_grads(*tokens, micro_steps=world.size)
        zero.update(1e-5, zero.norm())
        end = time.perf_counter()
        found.append({"start": start, "end": end, "events": [*zero.log, *world.waits]})
    zero.settle()
    return found[1:]


def seconds(step: dict[str, Any], names: tuple[str, ...]) -> float:
    return sum(b - a for name, a, b in step["events"] if name.startswith(names))


def draw(path: Path, ranks: list[dict[str, Any]], rate: str) -> None:
    """Draw one step of every rank: a row for computation, one for messages."""
    width, row, left = 1000, 22, 90
    span = max(r["end"] - r["start"] for r in ranks)
    lines = []

    def box(rank: int, lane: int, a: float, b: float, colour: str) -> None:
        x, w = left + width * a / span, max(0.4, width * (b - a) / span)
        lines.append(
            f'<rect x="{x:.1f}" y="{rank * 62 + lane * 26 + 40}" width="{w:.1f}" height="{row}" fill="{colour}"/>'
        )

    for rank, r in enumerate(ranks):
        for lane, text in enumerate(("computes", "network")):
            lines.append(f'<text x="0" y="{rank * 62 + lane * 26 + 55}">{rank} {text}</text>')
        box(rank, 0, 0, r["end"] - r["start"], COMPUTE)
        for name, a, b in r["events"]:
            colour = {"r": REDUCE, "g": GATHER, "u": UPDATE, "w": WAIT}[name[0]]
            if b > r["start"] and a < r["end"]:
                a, b = max(a, r["start"]), min(b, r["end"])
                box(rank, int(name[0] in "rg"), a - r["start"], b - r["start"], colour)
    height = len(ranks) * 62 + 60
    legend = (("forward, backward", COMPUTE), ("AdamW", UPDATE), ("waits", WAIT))
    legend += (("gradients reduced", REDUCE), ("weights gathered", GATHER))
    for i, (text, colour) in enumerate(legend):
        lines.append(f'<rect x="{left + i * 150}" y="8" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{left + i * 150 + 17}" y="19">{text}</text>')
    lines.append(f'<text x="{left}" y="{height - 12}">one step, {span:.2f} s; {rate}</text>')
    body = "\n".join(lines)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 10} {height}" '
        f'font-family="sans-serif" font-size="13">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("-B", type=int, default=4)
    parser.add_argument("-T", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("timeline.svg"))
    parser.add_argument("--caption", default="")
    o = parser.parse_args()
    world = Recording()
    model = GPT2(ModelConfig.from_dial(o.model), backend.load("cpu", threads=o.threads, dtype=o.dtype))
    initialise(model.params, model.config, 42)
    model.store_weights()
    model.reserve(o.B, o.T, training=True)
    zero = Timed(model, world, 0.9, 0.95, 0.1, 1.0)
    early = [b for b, bucket in enumerate(zero.buckets) if bucket.first != END]
    apart = tuple(f"{what} {b}" for what in ("reduce", "gather") for b in early)
    modes = {}
    for world.at_once in (True, False):
        modes[world.at_once] = steps(world, zero, model, o)
    numbers = {}
    for at_once, found in modes.items():
        each = [
            {
                "step_s": s["end"] - s["start"],
                "communication_s": seconds(s, ("reduce", "gather")),
                "could_be_hidden_s": sum(b - a for name, a, b in s["events"] if name in apart),
                "exposed_s": seconds(s, ("wait",)),
            }
            for s in found
        ]
        rows = world.gather(*(statistics.median(e[name] for e in each) for name in each[0]))
        means = [statistics.mean(values) for values in zip(*rows, strict=True)]
        numbers["at once" if at_once else "overlapped"] = dict(zip(each[0], means, strict=True))
    last = modes[False][-1]
    ranks = world.gather_values(last)
    if world.rank == 0:
        draw(o.out, ranks, o.caption)
        alone, both = numbers["at once"], numbers["overlapped"]
        hidden = alone["exposed_s"] - both["exposed_s"]
        print(json.dumps(numbers, indent=1))
        print(f"hidden: {hidden:.2f} of at most {alone['could_be_hidden_s']:.2f} s, "
              f"{100 * hidden / alone['could_be_hidden_s']:.0f} %")  # fmt: skip
    world.gather(0)


if __name__ == "__main__":
    main()
