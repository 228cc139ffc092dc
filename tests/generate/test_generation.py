"""Generation: windows, UTF-8 across tokens, stop strings, errors of run folders; with and without the cache."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np
import pytest
from support.laptop import tiny_model
from support.models import Coins, fill, untrained_run
from support.refused import refused

from llmpy import backend
from llmpy.data.tokenizer import Tokenizer
from llmpy.generate.generation import Generation, Text, TextStream, encode_prompt, generate, open_run, window_start
from llmpy.generate.kv_cache import Decoder
from llmpy.generate.sampling import Choice, choose
from llmpy.model.config import ModelConfig
from llmpy.model.gpt2 import GPT2
from llmpy.rng import Xorshift64Star

GREEDY = Choice(temperature=0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return untrained_run(tmp_path)


@pytest.mark.parametrize("reach", [1, 2, 3, 4, 7, 8, 64])
def test_the_window_slides_by_a_quarter(reach: int) -> None:
    slide, before = max(1, reach // 4), 0
    for length in range(1, 5 * reach):
        start = window_start(length, reach)
        assert 1 <= length - start <= reach
        assert length <= reach or length - start > reach - slide
        assert start - before in (0, slide)
        before = start


def from_scratch(
    model: GPT2, text: list[int], count: int, reach: int, coin: Xorshift64Star | Coins, choice: Choice
) -> list[int]:
    """Generate without a cache: a forward pass over the visible text per token."""
    text = list(text)
    for _ in range(count):
        logits = model.logits(np.array([text[window_start(len(text), reach) :]], np.int32))[0]
        text.append(choose(logits, coin, choice, text))
    return text[-count:]


@pytest.mark.parametrize("prompt", [[7], [1, 2, 3], list(range(40))])
def test_the_window_slides_as_without_a_cache(prompt: list[int]) -> None:
    tokens = list(generate(tiny_model(), prompt, 12, 8, Coins(), GREEDY))
    assert tokens == from_scratch(tiny_model(), prompt, 12, 8, Coins(), GREEDY)


def test_the_seed_decides() -> None:
    def text(seed: int) -> list[int]:
        return list(generate(tiny_model(), [1], 20, 8, Xorshift64Star(seed)))

    assert text(1) == text(1) != text(2)


@pytest.mark.parametrize("text", ["plain", "naïve café — ½", "日本語と🦙🦙", "\ufffd odd", "", "a\n\nb"])
def test_streamed_text_is_whole(text: str) -> None:
    tokenizer = Tokenizer.bytes()
    stream = TextStream(tokenizer.decode)
    pieces = [stream.feed(t) for t in tokenizer.encode(text)]
    assert "".join(pieces) + stream.finish() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in p for p in pieces)


def test_bytes_that_never_become_text() -> None:
    tokenizer = Tokenizer.bytes()
    stream = TextStream(tokenizer.decode)
    bad = [0xFF, ord("a"), 0xE2, 0x82]
    text = "".join(map(stream.feed, bad)) + stream.finish()
    assert text == tokenizer.decode(bad) == "\ufffda\ufffd"


def streamed(text: str, *stop: str) -> tuple[str, bool]:
    stream = TextStream(Tokenizer.bytes().decode, stop)
    out = "".join(map(stream.feed, text.encode()))
    return out + stream.finish(), stream.stopped


@pytest.mark.parametrize(
    ("text", "stop", "shown", "stopped"),
    [
        ("one. two", ["."], "one", True),
        ("one END two", ["END"], "one ", True),
        ("one EN two", ["END"], "one EN two", False),
        ("one EN", ["END"], "one EN", False),
        ("aab", ["ab"], "a", True),
        ("ababac", ["abac"], "ab", True),
        ("xyz", ["z", "yz"], "x", True),
        ("日本語", ["語"], "日本", True),
        ("abc", [], "abc", False),
    ],
)
def test_text_ends_before_a_stop(text: str, stop: list[str], shown: str, stopped: bool) -> None:
    assert streamed(text, *stop) == (shown, stopped)


def test_nothing_of_a_stop_is_shown_early() -> None:
    stream = TextStream(Tokenizer.bytes().decode, ["\n\nQ:"])
    assert [stream.feed(b) for b in b"a\n\nQx"] == ["a", "", "", "", "\n\nQx"]


def test_prompts() -> None:
    tokenizer = Tokenizer.bytes()
    assert encode_prompt(tokenizer, "") == [tokenizer.eot]
    assert tokenizer.decode(encode_prompt(tokenizer, "héllo 🦙")) == "héllo 🦙"
    with refused("tokenizer.lone-surrogate", "UTF-8"):
        encode_prompt(tokenizer, "a\udcffb")


def test_a_name_that_is_too_long() -> None:
    with refused("model.missing" if sys.platform == "win32" else "file.unreadable", "x" * 300):
        open_run(Path("x" * 300))


def test_errors_of_a_run_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with refused("model.missing", "nowhere", "llmpy train"):
        open_run(Path("nowhere"))
    (tmp_path / "runs" / "old").mkdir(parents=True)
    (tmp_path / "runs" / "old" / "model.safetensors").write_bytes(b"")
    with refused("model.missing", Path("runs/old")):
        open_run(Path("nowhere"))
    with refused("file.corrupt", "model.safetensors"):
        open_run(Path("runs/old"))
    (tmp_path / "runs" / "empty").mkdir()
    with refused("model.missing", Path("runs/empty")):
        open_run(Path("runs/empty"))


def test_a_run_without_its_tokenizer(run: Path) -> None:
    (run / "tokenizer.json").unlink()
    with refused("tokenizer.missing", run, "tokenizer.json"):
        open_run(run)


def test_a_checkpoint_has_the_tokenizer_of_its_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = run / "checkpoints" / "step-00000004"
    step.mkdir(parents=True)
    (run / "config.json").write_text("{}")  # marks a run
    (run / "model.safetensors").rename(step / "model.safetensors")
    for path in (step, step / "model.safetensors"):
        assert open_run(path)[1].same_tokens(Tokenizer.bytes())
    monkeypatch.chdir(step)
    assert open_run(Path())[0].tokenizer == run / "tokenizer.json"


def test_a_tokenizer_of_another_run(run: Path) -> None:
    Tokenizer.train(["some words, some more words"] * 9, 270).save(run / "tokenizer.json")
    with refused("tokenizer.vocab-mismatch", run / "tokenizer.json", 269):
        open_run(run)


# With and without the cache, on the compiled kernels.

SMALL = ModelConfig(layers=2, heads=2, channels=36, context=48, vocab_size=97)
CHOICES = [GREEDY, Choice(0.8, 20, 0.95, 0.01, 1.1)]


@functools.cache
def small_model(dtype: str) -> GPT2:
    model = GPT2(SMALL, backend.load("cpu", threads=2, dtype=dtype), trainable=dtype != "int8")
    fill(model)
    return model


@pytest.mark.parametrize("choice", CHOICES, ids=["greedy", "seeded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("prompts", "together"), [(60, 6), pytest.param(1000, 10, marks=pytest.mark.long)])
def test_cached_and_from_scratch_are_equal(prompts: int, together: int, dtype: str, choice: Choice) -> None:
    """Random prompts in groups: packed or not, together or alone."""
    rng = np.random.default_rng(3)
    model, reach, count = small_model(dtype), 40, 12
    for first in range(0, prompts, together):
        given = [rng.integers(0, SMALL.vocab_size, rng.integers(1, 60)).tolist() for _ in range(together)]
        found = []
        for pack in (True, False):
            coins = [Xorshift64Star(first + i + 1) for i in range(together)]
            texts = [Text(prompt, count, coins[i], choice, logprobs=0) for i, prompt in enumerate(given)]
            generation = Generation.of(model, texts, count, reach, pack)
            while generation.texts:
                generation.step()
            found.append([text.added for text in texts])
        assert found[0] == found[1]
        for i, prompt in enumerate(given):
            scratch = from_scratch(model, prompt, count, reach, Xorshift64Star(first + i + 1), choice)
            assert scratch == [token.id for token in found[0][i]]
        alone = generate(model, given[1], count, reach, Xorshift64Star(first + 2), choice)
        assert list(alone) == [token.id for token in found[0][1]]


def test_no_token_at_all() -> None:
    model = small_model("float32")
    assert list(generate(model, [1, 2], 0, 40, Xorshift64Star(1))) == []


def test_a_slot_without_room() -> None:
    """Kernels check no bounds."""
    decoder = Decoder(small_model("float32"), 1, 3)
    decoder.prefill(0, [1, 2])
    decoder.decode([0], [3])
    with pytest.raises(ValueError, match="3 positions"):
        decoder.decode([0], [4])


def test_a_penalty_beyond_all_numbers() -> None:
    logits = np.array([1, 2, -3], np.float32)
    choice = Choice(1.0, 0, 0.9, 0.0, 1e-40)
    assert choose(logits, Xorshift64Star(1), choice, [0]) == 0
