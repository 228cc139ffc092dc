"""AdamW over the flat arenas, with clipping by global norm.

norm  = √Σ grad²                       over all gradients, before clipping
scale = min(1, clip/norm)              applied inside the update, so gradients are read once
decay on matrices only: they come first in the table, so one boundary splits the arena

Source: Loshchilov and Hutter 2017; betas and epsilon as in GPT-3 and llm.c.
"""

from __future__ import annotations

import math
from typing import Any

from ..errors import LlmpyError
from ..model.language_model import LanguageModel
from ..model.partition import Range

EPSILON = 1e-8


class AdamW:
    """The moments m and v (flat, like the parameters) and their update. A step allocates nothing."""

    def __init__(
        self, model: LanguageModel, beta1: float = 0.9, beta2: float = 0.95, weight_decay: float = 0.1,
        clip: float = 1.0,
    ) -> None:  # fmt: skip
        """`model` must be reserved for training. `clip` 0 disables clipping."""
        if model.grads is None:
            raise ValueError("call model.reserve(B, T, training=True) before creating its optimizer")
        self.ops = model.ops
        self.betas = beta1, beta2
        self.clip = clip
        self.updates = 0
        self.grad = model.grads.buffer
        self.master = param = model.trained.buffer
        self.m = self.ops.zeros(param.size, self.ops.wide)
        self.v = self.ops.zeros(param.size, self.ops.wide)
        edge = model.matrix_elements
        flat = param, self.grad, self.m, self.v
        self._parts: tuple[tuple[Any, float, Any], ...] = (
            (tuple(x[:edge] for x in flat), weight_decay, model.stored.buffer if model.mixed else None),
            (tuple(x[edge:] for x in flat), 0.0, None),
        )

    @property
    def parameters(self) -> int:
        """Number of parameters of the model; this optimizer may hold a part."""
        return int(self.grad.size)

    @property
    def owned(self) -> list[Range]:
        """The ranges of the flat arenas that m and v cover: all; see `run.parts.Moments`."""
        return [(0, self.parameters)]

    def settle(self) -> None:
        """Wait until the model has its new weights; see `distributed.zero`."""

    def weights(self, room: Any) -> Any:
        """Return all float32 weights, flat, as a host array."""
        return self.ops.to_host(self.master)

    def adopt_weights(self) -> None:
        """Do nothing: the weights are the model's parameters."""

    def step(self, lr: float) -> float:
        """Update the parameters; return the norm before clipping.

        Raises LlmpyError if the norm is not finite, with parameters, m and v unchanged.
        """
        norm = self.norm()
        if not math.isfinite(norm):
            raise LlmpyError("optimizer.not-finite", f"the gradient norm is {norm}", "Use a smaller --lr")
        self.update(lr, norm)
        return norm

    def expect(self) -> None:
        """Announce that the next backward is the step's last; see `distributed.zero`."""

    def norm(self) -> float:
        """Return the global norm of the gradients, which may not be finite."""
        return float(self.ops.global_norm(self.grad))

    def update(self, lr: float, norm: float) -> None:
        """Update the parameters; `norm`: of the gradients, finite."""
        scale = min(1.0, self.clip / norm) if self.clip and norm else 1.0
        self.updates += 1
        beta1, beta2 = self.betas
        for (param, grad, m, v), decay, stored in self._parts:
            self.ops.adamw(param, grad, m, v, lr, beta1, beta2, EPSILON, decay, scale, self.updates, stored)

    def skip(self) -> None:
        """Skip this update. m and v are unchanged; the bias-correction step still advances, as in llm.c."""
        self.updates += 1
