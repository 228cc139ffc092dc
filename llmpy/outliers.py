"""How unusual a number is among the last 128: llm.c's outlier detector, for loss and gradient norm.

z = (x − mean)/std over a window that holds x itself; std is the biased one, and z is 0 where it is 0

Sums are kept running, in double precision and in llm.c's order. Source: llm.c, `llmc/outlier_detector.h`.
"""

from __future__ import annotations

import math

WINDOW = 128


class OutlierDetector:
    """The last WINDOW values. `values`, `index`, `count` and both sums are its whole state."""

    def __init__(self) -> None:
        self.values = [0.0] * WINDOW
        self.count = 0
        self.index = 0
        self.sum = 0.0
        self.sum_of_squares = 0.0

    def update(self, x: float) -> float:
        """Take in x and return its z-score; NaN until the window is full. A NaN or infinity is not taken in: NaN."""
        if not math.isfinite(x):
            return math.nan
        if self.count < WINDOW:
            self._put(self.count, x)
            self.count += 1
            return math.nan
        oldest = self.values[self.index]
        self.sum -= oldest
        self.sum_of_squares -= oldest * oldest
        self._put(self.index, x)
        self.index = (self.index + 1) % WINDOW
        mean = self.sum / WINDOW
        variance = self.sum_of_squares / WINDOW - mean * mean
        return (x - mean) / math.sqrt(variance) if variance > 0 else 0.0

    def _put(self, place: int, x: float) -> None:
        self.values[place] = x
        self.sum += x
        self.sum_of_squares += x * x
