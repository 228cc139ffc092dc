"""Tokenizers of SmolLM2, Llama 3, Qwen, Llama 2 and TinyLlama: their library's ids, in pieces too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chats import CORPUS, LETTERS, MAKES, write
from support.refused import refused
from tokenizers import Tokenizer as Library

from llmpy.data import encode as encode_module
from llmpy.data.encode import encode
from llmpy.data.records import Document
from llmpy.data.tokenizer import NEVER, Tokenizer
from llmpy.generate.generation import TextStream, encode_prompt

pytestmark = pytest.mark.filterwarnings("default")
Models = dict[str, tuple[Library, Tokenizer]]
ENDS = {"smollm": "<|im_end|>", "llama3": "<|eot_id|>", "qwen": "<|im_end|>"}  # others: </s>
TEXTS = [
    *CORPUS, LETTERS, "", " ", "  a", "a\n\n1. b\n  22  \n", "12345 6", "x </s> y</s>z <s>",
    "a<|im_end|>\n<|im_start|>",
    "\ta\r\n b \n\n c", "<think>\n</think>", "ﬁ e\u0301\u0301 q", "\0\x1c\x85", "a <unk> b", " lead", "'s 'S it'll",
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    made = {}
    for make in MAKES:
        library = write(folder := tmp_path_factory.mktemp("make"), make)
        made[make] = library, Tokenizer.load(folder)
    return made


def tokens(tokenizer: Tokenizer, *documents: Document) -> list[int]:
    return np.concatenate([block.ids for block in encode(tokenizer, documents)]).tolist()


@pytest.mark.parametrize("make", MAKES)
def test_ids_and_texts(make: str, models: Models) -> None:
    library, tokenizer = models[make]
    assert tokenizer.eot_text == ENDS.get(make, "</s>")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert [*tokenizer.prefix, *ids] == library.encode(text).ids
        assert encode_prompt(tokenizer, text) == (library.encode(text).ids or [tokenizer.eot])
        assert tokenizer.byte_lengths()[ids].sum() >= len(text.encode()) - 40
    assert tokenizer.start == [tokenizer.eot, *tokenizer.prefix]
    assert tokens(tokenizer, Document("x", "a b")) == [*tokenizer.start, *tokenizer.encode("a b")]
    assert len(tokenizer.prefix) == (make not in ("smollm", "qwen"))


@pytest.mark.parametrize("make", MAKES)
def test_pieces_have_the_ids_of_the_whole(make: str, models: Models) -> None:
    _, tokenizer = models[make]
    assert tokenizer.border is not NEVER

    @settings(max_examples=150, deadline=None)
    @given(text=st.text("ab 1'.\n▁<s/>日é\u0301", max_size=60))
    def check(text: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encode_module, "PIECE", 2)
            assert tokens(tokenizer, Document("", text))[len(tokenizer.start) :] == tokenizer.encode(text)
            assert tokens(tokenizer, Document("", text, literal=True))[len(tokenizer.start) :] == (
                tokenizer.ordinary().encode(text)
            )

    check()
    for text in TEXTS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encode_module, "PIECE", 1)
            assert tokens(tokenizer, Document("", text))[len(tokenizer.start) :] == tokenizer.encode(text)


@pytest.mark.parametrize("make", MAKES)
def test_a_stream_continues(make: str, models: Models) -> None:
    """Blanks between tokens stay, and characters of several tokens come whole."""
    _, tokenizer = models[make]
    for text in CORPUS:
        ids = tokenizer.encode(text)
        stream = TextStream(tokenizer.continuation)
        said = "".join(map(stream.feed, ids)) + stream.finish()
        assert said == " " * (not tokenizer.byte_level) + text
        assert tokenizer.continuation(ids[3:]) == tokenizer.decode(ids).removeprefix(tokenizer.decode(ids[:3]))


@pytest.mark.parametrize("make", MAKES)
def test_a_completion_counts(make: str, models: Models) -> None:
    _, tokenizer = models[make]
    document = Document("", "What is it? It is 4.", ((11, 20),), literal=True)
    (block,) = encode(tokenizer, [document])
    assert block.counted is not None
    ids, marks = block.ids.tolist(), block.counted
    assert tokenizer.continuation([i for i, mark in zip(ids, marks, strict=True) if mark][len(tokenizer.start) :]) == (
        " It is 4."
    )


def test_bytes_without_a_token(models: Models) -> None:
    """The library drops them silently, and so does transformers."""
    tokenizer = models["smollm"][1]
    odd = "a \U00046131"  # starts with 0xf1
    for texts in ([odd], ["fine", odd]):
        with refused("tokenizer.no-byte", r"\U00046131"):
            tokenizer.encode_batch(texts)
    with refused("tokenizer.no-byte"):
        tokens(tokenizer, Document("", odd, ((0, 1),), rendered=True))


def test_a_vocabulary_where_tokens_join_words_is_never_cut(tmp_path: Path) -> None:
    write(tmp_path, "prepend")
    about: dict[str, Any] = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    about["model"]["vocab"]["e▁"] = len(about["model"]["vocab"])
    about["model"]["merges"].append(["e", "▁"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(about), "utf-8")
    assert Tokenizer.load(tmp_path).border is NEVER


@pytest.mark.parametrize("make", MAKES)
def test_ids_are_those_of_transformers(make: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write(tmp_path, make)
    path = tmp_path / "tokenizer_config.json"
    about = json.loads(path.read_text())
    classes = {"smollm": ["PreTrainedTokenizerFast"], "qwen": ["Qwen2Tokenizer", "PreTrainedTokenizerFast"]}
    for kind in classes.get(make, ["PreTrainedTokenizerFast"]):
        for more in ({}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}):
            path.write_text(json.dumps(about | {"tokenizer_class": kind} | more))
            ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
            for text in TEXTS:
                assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
                assert [*ours.prefix, *ours.encode(text)] == theirs(text)["input_ids"]
            assert ours.vocab_size == len(theirs)


def test_transformers_5_differs_after_special_tokens_only(tmp_path: Path) -> None:
    """LlamaTokenizer has a blank in front of the first text only; the file, before each. Ours is the file's."""
    transformers = pytest.importorskip("transformers")
    write(tmp_path, "prepend")
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer", "legacy": False}))
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a b", "two  blanks\n\n1. é 日本", "x"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
