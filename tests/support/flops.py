"""FLOPs by problem size, counted apart from the arguments of a call that `bench.ops` counts from."""

from __future__ import annotations

from collections.abc import Callable

from llmpy.bench.ops import Case

FLOPS: dict[str, Callable[[Case], int]] = {
    "linear_forward": lambda c: (4 if "swiglu" in c.variant else 2) * c.rows * c.C * c.OC,
    "linear_backward": lambda c: (2 if "frozen" in c.variant else 4) * c.rows * c.C * c.OC,
    "attention_forward": lambda c: 2 * c.rows * c.T * c.C,
    "attention_backward": lambda c: 4 * c.rows * c.T * c.C,
    "classifier": lambda c: {"losses": 2, "frozen": 4, "": 6}[c.variant] * c.rows * c.C * c.Vp,
}
