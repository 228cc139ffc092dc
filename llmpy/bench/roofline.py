"""The roofline of a step: what its operations would take if each reached the limit that bounds it.

    floor of a call = max(FLOPs / peak of multiply-adds, bytes / bandwidth of a stream)

Bytes are the least that a call moves between memory and caches (`ops.moved_bytes`). What stays in a cache from one
operation to the next costs less, so that a share may exceed 100 %.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ..backend import Ops
from .ops import ARGUMENTS, FLOPS, moved_bytes


class TimedOps:
    """A machine that, while `on`, records every operation of the seam: name, arguments by name, seconds."""

    def __init__(self, ops: Ops, clock: Callable[[], float] = time.perf_counter) -> None:
        self._ops, self._clock = ops, clock
        self.on = False
        self.calls: list[tuple[str, dict[str, Any], float]] = []

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._ops, name)
        if not self.on or name not in ARGUMENTS or (name == "narrow" and self._ops.dtype == self._ops.wide):
            return member

        def call(*args: Any, **named: Any) -> Any:
            start = self._clock()
            result = member(*args, **named)
            seconds = self._clock() - start
            bound = inspect.signature(member).bind(*args, **named)
            bound.apply_defaults()
            self.calls.append((name, bound.arguments, seconds))
            return result

        return call

    def operations(self, steps: int, peak: float, bandwidth: float) -> list[dict[str, Any]]:
        """Return per operation and weight, longest first: calls, ms and floor_ms of a step, and what bounds it.

        peak in GFLOP/s, bandwidth in GB/s; `steps` have been recorded.
        """
        found: dict[str, dict[str, Any]] = {}
        for op, args, seconds in self.calls:
            arithmetic = FLOPS[op](args) / peak / 1e6 if op in FLOPS else 0.0
            memory = moved_bytes(op, args) / bandwidth / 1e6
            weight = args.get("weight") if op.startswith("linear") else None
            name = op if weight is None else f"{op} {' x '.join(map(str, np.shape(weight)))}"
            row = found.setdefault(name, {"op": name, "calls": 0, "ms": 0.0, "floor_ms": 0.0, "arithmetic": 0.0})
            row["calls"] += 1
            row["ms"] += 1e3 * seconds / steps
            row["floor_ms"] += max(arithmetic, memory) / steps
            row["arithmetic"] += arithmetic / steps if arithmetic > memory else 0.0
        for row in found.values():
            row["calls"] //= steps
            row["bound"] = "arithmetic" if row.pop("arithmetic") > row["floor_ms"] / 2 else "memory"
        return sorted(found.values(), key=lambda row: -row["ms"])
