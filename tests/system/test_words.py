"""Tables, suggestions, and commands that work when pasted."""

from pathlib import Path

from llmpy.system.command import command, install
from llmpy.system.words import columns, did_you_mean


def test_columns() -> None:
    assert columns([("a", "bb", "c"), ("aaa", "b", "ccc")]) == "a    bb    c\naaa   b  ccc"


def test_suggestions() -> None:
    known = ("train", "batch_size", "gpt2", "gpt2-medium")
    for word, near in (("trian", "train"), ("batchsize", "batch_size"), ("gpt", "gpt2 or gpt2-medium")):
        assert did_you_mean(word, known) == f"Did you mean {near}?"
    assert did_you_mean("zebra", known) == ""


def test_words_are_quoted_for_a_shell() -> None:
    assert command("train", "--resume", Path("my run")) == "llmpy train --resume 'my run'"
    assert install("llmpy[plot]", "b") == "pip install 'llmpy[plot]' b"
