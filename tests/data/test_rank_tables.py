"""A rank table gives back the very tokenizer that it came from, decoding and encoding."""

import base64
import contextlib
import functools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, pre_tokenizers, trainers

from llmpy.data import rank_tables as ranks
from llmpy.data.encode import tokenise
from llmpy.data.rank_tables import EOT, KNOWN, Known, Ranks, parse_llmc, parse_tiktoken, write_llmc
from llmpy.data.records import Document
from llmpy.data.tokenizer import Tokenizer, _byte_characters
from llmpy.errors import LlmpyError

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
needs_data = pytest.mark.skipif(not (DATA / "gpt2.tiktoken").exists(), reason="GPT-2's ranks are not here")


@pytest.fixture(scope="module")
def small():
    words = "the then there other weather wether  a an and und\n\n1 12 123 it's we'll naïve 日本語 !!! \t"
    return Tokenizer.train([words * 50, "".join(map(chr, range(32, 1000)))], 400)


@pytest.fixture(scope="module")
def gpt2():
    return Tokenizer.load(DATA / "gpt2.tiktoken")


def random_texts(count):
    """Strings of every plane, of few letters, and of what splits words."""
    source = random.Random(7)
    planes = ((0x20, 0x7F), (0, 0x20), (0x80, 0x800), (0x3000, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000))
    signs = " \n\t'’stlmdrev.,!?0123456789aAéß日🙂\u00a0\u2028\u3000"
    for _ in range(count):
        low, high = source.choice(planes)
        letters = source.choice([signs, "ab ", "".join(chr(source.randrange(low, high)) for _ in range(20)) + signs])
        yield "".join(source.choice(letters) for _ in range(source.randrange(60)))


def llmc_bytes(ranks, version=2):
    header = np.zeros(256, "<u4")
    header[:4] = 20240328, version, len(ranks.tokens), ranks.eot * (version == 2)
    return header.tobytes() + b"".join(bytes([len(t)]) + t for t in ranks.tokens)


def same(a, b, count):
    for text in random_texts(count):
        ids = a.encode(text)
        assert b.encode(text) == ids, text
        assert b.decode(ids) == text


def test_a_small_tokenizer_comes_back(small, tmp_path):
    path = tmp_path / "tokenizer.bin"
    write_llmc(path, small.ranks())
    assert path.read_bytes() == llmc_bytes(small.ranks())
    again = Tokenizer.load(path)
    assert (again.vocab_size, again.eot) == (small.vocab_size, small.eot) == (400, 0)
    same(small, again, 2000)
    assert again.encode(f"a{EOT}b").count(again.eot) == 1
    assert again.ranks() == small.ranks()


def test_merges_are_those_that_were_learnt(small):
    learnt = json.loads(small._library.to_str())["model"]["merges"]
    letters = small.ranks().tokens
    spelled = [tuple(letters[small._library.token_to_id(part)] for part in pair) for pair in learnt]
    assert small.ranks().merges() == spelled


@needs_data
@pytest.mark.parametrize("version", [1, 2])
def test_gpt2_from_llmcs_file(gpt2, tmp_path, version):
    """The library's encoder against one by rank alone, which knows no merges (the rule of tiktoken)."""
    path = tmp_path / "gpt2_tokenizer.bin"
    path.write_bytes(llmc_bytes(gpt2.ranks(), version))
    rebuilt = Tokenizer.load(path)
    assert (rebuilt.vocab_size, rebuilt.eot) == (50257, 50256)
    text = (DATA / "tinyshakespeare.txt").read_text("utf-8")
    rank = {token: i for i, token in enumerate(rebuilt.ranks().tokens[:-1])}
    splitter = rebuilt._library.pre_tokenizer
    byte = {c: i for i, c in enumerate(_byte_characters())}
    ids = functools.cache(lambda word: by_rank(bytes(byte[c] for c in word), rank))

    for t in [text, *random_texts(10_000)] if version == 2 else [text[:100_000]]:
        expected = [i for word, _ in splitter.pre_tokenize_str(t) for i in ids(word)]
        got = rebuilt.encode(t)
        assert got == expected, t[:100]
        assert rebuilt.decode(got) == t


@needs_data
def test_gpt2_known_ids(gpt2):
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode(f"{EOT}Hello") == [50256, 15496]
    assert gpt2.ranks().merges()[:3] == [(b" ", b"t"), (b" ", b"a"), (b"h", b"e")]


# tables with other words


LETTERS = "DON'T we'll McDonald 12345 x=3;\r\n\r\n  ǅ ΑΒΓ café\u0301 naïve/ 日本語!!! \t;\n" * 20


def extended(pattern, eot=None):
    """Ids and tokens: learnt with a pattern, and further ones that are no merge of two. None has the id `eot`."""
    library = Tokenizer.bytes()._library
    splitter = pre_tokenizers.Split(Regex(pattern), "isolated") if pattern else pre_tokenizers.ByteLevel(False)
    spelling = [pre_tokenizers.ByteLevel(False, use_regex=False)] if pattern else []
    library.pre_tokenizer = pre_tokenizers.Sequence([splitter, *spelling])
    library.train_from_iterator([LETTERS, "".join(map(chr, range(32, 1000)))], trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    ))  # fmt: skip
    value = {c: bytes([i]) for i, c in enumerate(_byte_characters())}
    spelled = sorted(library.get_vocab(with_added_tokens=False).items(), key=lambda pair: pair[1])
    learnt = [b"".join(value[c] for c in token) for token, _ in spelled]
    learnt += [t for t in (b" stlvst", b"revlmd", "日本日".encode(), b"    \n\n  ", b"ab ab") if t not in learnt]
    return [i + (eot is not None and i >= eot) for i in range(len(learnt))], learnt


