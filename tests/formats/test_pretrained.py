"""Tokenizer folders of different make: the ids of `transformers`' AutoTokenizer, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.laptop import TINY, Laptop
from support.refused import refused
from support.samples import in_memory
from tokenizers import AddedToken, ByteLevelBPETokenizer, Regex, Tokenizer, decoders, normalizers, pre_tokenizers

from llmpy import api
from llmpy.api import GPT2
from llmpy.cli.main import main
from llmpy.data import user_data
from llmpy.data.dataset_folder import data
from llmpy.data.encode import encode
from llmpy.data.pretrained import ROLES
from llmpy.data.rank_tables import LLAMA3
from llmpy.data.records import Document
from llmpy.data.tokenizer import EOT
from llmpy.data.tokenizer import Tokenizer as Ours
from llmpy.errors import LlmpyError
from llmpy.formats import convert, huggingface, llmc, open_model, source, tokenizer_of
from llmpy.formats.gguf import write_model as write_gguf
from llmpy.generate.generation import open_run
from llmpy.options.data import DataOptions

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


def build(name: str, folder: Path) -> None:
    make, files, _, _ = FOLDERS[name]
    put(folder, "config.json", {"model_type": "gpt2", "vocab_size": make(folder) + 4})
    for file, about in files.items():
        put(folder, file, about)


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name: str, tmp_path: Path) -> None:
    """They are read, also from our own file, or refused with the reason. Cut into pieces, a text has the same ids."""
    build(name, tmp_path)
    _, _, eot, error = FOLDERS[name]
    if eot is None:
        with refused("tokenizer.invalid", tmp_path, error):
            Ours.load(tmp_path)
        return
    ours = Ours.load(tmp_path)
    ours.save(tmp_path / "again.json")
    again = Ours.load(tmp_path / "again.json")
    assert again.same_tokens(ours) and (again.eot_text, ours.eot_text) == (eot, eot)
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    long = " ".join(TEXTS * 60)
    (tokens,) = encode(ours, [Document("a", long)])
    assert tokens.ids.tolist() == [*ours.start, *ours.encode(long)]


@pytest.mark.parametrize("name", [name for name, make in FOLDERS.items() if make[2] is not None])
def test_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Also after a conversion to a folder."""
    transformers = pytest.importorskip("transformers")
    build(name, tmp_path)
    ours = Ours.load(tmp_path)
    model = in_memory(replace(TINY, vocab_size=ours.vocab_size))
    huggingface.write_model(tmp_path / "hf", replace(model, tokenizer=tmp_path), "float32")
    found: list[tuple[Json, list[int]]] = []
    for folder in (tmp_path, tmp_path / "hf"):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        theirs.backend_tokenizer.model.dropout = None  # transformers keeps this one: its ids are random
        for text in TEXTS:
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            assert ours.encode(text) == ids, (text, theirs.convert_ids_to_tokens(ids))
            assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
        assert ours.vocab_size == len(theirs)
        assert theirs.eos_token in (None, ours.eot_text)
        named = {role: str(token) for role, token in theirs.special_tokens_map.items() if role in ROLES}
        found.append((named, theirs("a")["input_ids"]))
    assert found[0][0].items() <= found[1][0].items() and found[0][1] == found[1][1]


@pytest.fixture
def spanish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder whose vocabulary has the size of GPT-2's, with a tokenizer of its own in two files."""
    folder = tmp_path / "es"
    folder.mkdir()
    V = two_files(folder)
    huggingface.write_model(folder, in_memory(replace(TINY, vocab_size=V)), "float32")
    for module in (source, convert, api):
        monkeypatch.setattr(module, "GPT2_VOCAB", V)
    monkeypatch.setattr(Ours, "gpt2", lambda *_: pytest.fail("GPT-2's tokenizer"))
    return folder


def test_a_model_keeps_its_two_files(spanish: Path, tmp_path: Path) -> None:
    """In sample, train --init and all conversions."""
    own = Ours.load(spanish)
    assert "niño" in own.decode(own.encode(" niño")) and len(own.encode(" niño")) < 5
    assert open_run(spanish)[1].same_tokens(own)
    assert GPT2.load(spanish, machine=Laptop()).require_tokenizer().same_tokens(own)
    for target in ("hf", "m.bin", "m.safetensors", "run"):
        more = ["--to", "native"] if target == "run" else []
        assert main(["convert", str(spanish), str(tmp_path / target), *more]) == 0
        assert open_run(tmp_path / target)[1].same_tokens(own)


