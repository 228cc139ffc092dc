"""A machine for tests of everything above the seam: the NumPy reference, which needs no compilation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmpy.backend.reference import Reference
from llmpy.model.config import ModelConfig
from llmpy.model.gpt2 import GPT2
from llmpy.model.initialise import initialise

CLOCKED = {"ms", "tokens_per_s", "share_of_peak", "eta_s"}  # the metrics that differ from run to run


class Laptop(Reference):
    """The reference in float32, with the methods of a machine that training and benchmarks use."""

    threads = 1
    isa = "numpy"

    def __init__(self, dtype: Any = np.float32) -> None:
        super().__init__(dtype=dtype)
        self.warmed = 0

    def compiled(self, kinds: Sequence[str] = ("gpt2",), decoding: bool | None = False) -> bool:
        return True

    def measure_peak(self) -> float:
        return 10.0

    def measure_bandwidth(self) -> float:
        return 20.0

    def measure_reading(self, x: object) -> float:
        return 16.0

    def warm_up(
        self, log: Callable[[str], None], decoding: bool | None = False, kinds: Sequence[str] = ("gpt2",)
    ) -> None:
        self.warmed += 1
        log("compiling nothing")

    def version_info(self) -> dict[str, str]:
        return {"isa": self.isa, "threads": str(self.threads), "numpy": np.__version__}


def in_place_of_the_cpu(threads: int | None = None, dtype: str = "") -> Laptop:
    """Return a Laptop with the signature of the CPU backend; `dtype` is ignored."""
    made = Laptop()
    made.threads = threads or 1
    return made


class AtOnce:
    """A thread that runs its target synchronously in start()."""

    def __init__(self, target: Callable[..., object], args: tuple[Any, ...], **_: object) -> None:
        self.target, self.arguments = target, args

    def start(self) -> None:
        self.target(*self.arguments)

    def is_alive(self) -> bool:
        return False

    def join(self) -> None:
        pass


TINY = ModelConfig(layers=2, heads=2, channels=8, context=16, vocab_size=300)


def tiny_model(config: ModelConfig = TINY, B: int = 2, T: int = 8) -> GPT2:
    """Return an initialised model, reserved for training on (B, T)."""
    model = GPT2(config, Laptop())
    initialise(model.params, config)
    model.reserve(B, T, training=True)
    return model
