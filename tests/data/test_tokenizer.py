"""Any text round-trips; every wrong file or wrong id is one clear error."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.samples import llama_tokenizer

from llmpy.data.encode import encode
from llmpy.data.records import Document
from llmpy.data.tokenizer import EOT, Tokenizer
from llmpy.errors import LlmpyError

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
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]  # no temporary file stays
    assert (loaded.vocab_size, loaded.eot) == (trained.vocab_size, trained.eot)
    assert loaded.encode(CORPUS[1]) == trained.encode(CORPUS[1])


def test_load_turns_truncation_and_padding_off(trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    content = json.loads(path.read_text())
    content["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    path.write_text(json.dumps(content))
    assert Tokenizer.load(path).encode(CORPUS[0]) == trained.encode(CORPUS[0])


def test_load_missing(tmp_path):
    with pytest.raises(LlmpyError, match=r"no tokenizer at .*x\.json — "):
        Tokenizer.load(tmp_path / "x.json")
    with pytest.raises(LlmpyError, match=r"cannot read .* — check the path"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"hello", b'{"version": "1.0"', b"\xff\xfe\x00"])
def test_load_what_is_no_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(LlmpyError, match=r"tokenizer\.json is not a usable tokenizer: .+ — give a tokenizer\.json"):
        Tokenizer.load(path)


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
    ("damage", "message"),
    [
        (damage_byte, "1 of the 256 bytes are no tokens"),
        (damage_eot, "it has no <|endoftext|> token, nor <|begin_of_text|>, <|end_of_text|>"),
        (damage_eot_by_a_word, "it has no <|endoftext|> token"),  # what a text may spell ends none
        (damage_decoder, "not byte-level: 0 of the 256 bytes are no tokens, decoder None"),
        (damage_prefix, r"it changes text: 'a\n' becomes ' a\n'"),
        (damage_case, "it changes text"),
    ],
)
def test_load_a_tokenizer_that_would_lose_text(trained, tmp_path, damage, message):
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(LlmpyError) as error:
        Tokenizer.load(path)
    assert message in str(error.value)


def test_the_tokenizer_of_llama_3(tmp_path):
    """Its own ids, without what it would put in front; a text begins as llm.c has it; and as from its rank table."""
    library = llama_tokenizer(tmp_path / "tokenizer.json", names=["<tool_call>"])
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.vocab_size == library.get_vocab_size()
    assert (loaded.eot_text, loaded.eot) == ("<|begin_of_text|>", library.token_to_id("<|begin_of_text|>"))
    text = f"{CORPUS[1]} it's 12345 <|end_of_text|><tool_call> \n\n x"
    assert loaded.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.byte_lengths()[loaded.encode(text)].sum() == len(text.encode())
    begun = [Document("x", "the cat"), Document("y", "the dog")]
    (tokens,) = encode(loaded, begun)
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


def test_composed_accents_are_no_loss(trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"normalizer": {"type": "NFC"}}))
    loaded = Tokenizer.load(path)
    assert loaded.decode(loaded.encode("cafe\u0301 ok")) == "café ok"
    path.write_text(json.dumps(content | {"normalizer": {"type": "NFKC"}}))
    with pytest.raises(LlmpyError, match="it changes text"):
        Tokenizer.load(path)


def test_ordinary_text_spells_no_special_token(trained, tmp_path):
    llama_tokenizer(tmp_path / "tokenizer.json")
    for tokenizer in (trained, Tokenizer.bytes(), Tokenizer.load(tmp_path / "tokenizer.json")):
        ordinary = tokenizer.ordinary()
        text = f"a{tokenizer.eot_text}b the cat"
        assert tokenizer.eot in tokenizer.encode(text)
        assert tokenizer.eot not in ordinary.encode(text)
        assert ordinary.decode(ordinary.encode(text)) == text
        assert ordinary.encode("the cat") == tokenizer.encode("the cat")
        assert ordinary.same_tokens(tokenizer)
        assert tokenizer.eot in tokenizer.encode(text)  # which stays as it was


def test_lone_surrogates(trained):
    with pytest.raises(LlmpyError, match=r"'\\udcff' at character 3: .*UTF-8 — type it again"):
        trained.encode("abc\udcff")


@pytest.mark.parametrize("bad", [-1, 300, 2**40])
def test_decode_outside_the_vocabulary(trained, bad):
    with pytest.raises(LlmpyError, match=rf"token {bad} is not in .*300 tokens — use the tokenizer"):
        trained.decode([1, 2, bad])


def test_vocabulary_too_small_for_bytes():
    with pytest.raises(LlmpyError, match=r"vocabulary of 256 .*--vocab-size 257 or more"):
        Tokenizer.train(CORPUS, 256)


def test_importing_does_not_import_the_library():
    code = "import sys, llmpy.data.prepare; sys.exit('tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_batch_names_a_lone_surrogate():
    with pytest.raises(LlmpyError, match="at character 1: a byte that was no UTF-8"):
        Tokenizer.bytes().encode_batch(["fine", "a\ud83d"])
