"""A rank table restores the tokenizer that it came from, for decoding and encoding."""

import base64
import contextlib
import functools
import json
import random

import pytest
from support.refused import refused
from support.samples import SHARED, gpt2_table, llmc_table, needs_data
from tokenizers import Regex, pre_tokenizers, trainers

from llmpy.data.encode import encode
from llmpy.data.rank_tables import EOT, KNOWN, Known, Ranks, parse_llmc, write_llmc
from llmpy.data.records import Document
from llmpy.data.tokenizer import Tokenizer, _byte_characters
from llmpy.errors import LlmpyError

BYTES = [bytes([i]) for i in range(256)]


@pytest.fixture(scope="module")
def small():
    words = "the then there other weather wether  a an and und\n\n1 12 123 it's we'll naïve 日本語 !!! \t"
    return Tokenizer.train([words * 50, "".join(map(chr, range(32, 1000)))], 400)


def random_texts(count):
    """Yield strings of every plane, of few letters, and of word separators."""
    source = random.Random(7)
    planes = ((0x20, 0x7F), (0, 0x20), (0x80, 0x800), (0x3000, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000))
    signs = " \n\t'’stlmdrev.,!?0123456789aAéß日🙂\u00a0\u2028\u3000"
    for _ in range(count):
        low, high = source.choice(planes)
        letters = source.choice([signs, "ab ", "".join(chr(source.randrange(low, high)) for _ in range(20)) + signs])
        yield "".join(source.choice(letters) for _ in range(source.randrange(60)))


def by_rank(word, rank):
    """Return the ids of a word by merging the pair of lowest rank first (as tiktoken)."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 1:
        best = min(range(len(parts) - 1), key=lambda j: rank.get(parts[j] + parts[j + 1], 1 << 30))
        if parts[best] + parts[best + 1] not in rank:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return [rank[part] for part in parts]


def check_encoder(tokenizer, texts):
    """Compare the library's encoder with one by rank alone, without merges."""
    rank = {token: i for i, token in enumerate(tokenizer.ranks().tokens) if i != tokenizer.eot}
    byte = {c: i for i, c in enumerate(_byte_characters())}
    ids = functools.cache(lambda word: by_rank(bytes(byte[c] for c in word), rank))
    for text in texts:
        expected = [i for word, _ in tokenizer._library.pre_tokenizer.pre_tokenize_str(text) for i in ids(word)]
        assert tokenizer.encode(text) == expected, text[:100]
        assert tokenizer.decode(expected) == text


def test_a_small_tokenizer_round_trips(small, tmp_path):
    path = tmp_path / "tokenizer.bin"
    write_llmc(path, small.ranks())
    assert path.read_bytes() == llmc_table(*small.ranks().tokens, eot=0)
    again = Tokenizer.load(path)
    assert (again.vocab_size, again.eot) == (small.vocab_size, small.eot) == (400, 0)
    assert again.same_tokens(small)
    assert again.encode(f"a{EOT}b").count(again.eot) == 1
    assert again.ranks() == small.ranks()
    check_encoder(again, random_texts(2000))
    merges = json.loads(small.to_json())["model"]["merges"]
    assert merges == json.loads(again.to_json())["model"]["merges"]


@needs_data
@pytest.mark.parametrize("version", [1, 2])
def test_gpt2_from_llmcs_file(tmp_path, version):
    path = tmp_path / "gpt2_tokenizer.bin"
    gpt2_table(path, version)
    gpt2 = Tokenizer.load(path)
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)
    assert gpt2.encode(f"{EOT}Hello world") == [50256, 15496, 995]
    text = (SHARED / "tinyshakespeare.txt").read_text("utf-8")
    check_encoder(gpt2, [text, *random_texts(10_000)] if version == 2 else [text[:100_000]])


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (llmc_table(*BYTES, b"x")[:1000], ["0 tokens", "257"]),
        (llmc_table(*BYTES, b"x", version=3), ["version 3"]),
        (llmc_table(*BYTES, b"x", version=1), ["version 1", "257 tokens", "EOT 50,256"]),
        (llmc_table(*BYTES, b"x", eot=257), ["EOT 257"]),
        (llmc_table(*BYTES, b"x", count=2**32 - 1), ["257 tokens", "4,294,967,295"]),
        (llmc_table(*BYTES, b"ab")[:-1], ["257 tokens"]),
        (llmc_table(*BYTES, b"x") + b"x", ["258 tokens", "257"]),
        (llmc_table(*BYTES, b"x", b"a", eot=256), ["twice"]),
        (llmc_table(*BYTES, b"x", b"", eot=256), ["258 tokens", "empty"]),
        (llmc_table(*BYTES, b"xx", eot=7), ["a byte is missing"]),
        (llmc_table(*BYTES, b"x", b"abc", eot=256), ["token 257", "b'abc'"]),
    ],
)
def test_corrupt_llmc_table(tmp_path, data, names):
    path = tmp_path / "tok.bin"
    path.write_bytes(data)
    with refused("tokenizer.invalid", path, *names):
        Tokenizer.load(path)


def test_a_token_too_long_for_the_format(tmp_path, small):
    with refused("tokenizer.token-too-long", "256", "255"):
        write_llmc(tmp_path / "x", Ranks((*BYTES, b"a" * 256), 0))
    assert parse_llmc(llmc_table(*small.ranks().tokens, eot=0)) == small.ranks()


