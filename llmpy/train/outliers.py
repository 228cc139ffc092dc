"""How far a number lies from the last ones, in standard deviations: llm.c's detector.

z = (x − mean)/std  over a window of the last 128, x among them; std is the biased one, z = 0 where it is 0

The sums of the window are carried along, so a value costs the same at any length; in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

WINDOW = 128
GIVE_UP_AFTER = 5  # steps in a row whose loss or norm is not finite


class OutlierDetector:
    """Follows one number, such as the loss, from step to step."""

    def __init__(self, window: int = WINDOW) -> None:
        self.window = window
        self._values: list[float] = []
        self._next = 0  # place of the oldest value once the window is full
        self._sum = self._squares = 0.0

    def update(self, x: float) -> float:
        """Take in a finite x; its z, or NaN for the first `window` values."""
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
        """All of it as JSON; set it to go on from there."""
        return {"values": list(self._values), "next": self._next, "sum": self._sum, "squares": self._squares}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._values, self._next = list(state["values"]), state["next"]
        self._sum, self._squares = state["sum"], state["squares"]


class UpdateGuard:
    """Decides whether a step's gradients reach the parameters."""

    def __init__(self, most: Mapping[str, float]) -> None:
        """`most`: of loss and norm, the deviations above the mean that are let through; 0: any."""
        self.most = most
        self.detectors = {name: OutlierDetector() for name in ("loss", "norm")}
        self.bad_steps = 0  # in a row, with a loss or norm that is not finite

    def judge(self, loss: float, norm: float) -> tuple[dict[str, float], str]:
        """Return the deviations of loss and norm from their means, and why to skip the update, or ""."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.bad_steps += 1
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
            return {"loss": math.nan, "norm": math.nan}, what
        self.bad_steps = 0
        z = {"loss": self.detectors["loss"].update(loss), "norm": self.detectors["norm"].update(norm)}
        found = next((name for name, value in z.items() if self.most[name] and value > self.most[name]), "")
        return z, f"the {found} is {z[found]:.1f} deviations above its mean" if found else ""
