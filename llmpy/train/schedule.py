"""step → learning rate.     W warm-up steps, N steps in all, η peak, f final fraction

warm-up    η·(step + 1)/W                              while step < W (cosine, linear, wsd)
cosine     r = (step − W)/(N − W)                      min + ½(1 + cos πr)·(η − min),  min = f·η
linear     the same r                                  η − r·(η − min)
wsd        η until D = 0.8·N, then r = (step − D)/(N − D)   min + (1 − √r)·(η − min)
constant   η from the first step on: llm.c gives it no warm-up, so neither do we

The formulas are llm.c's and steps count from 0. Beyond N the rate stays at its end: a run that is
bounded by the clock may overshoot its predicted N by a step.
"""

from __future__ import annotations

import math


def learning_rate(
    step: int, total: int, warmup: int, peak: float, final_fraction: float = 0.0, kind: str = "cosine"
) -> float:
    """The rate of update `step` (from 0) of `total`."""
    if kind == "constant":
        return peak
    if step < warmup:
        return peak * (step + 1) / warmup
    low = final_fraction * peak
    if kind == "wsd":
        start = int(0.8 * total)
        if step < start:
            return peak
        return low + (1 - math.sqrt(_share(step, start, total))) * (peak - low)
    share = _share(step, warmup, total)
    if kind == "linear":
        return peak - share * (peak - low)
    return low + 0.5 * (1 + math.cos(math.pi * share)) * (peak - low)


def _share(step: int, start: int, end: int) -> float:
    """How much of start … end lies behind `step`, in 0 … 1."""
    return min(1.0, (step - start) / max(1, end - start))


def horizon(step: int, elapsed: float, step_seconds: float, steps: int | None, seconds: float | None) -> int:
    """How many steps a run will have made at its end: the N of the schedule.

    `steps` bounds it by itself. `seconds` does by prediction, made anew at every step from the mean
    time of the steps so far (`step_seconds`, before the first one an estimate), so that the rate
    reaches its end when the time does, however fast the machine turns out to be.
    """
    bounds = [] if steps is None else [steps]
    if seconds is not None:
        bounds.append(step + math.ceil(max(0.0, seconds - elapsed) / step_seconds))
    return max(step + 1, min(bounds))
