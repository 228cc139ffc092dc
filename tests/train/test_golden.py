"""Golden runs: 40 steps of a small GPT-2 and a small Llama in float32, with the bits of fixtures/golden.json.

If a change alters bits, its commit says why and records them again, on every CPU of the table that is at hand:

    python tests/train/test_golden.py                                               the row of this machine
    NUMBA_CPU_NAME=generic NUMBA_CPU_FEATURES= python tests/train/test_golden.py    another; see `RUNS` in test_isa.py
    dev/arm.sh tests/train/test_golden.py                                           Arm, emulated

Parameters and texts come from integers alone, as NumPy's logarithms, sines and cosines depend on its version and CPU.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmpy.backend import kernel_cache, load
from llmpy.model.config import LlamaConfig, ModelConfig
from llmpy.model.families import language_model
from llmpy.train.optimizer import AdamW

RECORDS = Path(__file__).parents[1] / "fixtures" / "golden.json"
STEPS, B, T = 40, 2, 101  # T: more than a tile of keys
# No width is a multiple of a vector.
MODELS = {
    "gpt2": ModelConfig(layers=2, heads=3, channels=51, context=T, vocab_size=97),
    "llama": LlamaConfig(
        layers=2, heads=4, channels=44, context=T, vocab_size=97, kv_heads=2, head_size=10, ffn=70, qk_norm=True
    ),
}


def drawn(n: int, seed: int) -> np.ndarray:
    """Return n integers below 2²⁴ from Knuth's multiplicative hash."""
    return (np.arange(n, dtype=np.uint64) + np.uint64(seed)) * np.uint64(2654435761) % np.uint64(1 << 32) >> np.uint64(
        8
    )


def golden_run(ops: Any, config: ModelConfig) -> dict[str, Any]:
    """Train; return the losses of all steps and a hash of the last parameters."""
    model = language_model(config, ops)
    for i, (tensor, view) in enumerate(model.params.items()):
        spread = drawn(view.size, 1000 * i).astype(np.float32) * np.float32(2**-26) - np.float32(0.125)
        view[...] = spread.reshape(view.shape) + np.float32(tensor.init == "ones")
    model.reserve(B, T, training=True)
    text = (drawn(B * (T + 1), 7) % np.uint64(config.vocab_size)).astype(np.int32).reshape(B, T + 1)
    tokens, targets = np.ascontiguousarray(text[:, :-1]), np.ascontiguousarray(text[:, 1:])
    optimizer, losses = AdamW(model), []
    for _ in range(STEPS):
        losses.append(float(model.loss_and_grads(tokens, targets)))
        optimizer.step(2.0**-8)
    return {"losses": losses, "parameters": hashlib.sha256(model.params.buffer.tobytes()).hexdigest()[:16]}


def row(ops: Any) -> str:
    """Return the key of a record: LLVM decides how loops become vectors, and on Arm by CPU what is fused."""
    about = ops.version_info()
    isa = "avx512" if about["isa"] in ("amx", "avx512-bf16") else about["isa"]  # they differ in bfloat16 only
    cpu = f" of {kernel_cache.target()[0]}" if isa.startswith("neon") else ""
    return f"{isa}{cpu}, llvmlite {about['llvmlite']}"


@pytest.mark.skipif(sys.platform != "linux", reason="recorded with Linux's logarithm")
@pytest.mark.parametrize("name", MODELS)
def test_bits_are_those_recorded(name: str) -> None:
    ops = load("cpu", threads=2, dtype="float32")
    records = json.loads(RECORDS.read_text("utf-8"))
    if row(ops) not in records:
        pytest.skip(f"no record of {row(ops)}")
    run, record = golden_run(ops, MODELS[name]), records[row(ops)][name]
    assert record["losses"][-1] < 0.7 * record["losses"][0]
    different = [step for step in range(STEPS) if run["losses"][step] != record["losses"][step]]
    assert not different, f"bits change from step {different[0]}: see the head of this file"
    assert run == record


def main() -> None:
    """Record the runs of this machine's instruction set."""
    ops: Any = load("cpu", threads=2, dtype="float32")
    records = json.loads(RECORDS.read_text("utf-8")) if RECORDS.exists() else {}
    records[row(ops)] = {name: golden_run(ops, config) for name, config in MODELS.items()}
    lines = (f"{json.dumps(key)}: {json.dumps(records[key])}" for key in sorted(records))
    RECORDS.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    print("recorded", row(ops))


if __name__ == "__main__":
    main()
