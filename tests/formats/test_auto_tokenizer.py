"""Tokenizer folders of different make: the ids of `transformers`' AutoTokenizer, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.refused import refused
from tokenizers import AddedToken, ByteLevelBPETokenizer, Regex, Tokenizer, decoders, normalizers, pre_tokenizers

from llmpy.data.rank_tables import LLAMA3
from llmpy.data.tokenizer import EOT
from llmpy.data.tokenizer import Tokenizer as Ours

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")

CORPUS = [
    "el niño está aquí y la niña está allí, ¿no es así? Más café, 123 años; it's 4567\n" * 9,
    "def f(x):\n    return x\n\n日本語 <b> [PAD] <s>\n" * 5,
]
TEXTS = [
    "El niño está aquí.\n\n\n  ¿Qué?\t y  más   ", f"a{EOT}b {EOT} c", "x <|user|> y<|user|>  z\n<|user|>\n",
    "日本 🙂 é ﬁ e\u0301 \0 \u2028", " <tool>  a <tool>b", "", " ", "\n", "it's 12345 I'LL 'c'",
    "<s>[PAD]</s> <pad> <unk>", "a\r\n\r\n  b", "<|im_end|> w<W>w <W> a b <x y>",
]  # fmt: skip

Json = dict[str, Any]


def two_files(folder: Path, specials: tuple[str, ...] = (EOT,)) -> int:
    """Train 320 tokens; write vocab.json and merges.txt as in tutorials."""
    library = ByteLevelBPETokenizer()
    library.train_from_iterator(CORPUS, 320, special_tokens=list(specials), show_progress=False)
    library.save_model(str(folder))
    return int(library.get_vocab_size())


def whole(folder: Path, change: Callable[[Tokenizer], Any] = lambda t: None, specials: tuple[str, ...] = (EOT,)) -> int:
    """Write a tokenizer.json."""
    two_files(folder, specials)
    library = Tokenizer.from_str(Ours.bytes().to_json())
    library.model = type(library.model).from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    library.add_special_tokens([AddedToken(t, special=True) for t in specials])
    change(library)
    library.save(str(folder / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    return int(library.get_vocab_size())


def put(folder: Path, name: str, about: Json) -> None:
    path = folder / name
    before = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps(before | about), "utf-8")


def llama_words(library: Tokenizer) -> None:
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


def training(library: Tokenizer) -> None:
    library.enable_truncation(3)
    library.enable_padding(length=50)
    library.model.dropout = 0.5


def normalized(library: Tokenizer) -> None:
    library.normalizer = normalizers.NFC()


def no_words(library: Tokenizer) -> None:
    library.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)


def prefixed(library: Tokenizer) -> None:
    library.pre_tokenizer = pre_tokenizers.ByteLevel(True)


def fallback(library: Tokenizer) -> None:
    library.model.byte_fallback = True
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])


def flags(**more: Any) -> Json:
    return {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": False} | more


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
ENDS = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "pad_token": "<pad>"}
TUTORIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
Make = tuple[Callable[[Path], int], dict[str, Json], str | None, str]
# name → (vocabulary, files next to it, end-of-text or None: refused, part of the error)
FOLDERS: dict[str, Make] = {
    "two files": (two_files, {}, EOT, ""),
    "class": (two_files, {CONFIG: {"tokenizer_class": "GPT2Tokenizer"}}, EOT, ""),
    "added": (two_files, {ADDED: {"<|user|>": 320, "<tool>": 321}}, EOT, ""),
    "added special": (
        two_files,
        {ADDED: {"<|im_end|>": 320, "[PAD]": 321}, MAP: {"eos_token": "<|im_end|>", "pad_token": "[PAD]"}},
        "<|im_end|>", "",
    ),
    "tutorial": (lambda f: two_files(f, TUTORIAL), {MAP: ENDS}, "</s>", ""),
    "only eos": (lambda f: two_files(f, TUTORIAL), {CONFIG: {"eos_token": "</s>"}}, "</s>", ""),
    "new eos": (two_files, {CONFIG: {"eos_token": "<|im_end|>", "add_bos_token": True}}, "<|im_end|>", ""),
    "decoder": (
        two_files,
        {CONFIG: {"added_tokens_decoder": {
            "0": flags(content=EOT, special=True), "320": flags(content="<tool>", lstrip=True),
            "321": flags(content="<|user|>", rstrip=True, special=True), "322": flags(content="<W>", single_word=True),
            "323": flags(content="<x y>", normalized=True),
        }, "extra_special_tokens": ["<|im_end|>"]}},
        EOT, "",
    ),
    "map with flags": (
        lambda f: two_files(f, TUTORIAL),
        {MAP: {**ENDS, "mask_token": flags(content="<mask>", lstrip=True), "additional_special_tokens": ["<|user|>"]}},
        "</s>", "",
    ),
    "gap": (two_files, {ADDED: {"<tool>": 350}}, None, "<tool>"),
    "prefix": (two_files, {CONFIG: {"add_prefix_space": True}}, None, "changes text"),
    "whole": (whole, {}, EOT, ""),
    "whole, training": (lambda f: whole(f, training), FAST and {CONFIG: FAST}, EOT, ""),
    "GPT-2, training": (lambda f: whole(f, training), {CONFIG: {"tokenizer_class": "GPT2TokenizerFast"}}, EOT, ""),
    "GPT-2, prefix in file": (lambda f: whole(f, prefixed), {}, EOT, ""),
    "GPT-2, NFC": (lambda f: whole(f, normalized), {}, None, "GPT2Tokenizer"),
    "GPT-2, words": (lambda f: whole(f, llama_words), {}, None, "GPT2Tokenizer"),
    "NFC": (lambda f: whole(f, normalized), {CONFIG: FAST}, EOT, ""),
    "no words": (lambda f: whole(f, no_words), {CONFIG: FAST}, EOT, ""),
    "Llama": (
        lambda f: whole(f, llama_words, ("<|begin_of_text|>", "<|end_of_text|>")),
        {CONFIG: FAST | {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}}, "<|end_of_text|>", "",
    ),
    "more in the configuration": (
        whole,
        {CONFIG: FAST | {"eos_token": "<|im_end|>", "added_tokens_decoder": {
            "0": flags(content=EOT, special=True), "320": flags(content="<|im_end|>", special=True),
            "321": flags(content="<|user|>", lstrip=True, rstrip=True)}}},
        "<|im_end|>", "",
    ),
    "added in the file": (lambda f: whole(f, lambda t: t.add_tokens(["<|user|>", "<tool>"])), {CONFIG: FAST}, EOT, ""),
    "byte fallback": (lambda f: whole(f, fallback), {CONFIG: FAST}, None, "not byte-level"),
    "WordPiece": (two_files, {CONFIG: {"tokenizer_class": "BertTokenizer"}}, None, "BertTokenizer"),
    "Unigram": (whole, {CONFIG: {"tokenizer_class": "T5TokenizerFast"}}, None, "T5TokenizerFast"),
    "fast of two files": (two_files, {CONFIG: FAST}, None, "PreTrainedTokenizerFast"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    make, files, eot, error = FOLDERS[name]
    size = make(tmp_path)
    put(tmp_path, "config.json", {"model_type": "gpt2", "vocab_size": size + 4})
    for file, about in files.items():
        put(tmp_path, file, about)
    if eot is None:
        with refused("tokenizer.invalid", tmp_path, error):
            Ours.load(tmp_path)
        return
    ours = Ours.load(tmp_path)
    compare(ours, tmp_path, eot)
    ours.save(tmp_path / "again.json")
    again = Ours.load(tmp_path / "again.json")
    assert again.same_tokens(ours) and again.eot_text == eot
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


def compare(ours: Ours, folder: Path, eot: str) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.backend_tokenizer.model.dropout = None  # transformers keeps this one: its ids are random
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids, (text, theirs.convert_ids_to_tokens(ids))
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert ours.vocab_size == len(theirs)
    assert ours.eot_text == eot
    if theirs.eos_token is not None:
        assert (ours.eot, eot) == (theirs.eos_token_id, theirs.eos_token)
