"""Several ranks on this machine: throughput, what their communication costs, and what `llmpy plan` says of both.

python bench/ranks.py --model gpt2 -B 4 -T 256 --steps 3 1x2 2x1        RANKSxTHREADS, one run after another
python bench/ranks.py --plan --model d8 1x1 2x1 4x1                     beside what was planned

A plan takes every rank for a machine of its own, and memory for the line between them, as `bench/line.py` finds it.
Since they share one machine, as many plans are made at the same time. Training is a whole run of `llmpy train`; tokens
are drawn at random: how fast a step is does not depend on them. The first step is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from llmpy.data.shards import write_shard
from llmpy.distributed import launch
from llmpy.model.config import GPT2_VOCAB

LINE = Path(__file__).with_name("line.py")


def shape(told: argparse.Namespace) -> list[Any]:
    """The options that training and planning have in common."""
    return ["--model", told.model, "-B", told.batch_size, "-T", told.sequence_length, "--dtype", told.dtype]


def words(*command: Any) -> list[str]:
    return [str(word) for word in command]


def measure(folder: Path, ranks: int, threads: int, told: argparse.Namespace) -> dict[str, float]:
    """Medians over the steps of a run: ms, tokens_per_s, comm_ms, exposed_ms."""
    run = folder / f"{ranks}x{threads}"
    command = words(
        sys.executable, "-m", "llmpy", "train", "--data", folder / "train.bin", folder / "val.bin", *shape(told),
        "--steps", told.steps + 1, "--threads", threads, "--ranks", ranks, "--eval-every", 0, "--eval-batches", 1,
        "--sample-tokens", 1, "--checkpoint-every", 0, "--out", run,
    )  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "ms" in record][1:]
    names = [name for name in ("ms", "tokens_per_s", "comm_ms", "exposed_ms") if name in steps[0]]
    return {name: statistics.median(step[name] for step in steps) for name in names}


def planned(ranks: int, threads: int, told: argparse.Namespace) -> dict[str, float]:
    """The same by `llmpy plan`, the median of as many as there are ranks."""
    network: list[str] = []
    if ranks > 1:
        launcher = launch.mpiexec()
        options, environment = launch.flags(launcher)
        command = words(launcher, *options, "-n", ranks, sys.executable, LINE)
        line = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, **environment})
        network = [word for name, value in json.loads(line.stdout).items() for word in (f"--{name}", f"{value:.3f}")]
    command = words(
        sys.executable, "-m", "llmpy", "plan", *shape(told), "--threads", threads, "--nodes", ranks, *network,
        "--checkpoint-every", 0, "--json",
    )  # fmt: skip
    plans = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(ranks)]
    found = [json.loads(process.communicate()[0]) for process in plans]
    each = [
        {name: plan["step"][name] for name in ("ms", "tokens_per_s")}
        | ({name: plan["network"][name] for name in ("comm_ms", "exposed_ms")} if ranks > 1 else {})
        for plan in found
    ]
    return {name: statistics.median(numbers[name] for numbers in each) for name in each[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", metavar="RANKSxTHREADS")
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("-B", "--batch-size", type=int, default=4)
    parser.add_argument("-T", "--sequence-length", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--plan", action="store_true")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = np.random.default_rng(0)
        for part, size in (("train", 200_000), ("val", 20_000)):
            write_shard(folder / f"{part}.bin", rng.integers(0, GPT2_VOCAB, size))
        for what in told.what:
            ranks, threads = map(int, what.split("x"))
            for how in ("planned", "measured") if told.plan else ("measured",):
                numbers = planned(ranks, threads, told) if how == "planned" else measure(folder, ranks, threads, told)
                text = " | ".join(f"{name} {value:,.0f}" for name, value in numbers.items())
                print(f"{ranks} ranks x {threads} threads | {how} | {text}", flush=True)


if __name__ == "__main__":
    main()
