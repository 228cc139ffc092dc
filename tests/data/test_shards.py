"""Shards round-trip; other files are identified."""

import numpy as np
import pytest
from support.refused import refused

from llmpy.data import shards
from llmpy.data.shards import FORMS, is_shard, open_shard, write_shard
from llmpy.system.stored import Stored

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
    assert isinstance(shard.tokens, Stored)
    assert np.array_equal(shard.tokens[:], tokens)
    with pytest.raises(TypeError):
        shard.tokens[0] = 1


def test_layout_is_llmcs(path):
    write_shard(path, np.array([1, 2, 50256]))
    content = path.read_bytes()
    assert content == header(count=3) + bytes([1, 0, 2, 0, 0x50, 0xC4])
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("tokens", "code", "names"),
    [
        (np.array([1, -1]), "shard.vocab-too-large", ["-1 to 1", "uint16"]),
        (np.array([65536]), "shard.vocab-too-large", ["65536 to 65536"]),
        (np.array([], np.uint16), "shard.invalid-tokens", ["0 values", "uint16"]),
        (np.array([1.5]), "shard.invalid-tokens", ["float64"]),
        (np.arange(6).reshape(2, 3), "shard.invalid-tokens", ["6 values"]),
    ],
)
def test_invalid_tokens(path, tokens, code, names):
    with refused(code, path, *names):
        write_shard(path, tokens)
    assert not path.exists()


def test_too_many_tokens_for_the_header(path, monkeypatch):
    monkeypatch.setattr(shards, "TOKENS_AT_MOST", 9)
    with refused("shard.invalid-tokens", "10 values"):
        write_shard(path, np.arange(10))


def test_a_new_file_does_not_change_open_shards(path):
    write_shard(path, np.array([1, 2, 3]))
    shard = open_shard(path, V)
    write_shard(path, np.array([4, 5, 6]))
    assert shard.tokens[:].tolist() == [1, 2, 3]
    assert open_shard(path, V).tokens[:].tolist() == [4, 5, 6]


@pytest.mark.parametrize("position", [0, 5, 9, 10, 25])
def test_token_outside_the_vocabulary(path, monkeypatch, position):
    monkeypatch.setattr(shards, "CHUNK", 10)  # first, middle and last of a chunk, next chunk, last chunk
    tokens = np.full(26, 99)
    tokens[position:] = 100  # the error names the first of several
    write_shard(path, tokens)
    assert len(open_shard(path, 101)) == 26
    with refused("shard.outside-vocabulary", path, f"token 100 at position {position} ", "100 tokens", "--vocab-size"):
        open_shard(path, 100)


def test_missing_and_folder(tmp_path):
    for wrong, code in ((tmp_path / "no.bin", "file.missing"), (tmp_path, "file.unreadable")):
        with refused(code, wrong):
            open_shard(wrong, V)
    with refused("file.missing", tmp_path / "no.bin"):
        is_shard(tmp_path / "no.bin")


def test_the_wide_form(path):
    tokens = np.array([128000, 7, 128255])
    write_shard(path, tokens, "uint32")
    assert path.read_bytes() == header(20240801, 7, 3) + tokens.astype("<u4").tobytes()
    assert open_shard(path, 128256).tokens[:].tolist() == tokens.tolist()
    with refused("shard.outside-vocabulary", path, "token 128000 at position 0 ", "500 tokens"):
        open_shard(path, 500)
    with refused("shard.vocab-too-large", path, "uint32"):
        write_shard(path, np.array([2**32]), "uint32")


@pytest.mark.parametrize(("form", "start"), [("uint32", header(20240801, 7, 3)), ("int32", b"")])
def test_the_other_forms(path, form, start):
    tokens = np.array([128000, 7, 128255]) if form == "uint32" else np.array([50256, 7, 50256])
    write_shard(path, tokens, form)
    assert path.read_bytes() == start + tokens.astype("<i4").tobytes()
    assert is_shard(path)
    shard = open_shard(path, 128256)
    assert shard.tokens.dtype == FORMS[form].dtype
    assert shard.tokens[:].tolist() == tokens.tolist()
    with refused("shard.outside-vocabulary", path, "500 tokens"):
        open_shard(path, 500)
    with refused("shard.vocab-too-large", path, form):
        write_shard(path, np.array([2**32]), form)


