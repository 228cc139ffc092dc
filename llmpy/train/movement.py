"""Whether every parameter moves: a kernel that leaves gradients unwritten lets some of them stand still.

A number has had no gradient if both moments are 0. A layer's tensor has not moved if it has the hash of the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..model.arena import Tensor
from ..model.language_model import LanguageModel

ENOUGH, FEW = 100, 10  # updates after which every number has had a gradient, and every tensor has moved
NAMED = 4  # in a warning


class Movement:
    """The parameters that this rank updates, compared with those at the start of the process."""

    def __init__(self, model: LanguageModel, optimizer: Any) -> None:
        """`optimizer`: an AdamW, with the weights from which training starts."""
        self.ops, self.optimizer, self.updates = model.ops, optimizer, 0
        self.places = list(_places(model.trained.table, model.config.layers, optimizer.owned))
        self._start = [self.ops.digest(optimizer.master[place]) for _, _, _, place in self.places]

    def without_gradient(self) -> list[str]:
        """Return the tensors with numbers that have had no gradient.

        Rows of embeddings and of the head may have none: unused tokens and positions, padding.
        """
        found = []
        for t, name, whole, place in self.places:
            m, v = self._host("m", place), self._host("v", place)
            if t.per_layer or not t.decay:
                still = int(np.count_nonzero((m == 0) & (v == 0)))
            else:
                still = m.size if whole and not (m.any() or v.any()) else 0
            if still:
                found.append(f"{still:,} of {m.size:,} numbers of {name}")
        return found

    def unmoved(self) -> list[str]:
        """Return the tensors that are as they were at the start although they had gradients."""
        if self.updates < FEW:
            return []
        master = self.optimizer.master
        still = (
            (name, place)
            for (_, name, _, place), start in zip(self.places, self._start, strict=True)
            if self.ops.digest(master[place]) == start
        )
        return [name for name, place in still if self._host("v", place).any()]

    def _host(self, moment: str, place: slice) -> Any:
        return self.ops.to_host(getattr(self.optimizer, moment)[place])


def _places(
    table: tuple[Tensor, ...], layers: int, owned: list[tuple[int, int]]
) -> Iterator[tuple[Tensor, str, bool, slice]]:
    """Yield each tensor's layers within the owned ranges: the row, the name, whether it is whole, and the place."""
    before = 0
    for start, stop in owned:
        first = 0
        for t in table:
            count = layers if t.per_layer else 1
            for l in range(count):
                last = first + t.size // count
                low, high = max(start, first), min(stop, last)
                if low < high:
                    name = f"{t.name} of layer {l}" if t.per_layer else t.name
                    yield t, name, high - low == last - first, slice(before + low - start, before + high - start)
                first = last
        before += stop - start


def listed(names: list[str]) -> str:
    """Return the first few names, and how many others there are."""
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
