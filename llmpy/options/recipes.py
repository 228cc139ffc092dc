"""Runs of llm.c by name: the options of its scripts `run_*.sh`, for `llmpy train --recipe gpt2_124M --data …`.

The rows of a batch (-B) are what fits one machine, not the 64 … 16 of eight GPUs; the tokens of an update are theirs.
"""

from __future__ import annotations

from typing import Any

COMMON: dict[str, Any] = {
    "batch_size": 4, "sequence_length": 1024, "total_batch": 524_288, "weight_decay": 0.1, "min_lr": 0.0, "warmup": 700,
    "eval_every": 250, "eval_batches": 20, "sample_tokens": 144, "schedule": "cosine", "keep": 0, "recompute": 0,
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    # 10B tokens of FineWeb, once
    "gpt2_124M": COMMON | {
        "model": "d12", "lr": 6e-4, "steps": -1, "sample_every": 20_000, "checkpoint_every": 5000,
    },
    # 31.5B tokens
    "gpt2_350M": COMMON | {
        "model": "d24", "lr": 3e-4, "steps": 60_000, "sample_every": 100_000, "checkpoint_every": 2000,
    },
    # 150B tokens
    "gpt2_774M": COMMON | {
        "model": "d36", "lr": 2.5e-4, "steps": 286_102, "sample_every": 300_000, "checkpoint_every": 4000,
    },
    # 32B tokens of FineWeb-Edu
    "gpt2_1558M": COMMON | {
        "model": "d48", "lr": 6e-4, "steps": 32_000, "sample_every": 300_000, "checkpoint_every": 2000,
        "total_batch": 1_048_576, "min_lr": 0.1, "sample_tokens": 384,
    },
    # 300B tokens
    "gpt3_125M": COMMON | {
        "model": "gpt3:c768", "lr": 6e-4, "steps": 572_204, "sample_every": 20_000, "checkpoint_every": 10_000,
        "sequence_length": 2048, "min_lr": 0.1, "keep": 5, "keep_every": 50_000, "skip_loss": 7.0, "skip_norm": 7.0,
    },
}  # fmt: skip
RECIPES |= {name.removeprefix("gpt2_"): told for name, told in RECIPES.items() if name.startswith("gpt2_")}
