"""Any text round-trips; every invalid file or id raises one clear error."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.refused import refused
from support.samples import llama_tokenizer

from llmpy.data.encode import encode
from llmpy.data.records import Document
from llmpy.data.tokenizer import EOT, Tokenizer

CORPUS = [
    "the cat sat on the mat and the dog sat on the log\n" * 20,
    "Größe, naïve café — 日本語のテキスト\n" * 5,
]


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train(CORPUS, 300)


@pytest.fixture(scope="module")
def plain():
    return Tokenizer.bytes()


TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.text("ab <|>endoftx\n\r\t'é日🙂\0")


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_any_text_round_trips(trained, plain, text):
    for tokenizer in (trained, plain):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_bytes_are_their_own_ids(plain):
    assert plain.vocab_size == 257
    assert plain.eot == 256
    every = "".join(map(chr, range(128))) + "é日🙂"
    assert plain.encode(every) == list(every.encode())
    assert plain.decode([0xFF, 0x41]) == "\ufffdA"


def test_training_repeats(trained, tmp_path):
    again = Tokenizer.train(iter(CORPUS), 300)
    trained.save(tmp_path / "a")
    again.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_eot_in_a_text_is_the_token(trained):
    ids = trained.encode(f"a{EOT}b")
    assert ids.count(trained.eot) == 1
    assert trained.decode(ids) == f"a{EOT}b"


def test_byte_lengths_add_up(trained, plain):
    text = f"the cat sat — 日本語 {EOT} ÿ\n"
    for tokenizer in (trained, plain):
        assert tokenizer.byte_lengths().shape == (tokenizer.vocab_size,)
        lengths = tokenizer.byte_lengths()[tokenizer.encode(text)]
        assert lengths.sum() == len(text.encode()) - len(EOT)


def test_save_and_load(trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("before")
    trained.save(path)
    loaded = Tokenizer.load(path)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]  # no temporary file remains
    assert (loaded.vocab_size, loaded.eot) == (trained.vocab_size, trained.eot)
    assert loaded.encode(CORPUS[1]) == trained.encode(CORPUS[1])


def test_load_disables_truncation(trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    content = json.loads(path.read_text())
    content["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    path.write_text(json.dumps(content))
    assert Tokenizer.load(path).encode(CORPUS[0]) == trained.encode(CORPUS[0])


def test_load_missing(tmp_path):
    with refused("tokenizer.missing", tmp_path / "x.json"):
        Tokenizer.load(tmp_path / "x.json")
    with refused("tokenizer.missing", tmp_path / "tokenizer.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"hello", b'{"version": "1.0"', b"\xff\xfe\x00"])
def test_load_invalid_files(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with refused("tokenizer.invalid", path) as error:
        Tokenizer.load(path)
    assert "char 0" not in str(error.value)


def damage_byte(content):
    del content["model"]["vocab"]["Q"]


def damage_eot(content):
    content["model"]["vocab"]["other"] = content["model"]["vocab"].pop(EOT)
    content["added_tokens"] = []


def damage_eot_by_a_word(content):
    damage_eot(content)
    content["model"]["vocab"]["</s>"] = len(content["model"]["vocab"])


def damage_decoder(content):
    content["decoder"] = None


def damage_prefix(content):
    content["pre_tokenizer"]["add_prefix_space"] = True


def damage_case(content):
    content["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (damage_byte, "1 of the 256 bytes"),
        (damage_eot, "no <|endoftext|> token, nor <|begin_of_text|>, <|end_of_text|>"),
        (damage_eot_by_a_word, "no <|endoftext|> token"),  # a name that a text may contain does not end it
        (damage_decoder, "0 of the 256 bytes are missing, decoder None"),
        (damage_prefix, r"'a\n' becomes ' a\n'"),
        (damage_case, "it changes text"),
    ],
)
def test_load_a_tokenizer_that_would_lose_text(trained, tmp_path, damage, name):
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with refused("tokenizer.invalid", path, name):
        Tokenizer.load(path)


def test_the_tokenizer_of_llama_3(tmp_path):
    """The same ids as the library, without its prefix; documents start as in llm.c."""
    library = llama_tokenizer(tmp_path / "tokenizer.json", names=["<tool_call>"])
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.vocab_size == library.get_vocab_size()
    assert (loaded.eot_text, loaded.eot) == ("<|begin_of_text|>", library.token_to_id("<|begin_of_text|>"))
    text = f"{CORPUS[1]} it's 12345 <|end_of_text|><tool_call> \n\n x"
    assert loaded.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.byte_lengths()[loaded.encode(text)].sum() == len(text.encode())
    (tokens,) = encode(loaded, [Document("x", "the cat"), Document("y", "the dog")])
    assert tokens.ids.tolist() == [loaded.eot, *loaded.encode("the cat"), loaded.eot, *loaded.encode("the dog")]
    loaded.save(tmp_path / "again.json")
    assert Tokenizer.load(tmp_path / "again.json").same_tokens(loaded)


@pytest.mark.parametrize(
    ("specials", "eot"),
    [
        (("<s>", "</s>", "<pad>"), "</s>"),
        (("<|end_of_text|>", "<|start_of_role|>"), "<|end_of_text|>"),
        (("<|im_start|>", "<|endoftext|>", "</s>"), "<|endoftext|>"),
        (("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"), "<｜end▁of▁sentence｜>"),
    ],
)
def test_other_names_for_the_end_of_a_text(tmp_path, specials, eot):
    library = llama_tokenizer(tmp_path / "tokenizer.json", specials)
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.eot_text, loaded.eot) == (eot, library.token_to_id(eot))
    assert loaded.decode([loaded.eot, *loaded.encode("a"), loaded.eot]) == f"{eot}a{eot}"
    assert loaded.byte_lengths()[loaded.eot] == 0


def test_composing_accents_loses_nothing(trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"normalizer": {"type": "NFC"}}))
    loaded = Tokenizer.load(path)
    assert loaded.decode(loaded.encode("cafe\u0301 ok")) == "café ok"
    path.write_text(json.dumps(content | {"normalizer": {"type": "NFKC"}}))
    with refused("tokenizer.invalid", path, "it changes text"):
        Tokenizer.load(path)


def test_ordinary_encodes_no_special_tokens(trained, tmp_path):
    llama_tokenizer(tmp_path / "tokenizer.json")
    content = json.loads(trained.to_json())
    content["added_tokens"][0]["special"] = False  # as some files have it
    (tmp_path / "plain.json").write_text(json.dumps(content))
    loaded = [Tokenizer.load(tmp_path / name) for name in ("tokenizer.json", "plain.json")]
    for tokenizer in (trained, Tokenizer.bytes(), *loaded):
        ordinary = tokenizer.ordinary()
        text = f"a{tokenizer.eot_text}b the cat"
        assert tokenizer.eot in tokenizer.encode(text)
        assert tokenizer.eot not in ordinary.encode(text)
        assert ordinary.decode(ordinary.encode(text)) == text
        assert ordinary.encode("the cat") == tokenizer.encode("the cat")
        assert ordinary.same_tokens(tokenizer)
        assert tokenizer.eot in tokenizer.encode(text)  # unchanged


def test_lone_surrogates(trained):
    with refused("tokenizer.lone-surrogate", r"'\udcff' at character 3"):
        trained.encode("abc\udcff")


@pytest.mark.parametrize("bad", [-1, 300, 2**40])
def test_decode_outside_the_vocabulary(trained, bad):
    with refused("tokenizer.outside-vocabulary", f"token {bad} ", "300 tokens"):
        trained.decode([1, 2, bad])


def test_vocabulary_too_small_for_bytes():
    with refused("tokenizer.vocab-too-small", "256", "--vocab-size 257"):
        Tokenizer.train(CORPUS, 256)


def test_importing_does_not_import_the_library():
    code = "import sys, llmpy.data.user_data; sys.exit('tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_batch_names_a_lone_surrogate():
    with refused("tokenizer.lone-surrogate", "at character 1,"):
        Tokenizer.bytes().encode_batch(["fine", "a\ud83d"])
