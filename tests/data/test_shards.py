"""A shard is read as it was written; anything else says what it is."""

import numpy as np
import pytest

from llmpy.data import shards
from llmpy.data.shards import FORMS, is_shard, open_shard, write_shard
from llmpy.errors import LlmpyError

V = 50257


@pytest.fixture
def path(tmp_path):
    return tmp_path / "train.bin"


def header(magic=20240520, version=1, count=0):
    words = np.zeros(256, "<i4")
    words[:3] = magic, version, count
    return words.tobytes()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, ">u2"])
def test_round_trip(path, dtype):
    tokens = np.arange(0, V, 7).astype(dtype)
    write_shard(path, tokens)
    shard = open_shard(path, V)
    assert shard.path == path
    assert len(shard) == tokens.size
    assert shard.tokens.dtype == np.uint16
    assert isinstance(shard.tokens, np.memmap)
    assert np.array_equal(shard.tokens, tokens)
    with pytest.raises(ValueError, match="read-only"):
        shard.tokens[0] = 1


def test_layout_is_llmcs(path):
    write_shard(path, np.array([1, 2, 50256]))
    content = path.read_bytes()
    assert content == header(count=3) + bytes([1, 0, 2, 0, 0x50, 0xC4])
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([1, -1]), r"tokens from -1 to 1 do not fit 16 bits — use a vocabulary"),
        (np.array([65536]), r"tokens from 65536 to 65536 do not fit"),
        (np.array([], np.uint16), r"0 values of type uint16 do not make a shard — write 1"),
        (np.array([1.5]), r"type float64 do not make a shard"),
    ],
)
def test_what_cannot_be_written(path, tokens, message):
    with pytest.raises(LlmpyError, match=message):
        write_shard(path, tokens)
    assert not path.exists()


def test_more_tokens_than_the_header_can_say(path, monkeypatch):
    monkeypatch.setattr(shards, "TOKENS_AT_MOST", 9)
    with pytest.raises(LlmpyError, match="10 values of type int64 do not make a shard"):
        write_shard(path, np.arange(10))


def test_a_new_file_leaves_open_shards_alone(path):
    write_shard(path, np.array([1, 2, 3]))
    shard = open_shard(path, V)
    write_shard(path, np.array([4, 5, 6]))
    assert shard.tokens.tolist() == [1, 2, 3]
    assert open_shard(path, V).tokens.tolist() == [4, 5, 6]


@pytest.mark.parametrize("position", [0, 5, 9, 10, 25])
def test_token_outside_the_vocabulary(path, monkeypatch, position):
    monkeypatch.setattr(shards, "CHUNK", 10)  # first, inner, last of a chunk, the next, the last chunk
    tokens = np.full(26, 99)
    tokens[position:] = 100  # more bad ones follow: the first is named
    write_shard(path, tokens)
    assert len(open_shard(path, 101)) == 26
    with pytest.raises(LlmpyError) as error:
        open_shard(path, 100)
    assert f"token 100 at position {position} is outside the vocabulary of 100 tokens" in str(error.value)
    assert "--vocab-size" in str(error.value)


def test_missing_and_folder(tmp_path):
    for wrong in (tmp_path / "no.bin", tmp_path):
        with pytest.raises(LlmpyError, match=r"cannot read .* — check the path"):
            open_shard(wrong, V)
    with pytest.raises(LlmpyError, match=r"cannot read .*no\.bin"):
        is_shard(tmp_path / "no.bin")


def test_the_wide_form(path):
    tokens = np.array([128000, 7, 128255])
    write_shard(path, tokens, "uint32")
    assert path.read_bytes() == header(20240801, 7, 3) + tokens.astype("<u4").tobytes()
    assert open_shard(path, 128256).tokens.tolist() == tokens.tolist()
    with pytest.raises(LlmpyError, match="token 128000 at position 0 is outside the vocabulary of 500 tokens"):
        open_shard(path, 500)
    with pytest.raises(LlmpyError, match=r"do not fit 32 bits"):
        write_shard(path, np.array([2**32]), "uint32")


