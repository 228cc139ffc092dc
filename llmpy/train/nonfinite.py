"""Names what a step reads and computes, in order: where the first NaN or infinity arose, or the first other bit.

The order is that of writing: parameters, activations layer by layer, gradients from the last layer back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from ..model.arena import Arena, Tensor, all_finite
from ..model.language_model import LanguageModel
from ..model.partition import EMBEDDINGS

Place = tuple[str, int | None, Any]  # name, layer and values


def origin(model: LanguageModel, B: int, T: int) -> str:
    """Return the first tensor that is not finite after a step on (B, T), and its layer, as text."""
    for name, x in chain(parameters(model), computed(model, B, T)):
        if not all_finite(model.ops.to_host(x)):
            return name
    return "an unknown tensor"


def parameters(model: LanguageModel) -> Iterator[tuple[str, Any]]:
    """Yield name and values of the parameters as forward reads them: matrices in the type of products."""
    if model.adapters is not None:
        yield from _named("the frozen parameter", _by_layer(model.params.items(), model.config.layers))
    read = ((t, getattr(model.stored if t.decay else model.trained, t.name)) for t in model.trained.table)
    yield from _named("the parameter", _by_layer(read, model.config.layers))


def computed(model: LanguageModel, B: int, T: int, wide: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield name and values of what a pass on (B, T) has computed.

    `wide`: of the activations only the residual stream and statistics, a sixth, which the others go into.
    """
    assert model.grads is not None
    kept = _activations(model.reserve(B, T, training=True), model.config.layers, wide)
    yield from _named("the activation", kept)
    yield from _named("the gradient of", _by_layer(model.grads.items(), model.config.layers, backwards=True))


def _named(what: str, places: Iterable[Place]) -> Iterator[tuple[str, Any]]:
    return ((f"{what} {name}" + ("" if layer is None else f" of layer {layer}"), x) for name, layer, x in places)


def _by_layer(tensors: Iterable[tuple[Tensor, Any]], layers: int, backwards: bool = False) -> Iterator[Place]:
    """Yield name, layer and values of parameters, or of their gradients in backward order."""
    found = list(tensors)
    stacked = [(t.name, x) for t, x in found if t.per_layer]
    first = [(t.name, x) for t, x in found if t.name in EMBEDDINGS]
    last = [(t.name, x) for t, x in found if not t.per_layer and t.name not in EMBEDDINGS]
    # wte's gradient starts at the head and is complete at the end: checked before the layers it would hide them all.
    before, after = (last, first) if backwards else (first, last)
    yield from ((name, None, x) for name, x in before)
    for l in reversed(range(layers)) if backwards else range(layers):
        yield from ((name, l, x[l]) for name, x in (reversed(stacked) if backwards else stacked))
    yield from ((name, None, x) for name, x in after)


def _activations(arena: Arena, layers: int, wide: bool) -> Iterator[Place]:
    """Yield name, layer and values, in forward order, of the activations that survive the step.

    Shared buffers do not survive, nor do the last layers of recomputed activations.
    """
    per_layer = [(t.name, x) for t, x in arena.items() if len(t.shape) > 1 and not t.steps and t.wide >= wide]
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
