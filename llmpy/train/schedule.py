"""step → learning rate.     W warm-up steps, N total steps, η peak, f final fraction

warm-up    η·(step + 1)/W                              while step < W (cosine, linear, wsd)
cosine     r = (step − W)/(N − W)                      min + ½(1 + cos πr)·(η − min),  min = f·η
linear     the same r                                  η − r·(η − min)
wsd        η until D = 0.8·N, then r = (step − D)/(N − D)   min + (1 − √r)·(η − min)
constant   η from the first step: no warm-up, as in llm.c

The formulas are llm.c's; steps count from 0. Beyond N the rate keeps its final value: a run bounded by time may
overshoot its predicted N by a step.
"""

from __future__ import annotations

import math


def learning_rate(
    step: int, total: int, warmup: int, peak: float, final_fraction: float = 0.0, kind: str = "cosine"
) -> float:
    """Return the rate of update `step` (from 0) of `total`."""
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
    """Return the share of start … end before `step`, in 0 … 1."""
    return min(1.0, (step - start) / max(1, end - start))


def horizon(step: int, elapsed: float, step_seconds: float, steps: int | None, seconds: float | None) -> int:
    """Return the total steps of a run, N of the schedule, bounded by `steps` and `seconds`.

    The bound by `seconds` is recomputed at every step from the mean step time so far, `step_seconds`. So the rate ends
    when the time does, at any speed.
    """
    bounds = [] if steps is None else [steps]
    if seconds is not None:
        bounds.append(step + math.ceil(max(0.0, seconds - elapsed) / step_seconds))
    return max(step + 1, min(bounds))
