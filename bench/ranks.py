"""Throughput of several ranks against one, and what their communication costs: whole runs of `llmpy train`.

python bench/ranks.py --model gpt2 -B 4 -T 256 --steps 3 1x2 2x1        RANKSxTHREADS, one run after another

Tokens are drawn at random: how fast a step is does not depend on them. The first step is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from llmpy.config import GPT2_VOCAB
from llmpy.data.shards import write_shard


def measure(folder: Path, ranks: int, threads: int, told: argparse.Namespace) -> dict[str, float]:
    """Medians over the steps of a run: ms, tokens_per_s, comm_ms, exposed_ms."""
    run = folder / f"{ranks}x{threads}"
    command = [
        sys.executable, "-m", "llmpy.cli", "train", "--data", folder / "train.bin", folder / "val.bin",
        "--model", told.model, "-B", told.batch_size,
        "-T", told.sequence_length, "--dtype", told.dtype, "--steps", told.steps + 1, "--threads", threads, "--ranks",
        ranks, "--eval-every", 0, "--eval-batches", 1, "--sample-tokens", 1, "--checkpoint-every", 0, "--out", run,
    ]  # fmt: skip
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "ms" in record][1:]
    names = [name for name in ("ms", "tokens_per_s", "comm_ms", "exposed_ms") if name in steps[0]]
    return {name: statistics.median(step[name] for step in steps) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", metavar="RANKSxTHREADS")
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("-B", "--batch-size", type=int, default=4)
    parser.add_argument("-T", "--sequence-length", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=3)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = np.random.default_rng(0)
        for part, size in (("train", 200_000), ("val", 20_000)):
            write_shard(folder / f"{part}.bin", rng.integers(0, GPT2_VOCAB, size))
        for what in told.what:
            ranks, threads = map(int, what.split("x"))
            numbers = measure(folder, ranks, threads, told)
            text = " | ".join(f"{name} {value:,.0f}" for name, value in numbers.items())
            print(f"{ranks} ranks x {threads} threads | {text}", flush=True)


if __name__ == "__main__":
    main()
