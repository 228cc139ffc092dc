"""Texts without blanks: DNA, base64, unpunctuated scripts. Work stays linear, and signals are handled."""

from __future__ import annotations

import base64
import os
import random
import signal
import string
import threading
import time
from pathlib import Path

import pytest
from tokenizers import models, pre_tokenizers, trainers
from tqdm import tqdm

from llmpy.data import encode, tokenizer
from llmpy.data.encode import LONGEST, pieces
from llmpy.data.rank_tables import EOT
from llmpy.data.records import Document
from llmpy.data.tokenizer import LONG_WORD, Tokenizer
from llmpy.data.user_data import prepare
from llmpy.system import progress as shown
from llmpy.system.interrupts import interruptible

R = random.Random(7)
ENGLISH = " ".join("".join(R.choices("etaoinshr", k=R.randrange(1, 12))) for _ in range(20_000))
LONG = {
    "DNA": "".join(R.choices("ACGT", k=300_000)),
    "base64": base64.b64encode(R.randbytes(225_000)).decode(),
    "Chinese": "".join(R.choices("的一是不了人我在有他这为之大来以个中上们", k=200_000)),
    "Thai": "".join(R.choices("กขคงจฉชซญดตถทนบปผพฟมยรลวสหอาิีึุู", k=200_000)),
    "one character": "x" * 300_000,
    "blanks": " " * 300_000,
    "line ends": "\n" * 300_000,
    "digits": "".join(R.choices("0123456789", k=300_000)),
    "signs": "".join(R.choices("!#$%&*+-/=", k=300_000)),
}


@pytest.mark.parametrize("name", LONG)
def test_a_text_without_words(name: str) -> None:
    """Training sees parts of words; every piece is bounded; tokens decode to the text."""
    text = LONG[name]
    cut = [*pieces(text)]
    assert "".join(cut) == text
    assert max(map(len, cut)) <= LONGEST
    words = (run[0] for part in tokenizer._parts_of_long_words([text]) for run in tokenizer.RUN.finditer(part))
    assert max(map(len, words)) <= LONG_WORD
    made = Tokenizer.train([text], 300)
    ids = [i for block in encode.encode(made, [Document("x", text)]) for i in block.ids.tolist()]
    assert made.decode(ids[1:]) == text


@pytest.mark.parametrize(("limit", "most"), [("MOST_WORDS", 300), ("MOST_BYTES", 3_000)])
def test_of_many_distinct_words_a_sample_is_seen(monkeypatch: pytest.MonkeyPatch, limit: str, most: int) -> None:
    """Of as many pieces as stay within the limit and one more; the same ones each time."""
    texts = [" ".join("".join(R.choices(string.ascii_letters, k=9)) for _ in range(50)) for _ in range(40)]
    monkeypatch.setattr(tokenizer, limit, most)
    seen = [*tokenizer._few_words(texts, lambda _: True)]
    assert seen == [*tokenizer._few_words(texts, lambda _: True)]
    assert {*seen} < {*texts} and len(seen) in (6, 7)
    assert [*tokenizer._few_words(["a b"] * 40, lambda _: True)] == ["a b"] * 40


def test_counting_words_ends_at_a_signal() -> None:
    assert not [*tokenizer._few_words(["a b"] * 40, lambda _: False)]


@pytest.mark.parametrize("text", [ENGLISH, ENGLISH.replace(" ", "\n"), "a\tb " * 9_000, ("word" * 60 + " ") * 500])
def test_ordinary_text_is_seen_as_it_is(text: str) -> None:
    assert "".join(tokenizer._parts_of_long_words(pieces(text))) == text
    library = tokenizer._byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[EOT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator(pieces(text), trainer)
    assert Tokenizer.train(pieces(text), 400)._library.get_vocab() == library.get_vocab()


@pytest.mark.skipif(os.name != "posix", reason="signals to a process")
def test_a_signal_ends_a_long_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """In less than a second, though the call goes on; as Ctrl-C during the library's training."""
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interruptible(lambda: time.sleep(3))
    assert time.monotonic() - started < 2


def test_results_and_errors_of_a_long_call() -> None:
    assert interruptible(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)


def test_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shown, "EVERY", 0.05)
    with shown.progress("reading") as count:
        count(1234)
        time.sleep(0.2)
    assert "reading: 1,234 characters" in capfd.readouterr().err
    assert isinstance(tqdm.get_lock(), type(threading.RLock()))  # one of processes outlives Ctrl-C on Python 3.14


def test_one_long_line_from_file_to_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dna.txt").write_text(LONG["DNA"])
    data = prepare([tmp_path / "dna.txt"], tmp_path / "run", 300, lambda _: None)
    assert data.tokenizer is not None
    text = data.tokenizer.decode(data.train[0].tokens[:]) + data.tokenizer.decode(data.val[0].tokens[:])
    assert text.replace(EOT, "") == LONG["DNA"]