def test_a_late_negative_token_of_a_stream(path):
    path.write_bytes(np.array([50256] * 300 + [-1], "<i4").tobytes())
    with refused("shard.outside-vocabulary", path, "token -1 at position 300 "):
        open_shard(path, V)


def test_mask(path):
    counted = np.array([1, 0, 0, 1, 1], bool)
    write_shard(path, np.arange(5), counted=counted)
    assert path.with_suffix(".mask").read_bytes() == header(20261122, 1, 5) + bytes([1, 0, 0, 1, 1])
    shard = open_shard(path, V)
    assert shard.mask[:].tolist() == [1, 0, 0, 1, 1]
    assert shard.part(2, 5).mask[:].tolist() == [0, 1, 1]
    write_shard(path, np.arange(6))  # removes the old mask
    assert open_shard(path, V).mask is None
    with refused("shard.mask-unsupported", path):
        write_shard(path, np.arange(5), "int32", counted)


@pytest.mark.parametrize(
    ("mask", "code", "names"),
    [
        (header(20261122, 1, 4) + bytes(4), "shard.mask-mismatch", ["4 tokens", "train.bin has 5"]),
        (header(20261122, 1, 5) + bytes([1, 2, 0, 0, 0]), "shard.corrupt", ["0 and 1"]),
        (header(20261122, 2, 5) + bytes([1, 2, 3, 4, 0]), "shard.corrupt", ["0 to 3"]),
        (header(20261122, 3, 5) + bytes(5), "shard.unrecognized", ["20261122, 3"]),
        (header(20240520, 1, 5) + bytes(10), "shard.unrecognized", ["20240520, 1"]),
        (header(20261122, 1, 5) + bytes(4), "shard.corrupt", ["5 tokens", "1,029", "1,028"]),
        (b"", "shard.unrecognized", []),
    ],
)
def test_corrupt_masks(path, mask, code, names):
    write_shard(path, np.arange(5))
    path.with_suffix(".mask").write_bytes(mask)
    with refused(code, path.with_suffix(".mask"), *names):
        open_shard(path, V)


WRONG = {
    "empty": (b"", "unrecognized", ["b''"]),
    "text": (b"To be, or not to be, that is the question.\n" * 50, "unrecognized", ["b'To be, or not to be, tha'"]),
    "uint16": (np.arange(1, 20000, 3, dtype="<u2").tobytes(), "unrecognized", ["write_shard"]),
    "llama cut": (header(20240801, 7, 2) + bytes(7), "corrupt", ["2 tokens", "1,032", "1,031"]),
    "llama of another version": (header(20240801, 1, 2) + bytes(8), "unrecognized", ["20240801, 1"]),
    "a mask": (header(20261122, 1, 2) + bytes(2), "unrecognized", ["mask of a token shard"]),
    "checkpoint": (header(20240326, 3), "unrecognized", ["llm.c model checkpoint"]),
    "version": (header(version=2, count=1) + b"\0\0", "unrecognized", ["20240520, 2"]),
    "zero tokens": (header(), "corrupt", ["0 tokens"]),
    "cut header": (header(count=1)[:500], "corrupt", ["1 tokens", "1,026", "500"]),
    "long": (header(count=10) + bytes(21), "corrupt", ["10 tokens", "1,044", "1,045"]),
    "negative": (header(count=-5) + bytes(20), "corrupt", ["-5 tokens"]),
    "lying": (header(count=2**31 - 1) + bytes(20), "corrupt", ["2,147,483,647 tokens"]),
    "three bytes": (b"\xff\xfe\xfd", "unrecognized", ["b'\\xff\\xfe\\xfd'"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_files(path, name):
    content, code, names = WRONG[name]
    path.write_bytes(content)
    with refused(f"shard.{code}", path, *names) as error:
        open_shard(path, V)
    assert error.value.hint


def test_is_shard_goes_by_the_magic(tmp_path):
    for name, content, expected in [
        ("a.txt", header(), True),
        ("b", header(20240801), True),
        ("c.bin", header(20240326), False),
        ("d.bin", b"", False),
    ]:
        (tmp_path / name).write_bytes(content)
        assert is_shard(tmp_path / name) is expected
