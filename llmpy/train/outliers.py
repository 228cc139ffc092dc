"""Which updates to skip: those that are not finite, and llm.c's outliers, by z-scores over a sliding window.

z = (x − mean)/std  over the last 128 values including x; biased std; z = 0 if std = 0

Running sums in float64: constant time per value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

WINDOW = 128
GIVE_UP_AFTER = 5  # consecutive steps with a loss or norm that is not finite


class OutlierDetector:
    """Tracks one number per step, such as the loss."""

    def __init__(self, window: int = WINDOW) -> None:
        self.window = window
        self._values: list[float] = []
        self._next = 0  # index of the oldest value once the window is full
        self._sum = self._squares = 0.0

    def update(self, x: float) -> float:
        """Add a finite x; return its z-score, NaN for the first `window` values."""
        self._sum += x
        self._squares += x * x
        if len(self._values) < self.window:
            self._values.append(x)
            return math.nan
        oldest, self._values[self._next] = self._values[self._next], x
        self._sum -= oldest
        self._squares -= oldest * oldest
        self._next = (self._next + 1) % self.window
        mean = self._sum / self.window
        deviation = math.sqrt(max(0.0, self._squares / self.window - mean * mean))
        return (x - mean) / deviation if deviation else 0.0

    @property
    def state(self) -> dict[str, Any]:
        """The state as JSON; assign to restore it."""
        return {"values": list(self._values), "next": self._next, "sum": self._sum, "squares": self._squares}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._values, self._next = list(state["values"]), state["next"]
        self._sum, self._squares = state["sum"], state["squares"]


class UpdateGuard:
    """Decides whether to apply a step's gradients."""

    def __init__(self, most: Mapping[str, float]) -> None:
        """`most`: the largest accepted z-score of "loss" and "norm"; 0: any."""
        self.most = most
        self.detectors = {name: OutlierDetector() for name in ("loss", "norm")}
        self.bad_steps = 0  # consecutive, with a loss or norm that is not finite

    def judge(self, loss: float | None, norm: float) -> tuple[dict[str, float], str]:
        """Return the z-scores of loss and norm, and why to skip the update, or ""; no z-scores without a loss."""
        if loss is None and math.isfinite(norm):
            return {"loss": math.nan, "norm": math.nan}, ""
        loss = math.nan if loss is None else loss
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.bad_steps += 1
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
            return {"loss": math.nan, "norm": math.nan}, what
        self.bad_steps = 0
        z = {"loss": self.detectors["loss"].update(loss), "norm": self.detectors["norm"].update(norm)}
        found = next((name for name, value in z.items() if self.most[name] and value > self.most[name]), "")
        return z, f"the {found} is {z[found]:.1f} deviations above its mean" if found else ""