def test_a_dataset_is_encoded_with_the_model_s_own(spanish: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its size, but not GPT-2's: train --init MODEL --data tinyshakespeare."""
    monkeypatch.setattr(user_data, "GPT2_VOCAB", Ours.load(spanish).vocab_size)
    asked: list[str] = []
    monkeypatch.setattr(
        user_data, "find_dataset", lambda _name, _log, tokenizer: asked.append(tokenizer) or spanish / "no"
    )
    for gpt2 in (Ours.bytes(), Ours.load(spanish)):
        monkeypatch.setattr(Ours, "gpt2", lambda *_, it=gpt2: it)
        found = open_model(spanish)
        vocabulary = user_data.Vocabulary(found.config.vocab_size, found.tokenizer, partial(tokenizer_of, found, print))
        with pytest.raises(LlmpyError):  # no such shards
            user_data.prepare([Path("tinyshakespeare")], spanish, model=vocabulary)
    assert asked == [str(spanish / "vocab.json"), "gpt2"]


def test_without_a_tokenizer_text_is_refused(spanish: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No conversion makes it GPT-2's."""
    (spanish / "vocab.json").rename(spanish / "vocab.txt")
    with refused("tokenizer.missing", spanish, "only vocab.txt"):
        open_run(spanish)
    model = GPT2.load(spanish, machine=Laptop())
    assert model.logits([1, 2]).shape == (1, 2, model.config.vocab_size)
    with refused("tokenizer.missing"):
        model.generate("a")
    for target, code in (("m.bin", 1), ("m.safetensors", 1), ("hf", 0)):
        assert main(["convert", str(spanish), str(tmp_path / target)]) == code
        assert (tmp_path / target).exists() == (code == 0)
        assert ("[tokenizer.missing]" in capsys.readouterr().err) == bool(code)
    with refused("tokenizer.missing"):
        open_run(tmp_path / "hf")
    with refused("tokenizer.missing"):
        model.save(tmp_path / "saved")


def test_a_bin_of_its_size_means_gpt2(spanish: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llm.c's files have no other tokenizer. It is printed."""
    monkeypatch.setattr(Ours, "gpt2", lambda *_: Ours.bytes())
    llmc.write_model(tmp_path / "m.bin", open_model(spanish), "float32")
    lines: list[str] = []
    assert tokenizer_of(open_model(tmp_path / "m.bin"), lines.append)[1] == "GPT-2's"
    assert "m.bin has no tokenizer" in lines[0] and "GPT-2" in lines[0]


def test_data_with_a_folder_or_its_vocabulary(tmp_path: Path) -> None:
    build("added special", tmp_path)
    (tmp_path / "t.txt").write_text("El niño <|im_end|> está aquí.\n" * 50, "utf-8")
    for i, path in enumerate((tmp_path, tmp_path / "vocab.json")):
        options = DataOptions(what=(str(tmp_path / "t.txt"),), tokenizer=str(path), out=tmp_path / f"out{i}")
        found = Ours.load(data(options, lambda _: None))
        assert found.same_tokens(Ours.load(tmp_path)) and found.eot_text == "<|im_end|>"
    (tmp_path / "merges.txt").rename(tmp_path / "es-merges.txt")
    with refused("tokenizer.invalid", "vocab.json", "merges.txt is missing"):
        Ours.load(tmp_path)
    (tmp_path / "es-merges.txt").rename(tmp_path / "merges.txt")
    for config in (
        "3",
        '{"tokenizer_class": 5}',
        '{"pad_token": "\\ud800"}',
        '{"added_tokens_decoder": {"x": "y"}}',
        "{",
    ):
        (tmp_path / "tokenizer_config.json").write_text(config, "utf-8")
        with refused("tokenizer.invalid", "vocab.json", "token" if "decoder" in config else "tokenizer_config.json"):
            Ours.load(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).rename(tmp_path / f"es-{name}")
    assert Ours.load(tmp_path / "es-vocab.json").same_tokens(found)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (CONFIG, "[]"),
        (CONFIG, "{"),
        (MAP, '{"eos_token": {"a": 1}}'),
        (ADDED, '{"a": "x"}'),
        (ADDED, "\xff"),
        ("chat_template.jinja", "\xff"),
    ],
)
def test_corrupt_files_next_to_it(tmp_path: Path, file: str, content: str) -> None:
    two_files(tmp_path)
    (tmp_path / file).write_text(content, "latin-1")
    with refused("tokenizer.invalid", tmp_path):
        Ours.load(tmp_path)
    (tmp_path / file).unlink()
    (tmp_path / file).symlink_to("nowhere")  # as in a hub cache without its blobs
    with refused("tokenizer.invalid", file):
        Ours.load(tmp_path)


def test_a_byte_order_mark_of_an_editor(tmp_path: Path) -> None:
    two_files(tmp_path)
    (tmp_path / CONFIG).write_text('{"eos_token": "<end>"}', "utf-8-sig")
    found = Ours.load(tmp_path)
    assert found.decode([found.eot]) == "<end>"


def test_types_of_gguf(tmp_path: Path) -> None:
    """As in llama.cpp: 1 normal, 3 control, 4 user-defined, 5 unused."""
    gguf = pytest.importorskip("gguf")
    build("added special", tmp_path)
    put(tmp_path, ADDED, {"<|user|>": 322})
    model = replace(in_memory(replace(TINY, vocab_size=326)), tokenizer=tmp_path / "vocab.json")
    write_gguf(tmp_path / "m.gguf", model, "float32")
    field = gguf.GGUFReader(tmp_path / "m.gguf").fields
    types = field["tokenizer.ggml.token_type"].contents()
    assert types == [3] + [1] * 319 + [3, 3, 4] + [5] * 3
    assert field["tokenizer.ggml.eos_token_id"].contents() == 320
    put(tmp_path, CONFIG, {"mask_token": flags(content="<mask>", lstrip=True)})
    with refused("tokenizer.unsupported", tmp_path):
        write_gguf(tmp_path / "n.gguf", model, "float32")
