"""A backend that computes nothing: it records which operations are called, and on which array shapes.

    ops = Recorder(np.float32)
    language_model(config, cast(Ops, ops)).loss_and_grads(tokens, targets)
    ops.calls → [("embedding_forward", {"out": …, "tokens": …, "wte": …, "wpe": …}), …]

Its arrays have a shape and a dtype but no memory, so a model of any size can be recorded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from . import Ops


class Recorder:
    """The operations of `backend.Ops`; `calls` lists (operation, arguments by name)."""

    name = "recorder"
    wide = np.dtype(np.float32)
    quantises = False

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return a read-only array of zeros that share one element."""
        return np.broadcast_to(np.zeros((), dtype), shape)

    zeros = empty

    def to_host(self, x: np.ndarray) -> np.ndarray:
        """Return x."""
        return x

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        """Run it, and return it."""
        run()
        return run

    def narrow(self, out: np.ndarray, x: np.ndarray) -> None:
        """Record a call, unless out is x (a no-op)."""
        if out is not x:
            self.calls.append(("narrow", {"out": out, "x": x}))

    def __getattr__(self, name: str) -> Callable[..., float]:
        """Return an operation that records its calls and returns 1.0, a stand-in for a global norm."""
        signature = inspect.signature(getattr(Ops, name))

        def note(*arguments: Any, **named: Any) -> float:
            self.calls.append((name, signature.bind(self, *arguments, **named).arguments))
            return 1.0

        return note
