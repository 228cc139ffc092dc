"""Sampling: the choice of a token, windows, UTF-8 across tokens, and every fault of a run folder."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from support.laptop import TINY, Laptop, tiny_model
from support.models import fill

from llmpy import backend
from llmpy.cli import main as cli
from llmpy.data.tokenizer import Tokenizer
from llmpy.errors import LlmpyError
from llmpy.generate import generation as generate_module
from llmpy.generate.generation import (
    Choice,
    Generation,
    TextStream,
    choose,
    encode_prompt,
    generate,
    likeliest,
    logprob,
    open_run,
    sample,
    window_start,
)
from llmpy.model.config import ModelConfig
from llmpy.model.gpt2 import GPT2
from llmpy.options.sample import SampleOptions
from llmpy.rng import Xorshift64Star
from llmpy.run import checkpoint


class Coins:
    """Given numbers in turn."""

    def __init__(self, *numbers: float) -> None:
        self._numbers: Iterator[float] = iter(numbers)

    def uniform(self) -> float:
        return next(self._numbers)


GREEDY = Choice(temperature=0)
LOGITS = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))


@pytest.mark.parametrize(
    ("coin", "token"), [(0.0, 0), (0.09, 0), (0.11, 1), (0.29, 1), (0.31, 2), (0.61, 3), (0.9999999, 3)]
)
def test_inverse_of_the_cumulative_sum(coin: float, token: int) -> None:
    assert choose(LOGITS, Coins(coin), Choice(1.0, 0)) == token


def test_temperature_0_is_greedy_and_needs_no_coin() -> None:
    assert choose(LOGITS, Coins(), Choice(0.0, 0)) == 3


def test_temperature_sharpens() -> None:
    assert choose(LOGITS, Coins(0.31), Choice(0.01, 0)) == 3
    assert choose(LOGITS, Coins(0.2), Choice(100.0, 0)) == 0


def test_top_k_keeps_the_likeliest() -> None:
    assert choose(LOGITS, Coins(0.0), Choice(1.0, 2)) == 2
    assert choose(LOGITS, Coins(0.99), Choice(1.0, 1)) == 3
    assert choose(LOGITS, Coins(0.0), Choice(1.0, 99)) == 0
    assert choose(np.zeros(4, np.float32), Coins(0.99), Choice(1.0, 2)) == 1  # of equals, the first


def test_large_logits_do_not_overflow() -> None:
    assert choose(np.array([1e30, -1e30, 1e4], np.float32), Coins(0.5), Choice(1e-3, 0)) == 0


@pytest.mark.parametrize("temperature", [1e-3, 1e-308, 5e-324])
@pytest.mark.parametrize("top_k", [0, 2])
def test_a_tiny_temperature_is_greedy(temperature: float, top_k: int) -> None:
    assert choose(np.array([3, -9, 7, 6.9], np.float32), Coins(0.999), Choice(temperature, top_k)) == 2
    assert choose(np.array([3, 7, 7, -1], np.float32), Coins(0.999), Choice(temperature, top_k)) == 2
    assert choose(np.array([3, 7, 7, -1], np.float32), Coins(0.4), Choice(temperature, top_k)) == 1


def test_a_broken_model_is_an_error() -> None:
    with pytest.raises(LlmpyError, match="not finite"):
        choose(np.array([0.0, np.nan], np.float32), Coins(0.5), Choice(1.0, 0))


def greedy_by_hand(text: list[int], count: int, reach: int) -> list[int]:
    """The same without padding: a forward over just the visible text."""
    model, text = tiny_model(), list(text)
    for _ in range(count):
        seen = np.array([text[window_start(len(text), reach) :]], np.int32)
        text.append(int(model.logits(seen)[0].argmax()))
    return text[-count:]


@pytest.mark.parametrize("prompt", [[7], [1, 2, 3], list(range(40))])
def test_padding_changes_nothing_and_the_window_slides(prompt: list[int]) -> None:
    for cached in (True, False):
        tokens = list(generate(tiny_model(), prompt, 12, 8, Coins(), GREEDY, cached))
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
    sample(SampleOptions(run, prompt=("The ",), tokens=20, top_k=5), out.append, Laptop())
    again: list[str] = []
    sample(SampleOptions(run, prompt=("The ",), tokens=20, top_k=5), again.append, Laptop())
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
    with pytest.raises(LlmpyError, match="holds no model"):
        open_run(Path("runs/empty"))


def test_a_run_without_its_tokenizer(run: Path) -> None:
    (run / "tokenizer.json").unlink()
    with pytest.raises(LlmpyError, match=r"came without a tokenizer.*put its tokenizer\.json"):
        open_run(run)


def test_a_checkpoint_has_the_tokenizer_of_its_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = run / "checkpoints" / "step-00000004"
    step.mkdir(parents=True)
    (run / "config.json").write_text("{}")  # what makes it a run
    (run / "model.safetensors").rename(step / "model.safetensors")
    for path in (step, step / "model.safetensors"):
        assert open_run(path)[1].same_tokens(Tokenizer.bytes())
    monkeypatch.chdir(step)
    assert open_run(Path())[0].tokenizer == run / "tokenizer.json"


def test_a_tokenizer_of_another_run(run: Path) -> None:
    Tokenizer.train(["some words, some more words"] * 9, 270).save(run / "tokenizer.json")
    with pytest.raises(LlmpyError, match="tokens but the model"):
        open_run(run)


# Which tokens may be chosen.


def chances(choice: Choice, logits: np.ndarray = LOGITS, text: list[int] | None = None) -> dict[int, float]:
    """How often each token is chosen by a thousand coins, evenly spread."""
    found: dict[int, float] = {}
    for coin in (np.arange(1000) + 0.5) / 1000:
        token = choose(logits, Coins(coin), choice, text or [])
        found[token] = found.get(token, 0) + 0.001
    return found


def near(want: dict[int, float]) -> object:
    return pytest.approx(want, abs=0.0021)


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    assert chances(Choice(top_p=0.39)) == near({3: 1})
    assert chances(Choice(top_p=0.41)) == near({2: 3 / 7, 3: 4 / 7})
    assert chances(Choice(top_p=0.95)) == near({0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4})
    assert chances(Choice(top_k=2, top_p=0.6)) == near({2: 3 / 7, 3: 4 / 7})  # of the two likeliest 4/7 < 0.6
    assert chances(Choice(top_p=1e-9), np.zeros(4, np.float32)) == near({0: 1})  # of equals, the first


def test_min_p_is_a_share_of_the_likeliest() -> None:
    assert chances(Choice(min_p=0.49)) == near({1: 2 / 9, 2: 3 / 9, 3: 4 / 9})
    assert chances(Choice(min_p=0.51)) == near({2: 3 / 7, 3: 4 / 7})
    assert chances(Choice(min_p=1)) == near({3: 1})


def test_repetition_penalty() -> None:
    logits = np.array([2, -1, 1, 0], np.float32)
    e = np.exp([1, -2, 1, 0])
    assert chances(Choice(repetition_penalty=2), logits, [0, 1, 0]) == near(dict(enumerate(e / e.sum())))
    assert choose(logits, Coins(), Choice(0, repetition_penalty=3), [0, 0]) == 2
    assert choose(logits, Coins(), Choice(0, repetition_penalty=0.5), [2]) == 0  # 2 and 2: the first
    assert logits[0] == 2


def test_likeliest_is_a_stable_sort() -> None:
    logits = np.random.default_rng(0).integers(0, 9, 100).astype(np.float32)
    for k in range(101):
        want = np.sort(np.argsort(-logits, kind="stable")[: k or 100])
        assert np.array_equal(likeliest(logits, k), want)


def test_logprob_is_log_softmax() -> None:
    for token, p in enumerate((0.1, 0.2, 0.3, 0.4)):
        assert logprob(LOGITS + 50, token) == pytest.approx(np.log(p), rel=1e-5)


# Windows.


@pytest.mark.parametrize("reach", [1, 2, 3, 4, 7, 8, 64])
def test_the_window_slides_by_a_quarter(reach: int) -> None:
    slide, before = max(1, reach // 4), 0
    for length in range(1, 5 * reach):
        start = window_start(length, reach)
        assert 1 <= length - start <= reach
        assert length <= reach or length - start > reach - slide
        assert start - before in (0, slide)
        before = start


# Stop strings.


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


# The command.


def texts(run: Path, **options: object) -> str:
    out: list[str] = []
    sample(SampleOptions(run, **options), out.append, Laptop())  # type: ignore[arg-type]
    return "".join(out)


def test_several_prompts_are_the_single_ones(run: Path) -> None:
    prompts = ("The ", "A longer prompt, beyond the reach", "x")
    together = texts(run, prompt=prompts, tokens=12)
    alone = [texts(run, prompt=(p,), tokens=12, seed=1337 + i).removesuffix("\n") for i, p in enumerate(prompts)]
    assert together == "\n---\n".join(alone) + "\n"
    assert texts(run, prompt=prompts, tokens=12, cache=False) == together


def test_json_tells_tokens_and_log_probabilities(run: Path) -> None:
    told = json.loads(texts(run, prompt=("The ", "x"), tokens=9, json=True, temperature=0))
    assert [t["prompt"] for t in told["texts"]] == ["The ", "x"]
    tokenizer = open_run(run)[1]
    model = GPT2(open_run(run)[0].config, Laptop())
    checkpoint.load_parameters(run / "model.safetensors", model.params)
    for t in told["texts"]:
        assert t["prompt_tokens"] == tokenizer.encode(t["prompt"])
        assert t["text"] == tokenizer.decode(t["tokens"])
        assert (t["ended"], len(t["tokens"])) == ("length", 9)
        text = list(t["prompt_tokens"])
        for token, given in zip(t["tokens"], t["logprobs"], strict=True):
            logits = model.logits(np.array([text[window_start(len(text), 8) :]], np.int32))[0].astype(np.float64)
            assert given == pytest.approx(logits[token] - np.log(np.exp(logits).sum()), abs=1e-5)
            text.append(token)


def test_a_stop_ends_one_text_and_not_the_others(run: Path) -> None:
    options = {"prompt": ("The ", "x"), "tokens": 30, "json": True, "temperature": 1.0, "top_k": 0}
    whole = json.loads(texts(run, **options))["texts"]
    stop = whole[0]["text"][4:6]
    told = json.loads(texts(run, **options, stop=(stop,)))["texts"]
    assert told[0]["ended"] == "stop"
    assert told[0]["text"] == whole[0]["text"][: whole[0]["text"].index(stop)]
    assert told[0]["tokens"] == whole[0]["tokens"][: len(told[0]["tokens"])]
    if stop not in whole[1]["text"]:
        assert told[1] == whole[1]


def test_a_text_ends_where_the_model_ends_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each where its own end-of-text comes, which is not shown; with ignore_eot none does, and it is."""
    eot = 256
    monkeypatch.setattr(generate_module, "choose", lambda _l, _c, _h, text: eot if len(text) in (6, 9) else 97)
    assert texts(run, prompt=("1234",), tokens=9) == "1234aa\n"
    assert texts(run, prompt=("1234", "1234567"), tokens=9) == "1234aa\n---\n1234567aa\n"
    assert texts(run, prompt=("1234",), tokens=9, stop=("ab",)) == "1234aa\n"  # what was held back comes too
    assert texts(run, prompt=("1234",), tokens=6, ignore_eot=True) == "1234aa<|endoftext|>aa<|endoftext|>\n"
    told = json.loads(texts(run, prompt=("1234", "1234567890"), tokens=4, json=True))["texts"]
    assert [(t["ended"], t["text"], t["tokens"]) for t in told] == [
        ("eot", "aa", [97, 97, eot]),
        ("length", "aaaa", [97] * 4),
    ]


