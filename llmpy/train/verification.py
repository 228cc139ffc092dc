"""Gradients computed twice from the same state, and compared to the bit before the optimizer reads them.

hash the parameters → a pass in reverse order → hash what it computed → the pass → hash all again, and compare

A difference is a flipped bit of memory, an error of the CPU, or a kernel that depends on the order of its threads. Not
seen are flips between two verified steps in the parameters and moments, which the optimizer rewrites: hashing them
would take two more passes over them in every step (dev/LOG.md#verified-steps). Frozen parameters are compared with
those of the first verified step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ..model.language_model import LanguageModel
from ..options.train import TrainOptions
from .nonfinite import computed, parameters


class Verification:
    """The verified steps of a process."""

    def __init__(self, model: LanguageModel, options: TrainOptions) -> None:
        self.model, self.every = model, options.verify_every
        self.shape = options.batch_size, options.sequence_length
        self._frozen: dict[str, int] = {}
        self._first = True

    def due(self, done: int, left: int) -> bool:
        """Return whether to verify the next step, after `done` of the run: the first of this process, and every n-th.

        The first is verified only if n or more are `left`, unless it is an n-th: short runs cost less than 1/n.
        """
        first, self._first = self._first, False
        return self.every > 0 and (done > 0 and done % self.every == 0 or first and left >= self.every)

    def compare(self, accumulate: Callable[[bool], float]) -> tuple[float, str]:
        """Call `accumulate` twice, the second time with True; return its result, and the first difference or ""."""
        model = self.model
        expected = hashes(model, parameters(model)) | self._frozen
        with model.ops.reversed():
            accumulate(False)
        expected |= hashes(model, computed(model, *self.shape, wide=True))
        result = accumulate(True)
        found = hashes(model, parameters(model))
        self._frozen = {name: value for name, value in found.items() if name.startswith("the frozen")}
        found |= hashes(model, computed(model, *self.shape, wide=True))
        return result, next((name for name in found if found[name] != expected[name]), "")


def hashes(model: LanguageModel, tensors: Iterable[tuple[str, Any]]) -> dict[str, int]:
    """Return the hash of each named tensor."""
    return {name: model.ops.digest(x) for name, x in tensors}


def weights_hash(model: LanguageModel) -> str:
    """Return a 64-bit hash of all parameters, in hexadecimal digits."""
    return f"{model.ops.digest(np.array([*hashes(model, parameters(model)).values()], np.uint64)):016x}"
