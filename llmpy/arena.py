"""A table of tensors → one aligned buffer and a named view for each row.

The table is the only list of a model's tensors: sizes, views, initialisation, weight decay,
checkpoint names and tests derive from it. Tensors lie one after another with no holes, in the
order of the table, which is also how a safetensors file lays them out: its header *is* the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tensor:
    """One row of a table.

    `init` says how training from scratch fills the tensor: "normal" draws with `std`, "ones" and
    "zeros" say it themselves; activations leave it empty. `decay` marks tensors under weight decay.
    """

    name: str
    shape: tuple[int, ...]
    init: str = ""
    std: float = 0.0
    decay: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Arena:
    """One flat buffer for a whole table; each tensor is an attribute: `params.wte`, `acts.qkv[3]`.

    `empty(count, dtype)` allocates the buffer (the backend's, so that a device can own it).
    """

    def __init__(self, table: Sequence[Tensor], empty: Callable[..., Any], dtype: Any) -> None:
        self.table = tuple(table)
        self.buffer = empty(sum(t.size for t in self.table), dtype)
        self._views: dict[str, Any] = {}
        offset = 0
        for tensor in self.table:
            self._views[tensor.name] = self.buffer[offset : offset + tensor.size].reshape(tensor.shape)
            offset += tensor.size

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_views"][name]
        except KeyError:
            raise AttributeError(f"no tensor {name!r} in this arena") from None

    def items(self) -> Iterator[tuple[Tensor, Any]]:
        """Every row of the table with its view, in order."""
        return ((t, self._views[t.name]) for t in self.table)

    @property
    def size(self) -> int:
        """Number of elements in the whole arena."""
        return int(self.buffer.size)