@pytest.mark.parametrize(("form", "start"), [("uint32", header(20240801, 7, 3)), ("int32", b"")])
def test_the_other_forms(path, form, start):
    tokens = np.array([128000, 7, 128255]) if form == "uint32" else np.array([50256, 7, 50256])
    write_shard(path, tokens, form)
    assert path.read_bytes() == start + tokens.astype("<i4").tobytes()
    assert is_shard(path)
    shard = open_shard(path, 128256)
    assert shard.tokens.dtype == FORMS[form].dtype
    assert shard.tokens.tolist() == tokens.tolist()
    with pytest.raises(LlmpyError, match="outside the vocabulary of 500 tokens"):
        open_shard(path, 500)
    with pytest.raises(LlmpyError, match=r"do not fit 32 bits"):
        write_shard(path, np.array([2**32]), form)


def test_a_late_negative_token_of_a_stream(path):
    path.write_bytes(np.array([50256] * 300 + [-1], "<i4").tobytes())
    with pytest.raises(LlmpyError, match="token -1 at position 300 is outside"):
        open_shard(path, V)


def test_mask(path):
    counted = np.array([1, 0, 0, 1, 1], bool)
    write_shard(path, np.arange(5), counted=counted)
    assert path.with_suffix(".mask").read_bytes() == header(20261122, 1, 5) + bytes([1, 0, 0, 1, 1])
    shard = open_shard(path, V)
    assert shard.counted.tolist() == [1, 0, 0, 1, 1]
    assert shard.part(2, 5).counted.tolist() == [0, 1, 1]
    write_shard(path, np.arange(6))  # and then the old mask does not stay
    assert open_shard(path, V).counted is None
    with pytest.raises(LlmpyError, match="can have no mask"):
        write_shard(path, np.arange(5), "int32", counted)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (header(20261122, 1, 4) + bytes(4), r"is for 4 tokens, .*train\.bin has 5 — write both"),
        (header(20261122, 1, 5) + bytes([1, 2, 0, 0, 0]), "other bytes than 0 and 1"),
        (header(20240520, 1, 5) + bytes(10), r"train\.mask is no token mask of version 1: it begins with 20240520, 1"),
        (header(20261122, 1, 5) + bytes(4), "is damaged: 5 tokens make 1,029 bytes, it has 1,028"),
        (b"", r"train\.mask is no token mask"),
    ],
)
def test_damaged_masks(path, mask, message):
    write_shard(path, np.arange(5))
    path.with_suffix(".mask").write_bytes(mask)
    with pytest.raises(LlmpyError, match=message):
        open_shard(path, V)


WRONG = {
    "empty": (b"", "is not a token shard of llm.c: it starts with b''"),
    "text": (b"To be, or not to be, that is the question.\n" * 50, "it starts with b'To be, or not to be, tha'"),
    "uint16": (np.arange(1, 20000, 3, dtype="<u2").tobytes(), "write uint16 tokens without a header (nanoGPT) again"),
    "llama cut": (header(20240801, 7, 2) + bytes(7), "2 tokens make 1,032 bytes, it has 1,031"),
    "llama of another version": (header(20240801, 1, 2) + bytes(8), "it begins with 20240801, 1"),
    "a mask": (header(20261122, 1, 2) + bytes(2), "it is the mask of a token shard"),
    "checkpoint": (header(20240326, 3), "it is an llm.c model checkpoint"),
    "version": (
        header(version=2, count=1) + b"\0\0",
        "is no llm.c token shard of version 1: it begins with 20240520, 2",
    ),
    "zero tokens": (header(), "is damaged: 0 tokens"),
    "cut header": (header(count=1)[:500], "1 tokens make 1,026 bytes, it has 500"),
    "long": (header(count=10) + bytes(21), "10 tokens make 1,044 bytes, it has 1,045"),
    "negative": (header(count=-5) + bytes(20), "is damaged: -5 tokens"),
    "lying": (header(count=2**31 - 1) + bytes(20), "2,147,483,647 tokens make"),
    "three bytes": (b"\xff\xfe\xfd", "it starts with b'\\xff\\xfe\\xfd'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_say_what_they_are(path, name):
    content, message = WRONG[name]
    path.write_bytes(content)
    with pytest.raises(LlmpyError) as error:
        open_shard(path, V)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert " — " in str(error.value)  # every refusal names a fix


def test_is_shard_goes_by_the_magic(tmp_path):
    for name, content, expected in [
        ("a.txt", header(), True),
        ("b", header(20240801), True),
        ("c.bin", header(20240326), False),
        ("d.bin", b"", False),
    ]:
        (tmp_path / name).write_bytes(content)
        assert is_shard(tmp_path / name) is expected


def test_several_rows_are_no_shard(path):
    with pytest.raises(LlmpyError, match="do not make a shard"):
        write_shard(path, np.arange(6).reshape(2, 3))
