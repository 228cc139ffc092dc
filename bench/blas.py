"""The matrix products of one training step with NumPy's BLAS: a peer for `llmpy bench peers`.

    llmpy bench peers --peer 'NumPy products=python bench/blas.py gpt2 $B $T $STEPS'

For every linear layer and the head: out := inp·Wᵀ, dinp := dout·W and dW := doutᵀ·inp, a lower bound for a step built
on a BLAS library. Attention is omitted. Prints llm.c's line for every step.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from llmpy.model.config import ModelConfig


def main(model: str, B: int, T: int, steps: int) -> None:
    config = ModelConfig.from_dial(model)
    C = config.channels
    layer = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)]
    shapes = [*config.layers * layer, (C, config.padded_vocab_size)]  # inputs, outputs
    rng = np.random.default_rng(0)
    # Layers of one width share their rows, like activations that stay in the cache.
    read = {w: rng.standard_normal((B * T, w), np.float32) for shape in shapes for w in shape}
    written = {w: np.empty_like(rows) for w, rows in read.items()}
    weights = [rng.standard_normal((o, i), np.float32) for i, o in shapes]
    gradients = [np.zeros_like(w) for w in weights]
    for step in range(1, steps + 1):
        start = time.perf_counter()
        for w in weights:
            outputs, inputs = w.shape
            np.matmul(read[inputs], w.T, out=written[outputs])
        for w, dw in zip(reversed(weights), reversed(gradients), strict=True):
            outputs, inputs = w.shape
            np.matmul(read[outputs], w, out=written[inputs])
            np.matmul(read[outputs].T, read[inputs], out=dw)
        print(f"step {step}: train loss nan (took {1e3 * (time.perf_counter() - start):.3f} ms)", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
