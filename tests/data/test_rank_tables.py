"""llm.c's tokenizer file gives back the very tokenizer that it came from, decoding and encoding."""

import functools
import json
import random

import pytest
from support.samples import SHARED, gpt2_table, llmc_table, needs_data

from llmpy.data.rank_tables import EOT, Ranks, parse_llmc, write_llmc
from llmpy.data.tokenizer import Tokenizer, _byte_characters
from llmpy.errors import LlmpyError

BYTES = [bytes([i]) for i in range(256)]


@pytest.fixture(scope="module")
def small():
    words = "the then there other weather wether  a an and und\n\n1 12 123 it's we'll naïve 日本語 !!! \t"
    return Tokenizer.train([words * 50, "".join(map(chr, range(32, 1000)))], 400)


def random_texts(count):
    """Strings of every plane, of few letters, and of what splits words."""
    source = random.Random(7)
    planes = ((0x20, 0x7F), (0, 0x20), (0x80, 0x800), (0x3000, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000))
    signs = " \n\t'’stlmdrev.,!?0123456789aAéß日🙂\u00a0\u2028\u3000"
    for _ in range(count):
        low, high = source.choice(planes)
        letters = source.choice([signs, "ab ", "".join(chr(source.randrange(low, high)) for _ in range(20)) + signs])
        yield "".join(source.choice(letters) for _ in range(source.randrange(60)))


def by_rank(word, rank):
    """Ids of a word's bytes when the pair of lowest rank is merged first (the rule of tiktoken)."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 1:
        best = min(range(len(parts) - 1), key=lambda j: rank.get(parts[j] + parts[j + 1], 1 << 30))
        if parts[best] + parts[best + 1] not in rank:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return [rank[part] for part in parts]


def check_encoder(tokenizer, texts):
    """The library's encoder against one by rank alone, which knows no merges."""
    rank = {token: i for i, token in enumerate(tokenizer.ranks().tokens) if i != tokenizer.eot}
    byte = {c: i for i, c in enumerate(_byte_characters())}
    ids = functools.cache(lambda word: by_rank(bytes(byte[c] for c in word), rank))
    for text in texts:
        expected = [i for word, _ in tokenizer._library.pre_tokenizer.pre_tokenize_str(text) for i in ids(word)]
        assert tokenizer.encode(text) == expected, text[:100]
        assert tokenizer.decode(expected) == text


def test_a_small_tokenizer_comes_back(small, tmp_path):
    path = tmp_path / "tokenizer.bin"
    write_llmc(path, small.ranks())
    assert path.read_bytes() == llmc_table(*small.ranks().tokens, eot=0)
    again = Tokenizer.load(path)
    assert (again.vocab_size, again.eot) == (small.vocab_size, small.eot) == (400, 0)
    assert again.same_tokens(small)
    assert again.encode(f"a{EOT}b").count(again.eot) == 1
    assert again.ranks() == small.ranks()
    check_encoder(again, random_texts(2000))
    learnt = json.loads(small.to_json())["model"]["merges"]
    assert learnt == json.loads(again.to_json())["model"]["merges"]


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
    ("data", "message"),
    [
        (llmc_table(*BYTES, b"x")[:1000], "257 should be"),
        (llmc_table(*BYTES, b"x", version=3), "version 3"),
        (llmc_table(*BYTES, b"x", version=1), "version 1, 257 tokens where 257 should be, EOT 50,256"),
        (llmc_table(*BYTES, b"x", eot=257), "EOT 257"),
        (llmc_table(*BYTES, b"x", count=2**32 - 1), "257 tokens where 4,294,967,295 should be"),
        (llmc_table(*BYTES, b"ab")[:-1], "257 tokens where 257 should be"),
        (llmc_table(*BYTES, b"x") + b"x", "258 tokens where 257"),
        (llmc_table(*BYTES, b"x", b"a", eot=256), "one stands in it twice"),
        (llmc_table(*BYTES, b"x", b"", eot=256), "one stands in it twice"),
        (llmc_table(*BYTES, b"xx", eot=7), "not every byte is a token"),
        (llmc_table(*BYTES, b"x", b"abc", eot=256), "token 257 .* is not made of two"),
    ],
)
def test_damage(tmp_path, data, message):
    path = tmp_path / "tok.bin"
    path.write_bytes(data)
    with pytest.raises(LlmpyError, match=rf"tok\.bin is not a usable tokenizer: .*{message}"):
        Tokenizer.load(path)


def test_a_token_that_the_file_cannot_hold(tmp_path, small):
    with pytest.raises(LlmpyError, match="a token has 256 bytes: llm.c's tokenizer file holds at most 255"):
        write_llmc(tmp_path / "x", Ranks((*BYTES, b"a" * 256), 0))
    assert parse_llmc(llmc_table(*small.ranks().tokens, eot=0)) == small.ranks()
