"""Many more threads than cores: the bits of one thread, also for two callers at once, and no call hangs.

In a process of its own: its helpers would compete with the other tests', and a hang ends with it.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from llmpy import backend
from llmpy.backend.cpu import pool
from llmpy.model.families import language_model
from llmpy.model.initialise import initialise
from llmpy.tools.selftest import MODELS
from llmpy.train.optimizer import AdamW

THREADS = (16, 64)


def steps(threads: int) -> list[str]:
    """Return hashes of loss, gradients and updated weights of a GPT-2, a Llama and its adapters."""
    found = []
    for config in MODELS.values():
        ops: Any = backend.load("cpu", threads=threads, dtype="bfloat16")
        model = language_model(config, ops)
        initialise(model.params, config)
        if config.lora is not None:
            initialise(model.trained, config)
        model.store_weights()
        model.reserve(2, 33, training=True)
        optimizer = AdamW(model)
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 2, 33), dtype=np.int32)
        loss = model.loss_and_grads(*tokens)
        optimizer.step(1e-3)
        assert model.grads is not None
        data = (np.float64(loss), model.grads.buffer, model.trained.buffer)
        found.append(hashlib.sha256(b"".join(x.tobytes() for x in data)).hexdigest())
    return found


def test_a_step_of_each_family() -> None:
    done = subprocess.run([sys.executable, __file__], timeout=120, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "63 helpers, all alive\n"), done.stderr


if __name__ == "__main__":
    alone = steps(1)
    assert len(set(alone)) == len(MODELS)
    for threads in THREADS:
        assert steps(threads) == alone, threads
    with ThreadPoolExecutor(len(THREADS)) as callers:
        assert list(callers.map(steps, THREADS)) == [alone, alone]
    alive = "all alive" if all(helper.is_alive() for helper in pool._helpers) else "not all alive"
    print(f"{len(pool._helpers)} helpers, {alive}")
