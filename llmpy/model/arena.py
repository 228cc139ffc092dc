"""A table of tensors → one aligned buffer with a named view per row.

The table is the only list of a model's tensors: sizes, views, initialisation, weight decay, checkpoint names and tests
derive from it. Tensors of one type are contiguous, in the order of the table. Tensors with `steps` follow; two of them
share memory if no step needs both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PIECE = 1 << 20  # elements per np.isfinite, which allocates its result


@dataclass(frozen=True)
class Tensor:
    """One row of a table.

    `init` fills the tensor in training from scratch: "normal" (with `std`), "uniform" (in ±`std`), "ones", "zeros";
    empty for activations. `decay`: under weight decay. `per_layer`: the first dimension of this parameter is the layer.
    `wide`: float32 in mixed precision (the residual stream, statistics, losses).
    `steps`: the steps, numbered by the table, in which the content is live; empty: always.
    """

    name: str
    shape: tuple[int, ...]
    init: str = ""
    std: float = 0.0
    decay: bool = False
    wide: bool = False
    steps: frozenset[int] = frozenset()
    per_layer: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def placed(table: Sequence[Tensor]) -> tuple[dict[str, int], int]:
    """Return each tensor's start, by name, and the end of the last, in elements; for a table of one type.

    Tensors with steps are placed largest first, each at the first place free in all its steps.
    """
    starts: dict[str, int] = {}
    end = 0
    for t in table:
        if not t.steps:
            starts[t.name] = end
            end += t.size
    first, sharing = end, sorted((t for t in table if t.steps), key=lambda t: -t.size)
    for i, t in enumerate(sharing):
        start = first
        for u in sorted((u for u in sharing[:i] if u.steps & t.steps), key=lambda u: starts[u.name]):
            if start + t.size <= starts[u.name]:
                break
            start = max(start, starts[u.name] + u.size)
        starts[t.name] = start
        end = max(end, start + t.size)
    return starts, end


def memory(table: Sequence[Tensor], size: int, wide: int) -> int:
    """Return the bytes of an arena with `size` bytes per element, `wide` per wide element."""
    if size == wide:
        return size * placed(table)[1]
    return size * placed([t for t in table if not t.wide])[1] + wide * placed([t for t in table if t.wide])[1]


class Arena:
    """One flat buffer for a whole table; each tensor is an attribute: `params.wte`, `acts.qkv[3]`.

    `empty(count, dtype)` allocates, on the device if the backend has one. Wide tensors have the type `wide`, and their
    own buffer if that is not `dtype`.
    """

    def __init__(self, table: Sequence[Tensor], empty: Callable[..., Any], dtype: Any, wide: Any = None) -> None:
        self.table = tuple(table)
        self.buffers: list[Any] = []
        self._views: dict[str, Any] = {}
        if wide is None or wide == dtype:
            self._allocate(self.table, empty, dtype)
        else:
            self._allocate([t for t in self.table if not t.wide], empty, dtype)
            self._allocate([t for t in self.table if t.wide], empty, wide)

    def _allocate(self, table: Sequence[Tensor], empty: Callable[..., Any], dtype: Any) -> None:
        starts, size = placed(table)
        buffer = empty(size, dtype)
        for tensor in table:
            start = starts[tensor.name]
            self._views[tensor.name] = buffer[start : start + tensor.size].reshape(tensor.shape)
        self.buffers.append(buffer)

    @property
    def buffer(self) -> Any:
        """The flat buffer of an arena of one type."""
        (only,) = self.buffers
        return only

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_views"][name]
        except KeyError:
            raise AttributeError(f"no tensor {name!r} in this arena") from None

    def items(self) -> Iterator[tuple[Tensor, Any]]:
        """Return (row, view) pairs in the order of the table."""
        return ((t, self._views[t.name]) for t in self.table)

    @property
    def size(self) -> int:
        """Number of elements in the whole arena."""
        return sum(buffer.size for buffer in self.buffers)


def all_finite(x: np.ndarray) -> bool:
    """Return whether an array of any shape has neither NaN nor infinity."""
    flat = x.reshape(-1)
    return all(np.isfinite(flat[i : i + PIECE]).all() for i in range(0, flat.size, PIECE))