@pytest.mark.parametrize(
    ("name", "eot"), [("p50k_base", 400), *((n, None) for n in ("cl100k_base", "o200k_base", "Llama 3"))]
)
def test_a_known_table_is_read_by_its_own_rules(tmp_path, monkeypatch, name, eot):
    """The library's encoder against one by rank alone (the rule of tiktoken), and against tiktoken where it is."""
    known = next(k for k in KNOWN.values() if k.name == name)
    pattern = known.pattern
    ids, tokens = extended(pattern, eot)
    eot = eot or len(tokens) + 1  # after an id that no token has, as in cl100k_base
    monkeypatch.setitem(ranks.KNOWN, len(tokens), Known("small", eot, pattern))
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
    long = LETTERS * 40  # in pieces as whole, though a line's end may belong to the sign before
    assert tokenise(loaded, [Document("x", long)]).ids.tolist() == [eot, *loaded.encode(long)]
    with pytest.raises(LlmpyError, match="token|splits words unlike GPT-2, which llm.c's table cannot tell"):
        loaded.ranks()


def by_rank(word, rank):
    """Ids of a word's bytes when the pair of lowest rank is merged first."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 1:
        best = min(range(len(parts) - 1), key=lambda j: rank.get(parts[j] + parts[j + 1], 1 << 30))
        if parts[best] + parts[best + 1] not in rank:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return [rank[part] for part in parts]


# damage


def tiktoken_bytes(tokens):
    return b"".join(b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens))


BYTES = [bytes([i]) for i in range(256)]


def test_a_tiktoken_file(tmp_path):
    path = tmp_path / "any name"
    path.write_bytes(tiktoken_bytes([*BYTES, b"th", b"the"]))
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.vocab_size, tokenizer.eot) == (259, 258)
    assert tokenizer.encode("the th") == [257, 32, 256]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiktoken_bytes(BYTES[:255]), "255 ranks, where 256 must be"),
        (tiktoken_bytes([*BYTES[:255], b"th"]), "1 of the 256 bytes are no tokens"),
        (tiktoken_bytes([*BYTES, b"th", b"th"]), "1 tokens stand in it twice"),
        (tiktoken_bytes([*BYTES, b"xyz"]), "token 256 .* is not made of two tokens before it"),
        (tiktoken_bytes([*BYTES, b"the", b"th"]), "token 256 .* is not made of two"),
        (tiktoken_bytes([*BYTES, b"a" * 300]), "a token of 300 bytes"),
        (tiktoken_bytes([*BYTES, b"th"]).replace(b" 256\n", b" 7\n"), "line 257 has rank 7, not 256"),
        (tiktoken_bytes([*BYTES, b"th"]).replace(b"dGg= 256\n", b"dGg 256\n"), "line 257 is not base64 and a rank"),
        (tiktoken_bytes([*BYTES, b"th"])[:-1], "line 257 is not base64 and a rank"),
        (b"AAAA 0\n" * 100256, "line 2 has rank 0, not 1"),
        (
            b"AAAA 0\n" * 100257,
            "100,257 ranks are none of the tables whose words are known: GPT-2 .* — give its tokeniz",
        ),
    ],
)
def test_damaged_tiktoken(tmp_path, data, message):
    path = tmp_path / "x.tiktoken"
    path.write_bytes(data)
    with pytest.raises(LlmpyError, match=rf"x\.tiktoken is not a usable tokenizer: {message}|{message}"):
        Tokenizer.load(path)


def small_llmc(*tokens, eot=256, version=2, count=None):
    all_tokens = [*BYTES, EOT.encode(), *tokens]
    content = bytearray(llmc_bytes(Ranks(tuple(all_tokens), eot), version))
    if count is not None:
        content[8:12] = count.to_bytes(4, "little")
    return bytes(content)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (small_llmc()[:1000], "cut off in its header: 1,000 bytes"),
        (small_llmc(version=3), "version 3 of llm.c's tokenizer"),
        (small_llmc(version=1), "version 1 has 50,257 tokens, not 257"),
        (small_llmc(eot=257), "257 tokens with EOT 257"),
        (small_llmc(count=2**32 - 1), "4,294,967,295 tokens with EOT 256"),
        (small_llmc(count=260), "cut off or empty at token 257 of 260"),
        (small_llmc()[:-1], "cut off or empty at token 256 of 257"),
        (small_llmc() + b"x", "1 bytes after the last token"),
        (small_llmc(b"a"), "1 tokens stand in it twice"),
        (small_llmc(b"abc"), "token 257 .* is not made of two"),
        (small_llmc(eot=7), "1 of the 256 bytes are no tokens"),
    ],
)
def test_damaged_llmc(tmp_path, data, message):
    path = tmp_path / "tok.bin"
    path.write_bytes(data)
    with pytest.raises(LlmpyError, match=rf"tok\.bin is not a usable tokenizer: {message}"):
        Tokenizer.load(path)


def test_what_llmcs_file_cannot_hold(tmp_path, small):
    with pytest.raises(LlmpyError, match="token 256 has 256 bytes: llm.c's tokenizer file holds 1 to 255"):
        write_llmc(tmp_path / "x", Ranks((*BYTES, b"a" * 256), 0))
    assert parse_llmc(llmc_bytes(small.ranks())) == small.ranks()
    assert parse_tiktoken(tiktoken_bytes([*BYTES, b"th"])).eot == 257