LETTERS = "DON'T we'll McDonald 12345 x=3;\r\n\r\n  ǅ ΑΒΓ café\u0301 naïve/ 日本語!!! \t;\n" * 20


def extended(pattern, eot=None):
    """Return ids and tokens: some learned with a pattern, some not a merge of two. None has the id `eot`."""
    library = Tokenizer.bytes()._library
    splitter = pre_tokenizers.Split(Regex(pattern), "isolated") if pattern else pre_tokenizers.ByteLevel(False)
    spelling = [pre_tokenizers.ByteLevel(False, use_regex=False)] if pattern else []
    library.pre_tokenizer = pre_tokenizers.Sequence([splitter, *spelling])
    library.train_from_iterator([LETTERS, "".join(map(chr, range(32, 1000)))], trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    ))  # fmt: skip
    value = {c: bytes([i]) for i, c in enumerate(_byte_characters())}
    spelled = sorted(library.get_vocab(with_added_tokens=False).items(), key=lambda pair: pair[1])
    tokens = [b"".join(value[c] for c in token) for token, _ in spelled]
    tokens += [t for t in (b" stlvst", b"revlmd", "日本日".encode(), b"    \n\n  ", b"ab ab") if t not in tokens]
    return [i + (eot is not None and i >= eot) for i in range(len(tokens))], tokens


@pytest.mark.parametrize(
    ("name", "eot"), [("p50k_base", 400), *((n, None) for n in ("cl100k_base", "o200k_base", "Llama 3"))]
)
def test_known_tables(tmp_path, monkeypatch, name, eot):
    """Compare the library's encoder with one by rank alone (as tiktoken), and with tiktoken if installed."""
    known = next(k for k in KNOWN.values() if k.name == name)
    pattern = known.pattern
    ids, tokens = extended(pattern, eot)
    eot = eot or len(tokens) + 1  # after an unused id, as in cl100k_base
    monkeypatch.setitem(KNOWN, len(tokens), Known("small", eot, pattern))
    path = tmp_path / "x.tiktoken"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(t), i) for i, t in zip(ids, tokens, strict=True)))
    loaded = Tokenizer.load(path)
    assert (loaded.vocab_size, loaded.eot) == (max(eot, *ids) + 1, eot)
    loaded.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.encode(f"a{EOT}b")[1:-1] == [eot]
    rank = dict(zip(tokens, ids, strict=True))
    splitter, byte = loaded._library.pre_tokenizer, {c: i for i, c in enumerate(_byte_characters())}
    other = None
    with contextlib.suppress(ImportError):
        from tiktoken import Encoding
        from tiktoken_ext import openai_public

        monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
        theirs = getattr(openai_public, name, lambda: {"pat_str": pattern, "special_tokens": {EOT: known.eot}})()
        assert theirs["special_tokens"][EOT] == known.eot
        other = Encoding("x", pat_str=theirs["pat_str"], mergeable_ranks=rank, special_tokens={EOT: eot})
    for text in [LETTERS, *random_texts(3000)]:
        expected = []
        for word, _ in splitter.pre_tokenize_str(text):
            word = bytes(byte[c] for c in word)
            expected += [rank[word]] if word in rank else by_rank(word, rank)
        assert again.encode(text) == loaded.encode(text) == expected
        assert loaded.decode(expected) == text
        assert other is None or other.encode_ordinary(text) == expected
    long = LETTERS * 40  # the same in pieces, though a line end may join the sign before it
    assert [int(i) for block in encode(loaded, [Document("x", long)]) for i in block.ids] == [eot, *loaded.encode(long)]
    with pytest.raises(LlmpyError) as error:
        loaded.ranks()
    assert error.value.code in ("tokenizer.not-gpt2-words", "tokenizer.not-bpe", "tokenizer.id-gaps")


def tiktoken_bytes(tokens):
    return b"".join(b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens))


def test_a_tiktoken_file(tmp_path):
    path = tmp_path / "any name"
    path.write_bytes(tiktoken_bytes([*BYTES, b"th", b"the"]))
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.vocab_size, tokenizer.eot) == (259, 258)
    assert tokenizer.encode("the th") == [257, 32, 256]


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (tiktoken_bytes(BYTES[:255]), ["a byte is missing"]),
        (tiktoken_bytes([*BYTES, b"th", b"th"]), ["twice"]),
        (tiktoken_bytes([*BYTES, b"xyz"]), ["token 256", "b'xyz'"]),
        (tiktoken_bytes([*BYTES, b"the", b"th"]), ["token 256", "b'the'"]),
        (tiktoken_bytes([*BYTES, b"th"]).replace(b" 256\n", b" 7\n"), ["line 257"]),
        (tiktoken_bytes([*BYTES, b"th"]).replace(b"dGg= 256\n", b"dGg 256\n"), ["Incorrect padding"]),
        (tiktoken_bytes([*BYTES, b"th"])[:-1], ["line 257"]),
        (b"AAAA 0\n" * 100256, ["line 2"]),
        (b"AAAA 0\n" * 100257, ["100,257 ranks", "GPT-2"]),
    ],
)
def test_corrupt_tiktoken(tmp_path, data, names):
    path = tmp_path / "x.tiktoken"
    path.write_bytes(data)
    with refused("tokenizer.invalid", path, *names):
        Tokenizer.load(path)
