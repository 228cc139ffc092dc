"""Samples during training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llmpy.data.tokenizer import Tokenizer
from llmpy.options.train import TrainOptions
from llmpy.train import samples


@pytest.mark.parametrize(("answers", "text"), [(True, "2+2= 4"), (False, "2+2= 4<|endoftext|>5")])
def test_an_answer_ends_at_its_end(monkeypatch: pytest.MonkeyPatch, answers: bool, text: str) -> None:
    """Other text continues with the next document."""
    bytes_ = Tokenizer.bytes()
    data: Any = SimpleNamespace(
        tokenizer=bytes_, holds_answers=answers, prompt=[0], opening="2+2=", train=SimpleNamespace(vocab_size=257)
    )
    monkeypatch.setattr(samples, "generate", lambda *_, **__: iter([*b" 4", bytes_.eot, *b"5"]))
    said: list[str] = []
    journal: Any = SimpleNamespace(log=said.append, record_sample=lambda *_: None)
    asked: Any = SimpleNamespace(asked=False)
    model: Any = None
    samples.write_sample(model, data, TrainOptions(), 3, journal, asked)
    assert said == ["--- sample at step 3", text, "---"]
