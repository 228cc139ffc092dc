"""`llmpy plan` against training: a table of predicted and measured memory and time of a step.

    python bench/plan_check.py [NAME …]        all configurations, or those whose name contains one of these words

Each configuration is planned by one process and trained by another. Time is the median step without the first two,
memory the most that the training process ever held. The machine must be otherwise idle, and the kernels compiled.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS, WARM = 9, 2
# name → model, B, T, dtype
CONFIGURATIONS = {
    f"{model} {B}x{T} {dtype}": (model, str(B), str(T), dtype)
    for model, B, T, dtype in [
        ("d4", 4, 64, "float32"),
        ("d4", 4, 1024, "bfloat16"),
        ("d6", 4, 256, "bfloat16"),
        ("d8", 1, 1024, "float32"),
        ("gpt2", 4, 64, "float32"),
        ("gpt2", 1, 1024, "bfloat16"),
    ]
}
TRAIN = """
import sys
from pathlib import Path
import numpy as np
from llmpy.bench import peak_memory
from llmpy.data.shards import write_shard
from llmpy.options.train import TrainOptions
from llmpy.train.trainer import train
folder, model, B, T, dtype, steps = Path(sys.argv[1]), *sys.argv[2:]
for name in ("train.bin", "val.bin"):
    write_shard(folder / name, np.random.default_rng(0).integers(0, 50_257, 20_000).astype(np.uint16))
train(TrainOptions(
    data=(folder / "train.bin", folder / "val.bin"), out=folder / "run", model=model, batch_size=int(B),
    sequence_length=int(T), dtype=dtype, steps=int(steps), checkpoint_every=0, eval_batches=1))
print(peak_memory())
"""


def output(*arguments: str) -> str:
    """What a Python process says; its faults are ours."""
    return subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout


def check(model: str, B: str, T: str, dtype: str) -> tuple[float, float, float, float]:
    """Predicted and measured memory in bytes, predicted and measured ms of a step."""
    words = ["--model", model, "-B", B, "-T", T, "--dtype", dtype, "--checkpoint-every", "0", "--json"]
    plan = json.loads(output("-m", "llmpy", "plan", *words))
    with tempfile.TemporaryDirectory(prefix="llmpy-plan-") as folder:
        peak = int(output("-c", TRAIN, folder, model, B, T, dtype, str(STEPS)).splitlines()[-1])
        lines = Path(folder, "run", "metrics.jsonl").read_text("utf-8").splitlines()
    times = [numbers["ms"] for numbers in map(json.loads, lines) if "ms" in numbers]
    return plan["memory"]["total"], peak, plan["step"]["ms"], statistics.median(times[WARM:])


def main(words: list[str]) -> None:
    """Print the table, a row as soon as it is measured."""
    print("| configuration | memory planned | measured | off | step planned | measured | off |")
    print("|---|---|---|---|---|---|---|")
    for name, told in CONFIGURATIONS.items():
        if not words or any(word in name for word in words):
            planned, held, ms, took = check(*told)
            row = (
                name, f"{planned / 1e6:,.0f} MB", f"{held / 1e6:,.0f} MB", f"{100 * (planned / held - 1):+.1f} %",
                f"{ms:,.1f} ms", f"{took:,.1f} ms", f"{100 * (ms / took - 1):+.1f} %",
            )  # fmt: skip
            print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
