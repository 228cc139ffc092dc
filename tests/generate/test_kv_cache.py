"""The decoder: logits of prefill and decode are bitwise equal to those of the whole text."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support.laptop import Laptop
from support.models import batch, fill

from llmpy.backend import load
from llmpy.generate.kv_cache import Decoder
from llmpy.model.config import ModelConfig
from llmpy.model.gpt2 import GPT2

DTYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)]
ODD = ModelConfig(layers=3, heads=4, channels=100, context=40, vocab_size=97)


@pytest.fixture(scope="module", params=[*DTYPES, "int8"], ids=str)
def machines(request: pytest.FixtureRequest) -> list[Any]:
    """The same backend with 1, 2 and 3 threads."""
    return [load("cpu", threads=n, dtype=str(request.param)) for n in (1, 2, 3)]


def model_on(ops: Any) -> GPT2:
    model = GPT2(ODD, ops, trainable=not ops.quantises)
    fill(model)
    return model


@pytest.mark.parametrize("pack", [True, False])
def test_logits_equal_those_of_the_whole_text(machines: list[Any], pack: bool) -> None:
    tokens, _ = batch(ODD, B=3, T=40)
    for ops in machines:
        model = model_on(ops)
        decoder = Decoder(model, B=3, S=40, pack=pack)
        for slot, T in enumerate([1, 17, 30]):
            want = model.logits(tokens[slot : slot + 1], T - 1)[0]
            assert np.array_equal(decoder.prefill(slot, tokens[slot, :T].tolist()), want)
        live = [2, 0, 1]
        while live:
            positions = decoder.positions[live]
            logits = decoder.decode(live, tokens[live, positions].tolist())
            for slot, t, row in zip(live, positions, logits, strict=True):
                assert np.array_equal(row, model.logits(tokens[slot : slot + 1], t)[0]), (slot, t)
            live = [slot for slot in live if decoder.positions[slot] < 40]


def test_a_restarted_slot_forgets() -> None:
    model = model_on(Laptop())
    decoder = Decoder(model, B=1, S=20)
    first = decoder.prefill(0, [3, 4, 5])
    decoder.prefill(0, list(range(20)))
    assert np.array_equal(decoder.prefill(0, [3, 4, 5]), first)
    want = model.logits(np.array([[3, 4, 5, 6]], np.int32))[0]
    np.testing.assert_allclose(decoder.decode([0], [6])[0], want, rtol=1e-4, atol=1e-4)


def test_packing_again_reads_the_current_weights(machines: list[Any]) -> None:
    for ops in (ops for ops in machines if not ops.quantises):
        model = model_on(ops)
        decoder = Decoder(model, B=2, S=20)
        texts = [[3, 4, 5, 6], [7, 8, 9, 10]]

        def is_right(decoder: Decoder = decoder, model: GPT2 = model, texts: list[list[int]] = texts) -> bool:
            for slot, text in enumerate(texts):
                decoder.prefill(slot, text[:-1])
            want = [model.logits(np.array([text], np.int32))[0] for text in texts]
            return np.array_equal(decoder.decode([0, 1], [text[-1] for text in texts]), want)

        assert is_right()
        for buffer in model.params.buffers:
            buffer *= 1.25
        model.store_weights()
        assert not is_right()
        decoder.pack()
        assert is_right()


def test_ended_texts_keep_no_memory() -> None:
    """Fewer rows share the memory of all rows."""
    model = model_on(Laptop())
    decoder = Decoder(model, B=6, S=20)
    for slot in range(6):
        decoder.prefill(slot, [1, 2])
    for B in range(6, 0, -1):
        decoder.decode(range(B), [3] * B)
    whole = decoder._rows[6].acts.buffers
    for rows in decoder._rows.values():
        assert all(np.shares_memory(a, b) for a, b in zip(whole, rows.acts.buffers, strict=True))
