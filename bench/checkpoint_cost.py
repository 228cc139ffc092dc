"""What checkpoints in the background cost: 40 steps with one every 20, and without, by turns.

    python bench/checkpoint_cost.py [--model gpt2] [-B 4] [-T 64] [--dtype auto] [--rounds 3]

Steps, copies and the writing that goes on beside the steps are in the time; the last write is waited for outside it, as
the next one would have the next 20 steps. The disk of the current folder is the one that is written to.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from llmpy.backend.machine import Machine
from llmpy.data.shards import write_shard
from llmpy.model.config import ModelConfig
from llmpy.options.train import TrainOptions
from llmpy.run.folder import RunFolder
from llmpy.run.journal import Journal
from llmpy.train import start, trainer

STEPS, EVERY, WARM = 40, 20, 2


def seconds(told: argparse.Namespace, every: int, machine: Machine) -> tuple[float, list[float]]:
    """Time of STEPS steps with checkpoints at multiples of `every` (0: none), and how long each made training wait."""
    vocab_size = ModelConfig.from_dial(told.model).vocab_size
    with tempfile.TemporaryDirectory(dir=".") as name, contextlib.redirect_stdout(io.StringIO()), Journal() as journal:
        folder = Path(name)
        for part in ("train", "val"):
            tokens = np.random.default_rng(0).integers(0, vocab_size, 4 * told.B * told.T + 1)
            write_shard(folder / f"{part}.bin", tokens)
        run = RunFolder.open(folder / "run", told.model)
        options = TrainOptions(
            data=(folder / "train.bin", folder / "val.bin"), model=told.model, batch_size=told.B, keep=1,
            sequence_length=told.T, dtype=told.dtype, steps=1000, checkpoint_every=every,
        )  # fmt: skip
        made, waits = trainer.assemble(options, run, journal, machine), []
        for _ in range(WARM):
            made.step()
        made.keeper.begin(0)
        start = time.perf_counter()
        for _ in range(STEPS):
            made.step()
            if made.keeper.due(made.done - WARM):
                before = time.perf_counter()
                made._save()
                waits.append(time.perf_counter() - before)
        took = time.perf_counter() - start
        made.keeper.close()
        run.discard()
    return took, waits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("-B", type=int, default=4)
    parser.add_argument("-T", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    told = parser.parse_args()
    machine = start.load(TrainOptions(dtype=told.dtype), trainer.ALONE)
    times: dict[int, list[float]] = {0: [], EVERY: []}
    for turn in range(told.rounds):
        for every in (0, EVERY) if turn % 2 == 0 else (EVERY, 0):
            took, waits = seconds(told, every, machine)
            times[every].append(took)
            paused = ", ".join(f"{1e3 * wait:.0f} ms" for wait in waits)
            print(
                f"every {every or '-':>2}: {took:6.2f} s for {STEPS} steps"
                + (f"; training waited {paused}" if waits else "")
            )
    without, with_ = (statistics.median(times[every]) for every in (0, EVERY))
    print(f"{machine.dtype}: {without:.2f} s without, {with_:.2f} s with: {100 * (with_ / without - 1):+.1f} %")


if __name__ == "__main__":
    main()
