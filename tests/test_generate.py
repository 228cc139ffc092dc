"""Sampling: the choice of a token, windows, UTF-8 across tokens, and every fault of a run folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from laptop import TINY, Laptop, tiny_model

from llmpy import backend, checkpoint
from llmpy.errors import LlmpyError
from llmpy.generate import TextStream, choose, encode_prompt, generate, open_run, sample
from llmpy.options import SampleOptions
from llmpy.rng import Xorshift64Star
from llmpy.tokenizer import Tokenizer


class Coins:
    """Given numbers in turn."""

    def __init__(self, *numbers: float) -> None:
        self._numbers: Iterator[float] = iter(numbers)

    def uniform(self) -> float:
        return next(self._numbers)


LOGITS = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))


@pytest.mark.parametrize(
    ("coin", "token"), [(0.0, 0), (0.09, 0), (0.11, 1), (0.29, 1), (0.31, 2), (0.61, 3), (0.9999999, 3)]
)
def test_inverse_of_the_cumulative_sum(coin: float, token: int) -> None:
    assert choose(LOGITS, Coins(coin), 1.0, 0) == token


def test_temperature_0_is_greedy_and_needs_no_coin() -> None:
    assert choose(LOGITS, Coins(), 0.0, 0) == 3


def test_temperature_sharpens() -> None:
    assert choose(LOGITS, Coins(0.31), 0.01, 0) == 3
    assert choose(LOGITS, Coins(0.2), 100.0, 0) == 0


def test_top_k_keeps_the_likeliest() -> None:
    assert choose(LOGITS, Coins(0.0), 1.0, 2) == 2
    assert choose(LOGITS, Coins(0.99), 1.0, 1) == 3
    assert choose(LOGITS, Coins(0.0), 1.0, 99) == 0
    assert choose(np.zeros(4, np.float32), Coins(0.99), 1.0, 2) == 1  # of equals, the first


def test_large_logits_do_not_overflow() -> None:
    assert choose(np.array([1e30, -1e30, 1e4], np.float32), Coins(0.5), 1e-3, 0) == 0


@pytest.mark.parametrize("temperature", [1e-3, 1e-308, 5e-324])
@pytest.mark.parametrize("top_k", [0, 2])
def test_a_tiny_temperature_is_greedy(temperature: float, top_k: int) -> None:
    assert choose(np.array([3, -9, 7, 6.9], np.float32), Coins(0.999), temperature, top_k) == 2
    assert choose(np.array([3, 7, 7, -1], np.float32), Coins(0.999), temperature, top_k) == 2
    assert choose(np.array([3, 7, 7, -1], np.float32), Coins(0.4), temperature, top_k) == 1


def test_a_broken_model_is_an_error() -> None:
    with pytest.raises(LlmpyError, match="not finite"):
        choose(np.array([0.0, np.nan], np.float32), Coins(0.5), 1.0, 0)


def greedy_by_hand(text: list[int], count: int, reach: int) -> list[int]:
    """The same without padding: a forward over just the visible text."""
    model, text = tiny_model(), list(text)
    for _ in range(count):
        seen = np.array([text[-reach:]], np.int32)
        text.append(int(model.logits(seen)[0].argmax()))
    return text[-count:]


@pytest.mark.parametrize("prompt", [[7], [1, 2, 3], list(range(40))])
def test_padding_changes_nothing_and_the_window_slides(prompt: list[int]) -> None:
    tokens = list(generate(tiny_model(), prompt, 12, 8, Coins(), temperature=0))
    assert tokens == greedy_by_hand(prompt, 12, 8)


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


def test_prompts() -> None:
    tokenizer = Tokenizer.bytes()
    assert encode_prompt(tokenizer, "") == [tokenizer.eot]
    assert tokenizer.decode(encode_prompt(tokenizer, "héllo 🦙")) == "héllo 🦙"
    with pytest.raises(LlmpyError, match="UTF-8"):
        encode_prompt(tokenizer, "a\udcffb")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with an untrained model over bytes."""
    tokenizer = Tokenizer.bytes()
    config = replace(TINY, vocab_size=tokenizer.vocab_size)
    checkpoint.save(tmp_path / "model.safetensors", tiny_model(config), 8)
    tokenizer.save(tmp_path / "tokenizer.json")
    return tmp_path


def test_sample_continues_the_prompt(run: Path) -> None:
    out: list[str] = []
    sample(SampleOptions(run, prompt="The ", tokens=20, top_k=5), out.append, Laptop())
    again: list[str] = []
    sample(SampleOptions(run, prompt="The ", tokens=20, top_k=5), again.append, Laptop())
    assert out == again
    assert "".join(out).startswith("The ")
    assert len("".join(out)) > 5


def test_sample_announces_its_compiling_apart_from_the_text(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine, asked = Laptop(), []
    monkeypatch.setattr(backend, "load", lambda name, **how: asked.append((name, how)) or machine)
    out: list[str] = []
    sample(SampleOptions(run, tokens=3, threads=2, dtype="bfloat16"), out.append)
    assert asked == [("cpu", {"threads": 2, "dtype": "bfloat16"})]
    assert machine.warmed == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "compiling nothing\n")
    assert SampleOptions(run).dtype == "auto"
    with pytest.raises(LlmpyError, match="--dtype int8"):
        SampleOptions(run, dtype="int8")


def test_a_name_that_no_disk_takes() -> None:
    with pytest.raises(LlmpyError, match="xxx.*File name too long — check|no run folder xxx"):
        open_run(Path("x" * 300))


def test_faults_of_a_run_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LlmpyError, match="no run folder nowhere — train one"):
        open_run(Path("nowhere"))
    (tmp_path / "runs" / "old").mkdir(parents=True)
    (tmp_path / "runs" / "old" / "model.safetensors").write_bytes(b"")
    with pytest.raises(LlmpyError, match="there are: runs.old"):
        open_run(Path("nowhere"))
    with pytest.raises(LlmpyError, match="damaged"):
        open_run(Path("runs/old"))
    (tmp_path / "runs" / "empty").mkdir()
    with pytest.raises(LlmpyError, match="no model at"):
        open_run(Path("runs/empty"))


def test_a_run_without_its_tokenizer(run: Path) -> None:
    (run / "tokenizer.json").unlink()
    with pytest.raises(LlmpyError, match=r"tokenizer\.json is missing"):
        open_run(run)


def test_a_tokenizer_of_another_run(run: Path) -> None:
    Tokenizer.train(["some words, some more words"] * 9, 270).save(run / "tokenizer.json")
    with pytest.raises(LlmpyError, match="tokens but the model"):
        open_run(run)