def test_prompts_of_a_file(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n", "utf-8")
    told = json.loads(texts(run, prompt=("zero",), prompts_file=file, tokens=2, json=True))
    assert [t["prompt"] for t in told["texts"]] == ["zero", "one", "two"]
    file.write_text("\n", "utf-8")
    with pytest.raises(LlmpyError, match="has no prompts — write one on each line"):
        texts(run, prompts_file=file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(LlmpyError, match="is not UTF-8"):
        texts(run, prompts_file=file)
    with pytest.raises(LlmpyError, match="cannot read .*none"):
        texts(run, prompts_file=tmp_path / "none")


def test_more_texts_than_memory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    with pytest.raises(LlmpyError, match="2 texts of 8 tokens need about 0.0 GB of memory, and 0.0 GB are available"):
        texts(run, prompt=("a", "b"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_p": 0.0}, "--top-p 0.0 — use a number above 0"),
        ({"top_p": 1.5}, "--top-p 1.5 — use a number from 0 to 1"),
        ({"min_p": 2.0}, "--min-p 2.0 — use a number from 0 to 1"),
        ({"min_p": -1.0}, "--min-p -1.0 — use 0 or"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty 0.0 — use a number above 0"),
        ({"stop": ("",)}, "--stop '' — name a text"),
    ],
)
def test_what_cannot_be_asked(options: dict[str, object], said: str) -> None:
    with pytest.raises(LlmpyError, match=said):
        SampleOptions(Path("x"), **options)  # type: ignore[arg-type]


def test_prompts_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[SampleOptions] = []

    def take(options: SampleOptions) -> int:
        """Take."""
        asked.append(options)
        return 0

    monkeypatch.setattr(cli, "sample", take)
    assert cli.main(["sample", "--prompt", "a", "--prompt", "b", "RUN", "--stop", ".", "--no-cache"]) == 0
    assert asked == [SampleOptions(Path("RUN"), prompt=("a", "b"), stop=(".",), cache=False)]


def test_the_second_seed_after_the_last_is_the_first(run: Path) -> None:
    assert texts(run, prompt=("a", "b"), tokens=2, seed=(1 << 64) - 1)


# Cached and from scratch, on the compiled kernels.

SMALL = ModelConfig(layers=2, heads=2, channels=36, context=48, vocab_size=97)
CHOICES = [GREEDY, Choice(0.8, 20, 0.95, 0.01, 1.1)]


@functools.cache
def small_model(dtype: str) -> GPT2:
    model = GPT2(SMALL, backend.load("cpu", threads=2, dtype=dtype))
    fill(model)
    model.store_weights()
    return model


def check_equal(dtype: str, choice: Choice, prompts: int, together: int) -> None:
    """Random prompts of random lengths, by groups: cached and from scratch, all at once and each alone."""
    rng = np.random.default_rng(3)
    model, reach, count = small_model(dtype), 40, 12
    for first in range(0, prompts, together):
        given = [rng.integers(0, SMALL.vocab_size, rng.integers(1, 60)).tolist() for _ in range(together)]
        found = []
        for cached, pack in ((True, True), (True, False), (False, False)):
            coins = [Xorshift64Star(first + i + 1) for i in range(together)]
            generation = Generation(model, given, count, reach, coins, choice, cached, pack, logprobs=True)
            found.append([generation.step(range(together)) for _ in range(count)])
        assert found[0] == found[1] == found[2]
        alone = generate(model, given[1], count, reach, Xorshift64Star(first + 2), choice)
        assert list(alone) == [step[1].id for step in found[0]]


@pytest.mark.parametrize("choice", CHOICES, ids=["greedy", "seeded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_and_from_scratch_are_equal(dtype: str, choice: Choice) -> None:
    check_equal(dtype, choice, prompts=60, together=6)


@pytest.mark.long
@pytest.mark.parametrize("choice", CHOICES, ids=["greedy", "seeded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_and_from_scratch_are_equal_for_a_thousand(dtype: str, choice: Choice) -> None:
    check_equal(dtype, choice, prompts=1000, together=10)
