"""AdamW over the flat arenas, clipping by global norm.

norm  = √Σ grad²                       over everything, before clipping
scale = min(1, clip/norm)              applied inside the update, so gradients are read once
decay on the matrices only: they come first in the table, so one boundary cuts the arena in two

Source: Loshchilov and Hutter 2017; betas and epsilon as in GPT-3 and llm.c.
"""

from __future__ import annotations

import math
from typing import Any

from ..errors import LlmpyError
from ..model.gpt2 import GPT2
from ..model.partition import Range

EPSILON = 1e-8


class AdamW:
    """The optimizer's state m, v (flat, like the parameters) and its update. A step allocates nothing."""

    def __init__(
        self,
        model: GPT2,
        beta1: float = 0.9,
        beta2: float = 0.95,
        weight_decay: float = 0.1,
        clip: float = 1.0,
    ) -> None:
        """`model` must have been reserved for training: its gradients exist. `clip` 0 turns clipping off."""
        if model.grads is None:
            raise ValueError("model.reserve(B, T, training=True) comes before its optimizer")
        self.ops = model.ops
        self.betas = beta1, beta2
        self.clip = clip
        self.updates = 0
        self.grad = model.grads.buffer
        self.master = param = model.params.buffer
        self.m = self.ops.zeros(param.size, self.ops.wide)
        self.v = self.ops.zeros(param.size, self.ops.wide)
        edge = model.matrix_elements
        flat = param, self.grad, self.m, self.v
        self._parts: tuple[tuple[Any, float, Any], ...] = (
            (tuple(x[:edge] for x in flat), weight_decay, model.weights.buffer if model.mixed else None),
            (tuple(x[edge:] for x in flat), 0.0, None),
        )

    @property
    def parameters(self) -> int:
        """Parameters of the model, of which this optimizer may hold a part."""
        return int(self.grad.size)

    @property
    def owned(self) -> list[Range]:
        """The ranges of the flat arenas that m and v hold: all; see `run.parts.Moments`."""
        return [(0, self.parameters)]

    def weights(self, room: Any) -> Any:
        """Return all float32 weights, flat, as a host array."""
        return self.ops.to_host(self.master)

    def adopt_weights(self) -> None:
        """Take the weights from the model's parameters, which are the same."""

    def step(self, lr: float) -> float:
        """Update the parameters from the gradients; returns the norm before clipping.

        Raises LlmpyError, with parameters, m and v untouched, if the norm is not finite.
        """
        norm = self.norm()
        if not math.isfinite(norm):
            raise LlmpyError("train.x", f"the gradient is no longer finite (norm {norm})", "Use a smaller --lr")
        self.update(lr, norm)
        return norm

    def expect(self) -> None:
        """The backward that comes now is the step's last; see `distributed.zero`."""

    def norm(self) -> float:
        """The global norm of the gradients as they are, perhaps not finite."""
        return float(self.ops.global_norm(self.grad))

    def update(self, lr: float, norm: float) -> None:
        """Update the parameters from gradients of this norm, which must be finite."""
        scale = min(1.0, self.clip / norm) if self.clip and norm else 1.0
        self.updates += 1
        beta1, beta2 = self.betas
        for (param, grad, m, v), decay, stored in self._parts:
            self.ops.adamw(param, grad, m, v, lr, beta1, beta2, EPSILON, decay, scale, self.updates, stored)

    def skip(self) -> None:
        """Let these gradients go: m and v stay, and the correction of their bias goes on as in llm.c."""
        self.updates += 1
