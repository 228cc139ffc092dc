"""The matrix products of one training step by NumPy's BLAS, and nothing else: `python -m llmpy.bench.blas`.

For every linear layer out := inp·Wᵀ, dinp := dout·W and dW := doutᵀ·inp, and the same for the head: what a
step built on a BLAS library would need at the least. Attention's products are left out. Run by `bench
peers` in a process of its own, whose environment sets the number of threads. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from ..model.config import ModelConfig
from . import peak_memory


class Products:
    """The linear layers of a model on `rows` rows, each with weights and a gradient of its own."""

    def __init__(self, config: ModelConfig, rows: int) -> None:
        C = config.channels
        layer = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)]
        shapes = [*config.layers * layer, (C, config.padded_vocab_size)]  # inputs, outputs
        rng = np.random.default_rng(0)
        widths = {width for shape in shapes for width in shape}
        # Layers of one width share their rows, as activations that stay in the cache would.
        self.read = {w: rng.standard_normal((rows, w), np.float32) for w in widths}
        self.written = {w: np.empty((rows, w), np.float32) for w in widths}
        self.weights = [rng.standard_normal((o, i), np.float32) for i, o in shapes]
        self.dweights = [np.zeros((o, i), np.float32) for i, o in shapes]

    def step(self) -> None:
        """All products, forward and backward."""
        for w in self.weights:
            outputs, inputs = w.shape
            np.matmul(self.read[inputs], w.T, out=self.written[outputs])
        for w, dw in zip(reversed(self.weights), reversed(self.dweights), strict=True):
            outputs, inputs = w.shape
            np.matmul(self.read[outputs], w, out=self.written[inputs])
            np.matmul(self.read[outputs].T, self.read[inputs], out=dw)


def main(model: str, B: int, T: int, steps: int, warm_steps: int) -> None:
    """Time `steps` steps after `warm_steps`; ms and MB of 10⁶ bytes."""
    products = Products(ModelConfig.from_dial(model), B * T)
    times = []
    for _ in range(warm_steps + steps):
        start = time.perf_counter()
        products.step()
        times.append(1e3 * (time.perf_counter() - start))
    program = f"NumPy {np.__version__}"
    print(json.dumps({"program": program, "step_ms": times[warm_steps:], "peak_rss_mb": peak_memory() / 1e6}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
