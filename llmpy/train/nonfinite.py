"""Locates the first NaN or infinity of a step in the arenas after it.

The search follows the order of writing: parameters, activations layer by layer, gradients from the last layer back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..model.arena import Arena, all_finite
from ..model.language_model import LanguageModel
from ..model.partition import EMBEDDINGS


def origin(model: LanguageModel, B: int, T: int) -> str:
    """Return the first tensor that is not finite after a step on (B, T), and its layer, as text."""
    host = model.ops.to_host
    for what, tensors in (
        ("the parameter", _by_layer(model.params, model.config.layers)),
        ("the activation", _activations(model.reserve(B, T, training=True), model.config.layers)),
        ("the gradient of", _by_layer(model.grads, model.config.layers, backwards=True)),
    ):
        for name, layer, x in tensors:
            if not all_finite(host(x)):
                return f"{what} {name}" + ("" if layer is None else f" of layer {layer}")
    return "an unknown tensor"


def _by_layer(arena: Arena | None, layers: int, backwards: bool = False) -> Iterator[tuple[str, int | None, Any]]:
    """Yield name, layer and values of the parameters, or of their gradients in backward order."""
    assert arena is not None
    stacked = [(t.name, x) for t, x in arena.items() if t.per_layer]
    first = [(t.name, x) for t, x in arena.items() if t.name in EMBEDDINGS]
    last = [(t.name, x) for t, x in arena.items() if not t.per_layer and t.name not in EMBEDDINGS]
    # wte's gradient starts at the head and is complete at the end: checked before the layers it would hide them all.
    before, after = (last, first) if backwards else (first, last)
    yield from ((name, None, x) for name, x in before)
    for l in reversed(range(layers)) if backwards else range(layers):
        yield from ((name, l, x[l]) for name, x in (reversed(stacked) if backwards else stacked))
    yield from ((name, None, x) for name, x in after)


def _activations(arena: Arena, layers: int) -> Iterator[tuple[str, int | None, Any]]:
    """Yield name, layer and values, in forward order, of the activations that survive the step.

    Shared buffers do not survive, nor do the last layers of recomputed activations.
    """
    per_layer = [(t.name, x) for t, x in arena.items() if len(t.shape) > 1 and not t.steps]
    order = (
        "resid", "ln_1", "ln_1_mean", "ln_1_rstd", "norm_1", "norm_1_rstd", "qkv", "qkv_rotated", "qk_rstd",
        "attn_stats", "attn_out", "resid_mid",
    )  # fmt: skip
    per_layer.sort(key=lambda item: order.index(item[0]) if item[0] in order else len(order))
    for l in range(layers):
        for name, x in per_layer:
            if l < x.shape[0]:
                yield name, l, x[l]
    yield from ((t.name, None, x) for t, x in arena.items() if len(t.shape) == 1)
