"""Texts that join and leave a batch between tokens are the same, to the bit, as alone."""

from __future__ import annotations

import queue
import random
import threading
from typing import Any

import numpy as np
import pytest
from support.laptop import TINY, tiny_model
from support.models import fill
from support.refused import refused

from llmpy import backend
from llmpy.errors import LlmpyError
from llmpy.generate import generation as module
from llmpy.generate.batcher import Batcher, Event
from llmpy.generate.generation import Generation, Text, TextStream
from llmpy.generate.sampling import Choice
from llmpy.model.gpt2 import GPT2
from llmpy.rng import Xorshift64Star

REACH = 12  # the window slides in longer texts


@pytest.fixture(scope="module")
def model() -> GPT2:
    made = tiny_model()
    fill(made)
    return made


def letters(ids: list[int]) -> str:
    return "".join(chr(97 + i % 26) for i in ids)


def some_text(seed: int) -> Text:
    rng = random.Random(seed)
    choice = Choice(
        rng.choice([0, 0.7, 1.0]), rng.choice([0, 5, 50]), rng.choice([1.0, 0.9]), rng.choice([0, 0.05]),
        rng.choice([1.0, 1.3]),
    )  # fmt: skip
    prompt = [rng.randrange(300) for _ in range(rng.randrange(1, 20))]
    stream = TextStream(letters, [rng.choice("abc"), "de"])
    ends = frozenset(rng.sample(range(300), 8))
    return Text(prompt, rng.randrange(1, 30), Xorshift64Star(seed + 1), choice, stream, ends, rng.choice([None, 0, 3]))


def result(text: Text) -> tuple[Any, ...]:
    return text.ids, text.ended, [(t.id, np.float64(t.logprob).tobytes(), t.likeliest) for t in text.added]


def alone(model: GPT2, seed: int) -> tuple[str, tuple[Any, ...]]:
    text = some_text(seed)
    generation = Generation.of(model, [text], 30, REACH)
    pieces = ""
    while generation.texts:
        pieces += generation.step()[0][1]
    return pieces, result(text)


class Inbox:
    """Events of all texts."""

    def __init__(self) -> None:
        self.steps: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()

    def until_end(self, texts: list[Text]) -> dict[Text, list[Event]]:
        found: dict[Text, list[Event]] = {text: [] for text in texts}
        left = set(texts)
        while left:
            for event in self.steps.get(timeout=120):
                if event.text in found:
                    found[event.text].append(event)
                left -= {event.text} if event.ended else set()
        return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_texts_are_those_of_each_alone(dtype: str) -> None:
    """Two dozen with settings of their own, on five places, joined at random times; others are cancelled meanwhile."""
    model = GPT2(TINY, backend.load("cpu", threads=2, dtype=dtype))
    fill(model)
    inbox, rng = Inbox(), random.Random(5)
    batcher = Batcher(Generation(model, 5, REACH, REACH), 99, inbox.steps.put)
    texts = [some_text(seed) for seed in range(24)]
    left = list(texts)
    while left:
        some = [left.pop(0) for _ in range(min(len(left), rng.randrange(1, 6)))]
        gone = some_text(rng.randrange(1000))
        batcher.submit([*some, gone])
        for _ in range(rng.randrange(4)):
            threading.Event().wait(0.001)
        batcher.cancel([gone])
    events = inbox.until_end(texts)
    reasons = set()
    for seed, text in enumerate(texts):
        pieces, wanted = alone(model, seed)
        assert "".join(event.piece for event in events[text]) == pieces
        assert result(text) == wanted
        assert [event.token for event in events[text]] == text.added
        reasons.add(text.ended)
    assert reasons == {"eot", "stop", "length"}
    assert idle(batcher)
    batcher.close()


def idle(batcher: Batcher) -> bool:
    """Wait until no text has a place."""
    for _ in range(2000):
        if batcher.counts == (0, 0):
            return True
        threading.Event().wait(0.005)
    return False


def endless(n: int = 2) -> Text:
    return Text([1] * n, 1 << 30, Xorshift64Star(1))


def test_one_prompt_is_read_between_two_tokens_of_the_others(model: GPT2) -> None:
    generation = Generation(model, 4, REACH, REACH)
    texts = [endless(n) for n in (2, 3, 4, 5)]
    generation.join(texts[0])
    for number, text in enumerate(texts[1:], 2):
        generation.join(text)
        assert [t for t, _ in generation.logits(prefills=1)] == texts[: number - 1]
        for t in texts[: number - 1]:
            t.ids.append(7)
    assert [t for t, _ in generation.logits(prefills=1)] == texts


def test_texts_wait_in_order_and_only_so_many(model: GPT2) -> None:
    inbox = Inbox()
    batcher = Batcher(Generation(model, 2, REACH, REACH), 3, inbox.steps.put)
    held = [endless(), endless()]
    batcher.submit(held)
    waiting = [some_text(seed) for seed in (1, 2, 3)]
    batcher.submit(waiting)
    with refused("serve.busy"):
        batcher.submit([endless()])
    batcher.cancel(waiting[:1])
    batcher.cancel(held[:1])
    found = inbox.until_end(waiting[1:])
    assert [event.ended for event in found[waiting[1]]][-1] in ("eot", "stop", "length")
    assert not waiting[0].added
    batcher.close()
    (last,) = inbox.until_end(held[1:])[held[1]][-1:]
    assert isinstance(last.error, LlmpyError) and last.error.code == "serve.closing"
    with refused("serve.closing"):
        batcher.submit([endless()])


def test_an_error_ends_only_its_text(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    true = module.choose
    bad = Choice(0.123)

    def choose(logits: np.ndarray, coin: Any, choice: Choice, text: Any) -> int:
        if choice is bad and len(text) == 4:
            raise LlmpyError("model.not-finite", "infinite")
        return true(logits, coin, choice, text)

    monkeypatch.setattr(module, "choose", choose)
    inbox = Inbox()
    batcher = Batcher(Generation(model, 2, REACH, REACH), 0, inbox.steps.put)
    broken, other = Text([1, 2], 9, Xorshift64Star(1), bad), Text([3], 20, Xorshift64Star(1))
    batcher.submit([broken, other])
    found = inbox.until_end([broken, other])
    assert isinstance(found[broken][-1].error, LlmpyError) and len(broken.added) == 2
    assert other.ended == "length" and len(other.added) == 20
    assert idle(batcher)
    monkeypatch.setattr(Generation, "logits", lambda *_, **__: 1 / 0)
    batcher.submit([again := endless()])
    assert isinstance(inbox.until_end([again])[again][-1].error, ZeroDivisionError)
    assert idle(batcher)
    batcher.close()
