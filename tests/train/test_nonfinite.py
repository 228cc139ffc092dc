"""A planted NaN spreads as in training and is traced to its origin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.laptop import TINY, Laptop, tiny_model

from llmpy.model.gpt2 import GPT2
from llmpy.model.initialise import initialise
from llmpy.train.nonfinite import origin

TOKENS = np.arange(16, dtype=np.int32).reshape(2, 8)


@pytest.mark.parametrize(
    ("name", "layer", "expected"),
    [
        ("wte", None, "the parameter wte"),
        ("mlp_fc_w", 1, "the parameter mlp_fc_w of layer 1"),
        ("ln_f_b", None, "the parameter ln_f_b"),
    ],
)
def test_a_parameter(name: str, layer: int | None, expected: str) -> None:
    model = tiny_model()
    view = getattr(model.params, name)
    (view if layer is None else view[layer]).reshape(-1)[3] = np.inf
    with np.errstate(invalid="ignore"):
        model.loss_and_grads(TOKENS, TOKENS)
    assert origin(model, 2, 8) == expected


class Faulty(Laptop):
    """Writes NaN at the n-th call of one operation."""

    def __init__(self, operation: str, number: int, output: int = 0) -> None:
        super().__init__()
        calls = 0
        true = getattr(self, operation)

        def faulty(*arguments: Any, **others: Any) -> None:
            nonlocal calls
            true(*arguments, **others)
            calls += 1
            if calls == number:
                arguments[output].reshape(-1)[0] = np.nan

        setattr(self, operation, faulty)


@pytest.mark.parametrize(
    ("operation", "number", "output", "expected"),
    [
        ("attention_forward", 2, 0, "the activation attn_out of layer 1"),
        ("linear_forward", 1, 0, "the activation qkv of layer 0"),
        ("embedding_forward", 1, 0, "the activation resid of layer 0"),
        ("residual_layernorm_forward", 4, 1, "the activation losses"),
        ("linear_backward", 1, 1, "the gradient of mlp_proj_w of layer 1"),
        ("linear_backward", 1, 0, "the gradient of mlp_fc_b of layer 1"),
        ("attention_backward", 1, 0, "the gradient of attn_qkv_b of layer 1"),
        ("layernorm_backward", 2, 0, "the gradient of attn_proj_b of layer 1"),
        ("linear_backward", 6, 1, "the gradient of mlp_fc_w of layer 0"),
        ("embedding_backward", 1, 1, "the gradient of wpe"),
    ],
)
def test_an_operation(operation: str, number: int, output: int, expected: str) -> None:
    for recompute in (0, 1, 2):
        model = GPT2(TINY, Laptop(), recompute)
        initialise(model.params, TINY)
        model.reserve(2, 8, training=True)
        model.ops = Faulty(operation, number, output)
        with np.errstate(invalid="ignore"):
            model.loss_and_grads(TOKENS, TOKENS)
        assert origin(model, 2, 8) == expected


def test_nothing() -> None:
    model = tiny_model()
    model.loss_and_grads(TOKENS, TOKENS)
    assert origin(model, 2, 8) == "an unknown tensor"
