"""llm.c's multiple-choice file: identical bytes, and no other file accepted."""

import json

import numpy as np
import pytest
from support.refused import refused

from llmpy.data.hellaswag import Example, encode_examples, read_examples, write_examples
from llmpy.data.tokenizer import Tokenizer


def example(*lengths, label=1, start=0):
    parts = [np.arange(start, start + n) for n in lengths]
    return Example(parts[0], tuple(parts[1:]), label)


EXAMPLES = [example(3, 1, 2, 1, 1), example(1, 2, 2, 2, 9, label=3, start=50000)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "hellaswag_val.bin"


def words(path):
    return np.frombuffer(path.read_bytes()[1024:], "<u2").tolist()


def test_layout(path):
    write_examples(path, EXAMPLES)
    content = path.read_bytes()
    assert np.frombuffer(content[:1024], "<i4")[:5].tolist() == [20240522, 1, 2, 2 * 26, 0]
    first = [65535, 36, 0, 1, 4, 3, 0, 1, 2, 1, 0, 2, 0, 1, 1, 0, 1, 0]
    assert words(path)[:18] == first
    assert words(path)[18:25] == [65535, 52, 1, 3, 4, 1, 50000]
    read = read_examples(path, 50257)
    assert len(read) == 2
    for got, expected in zip(read, EXAMPLES, strict=True):
        assert got.label == expected.label
        assert list(map(list, (got.context, *got.endings))) == list(map(list, (expected.context, *expected.endings)))


def test_from_jsonl(tmp_path, path):
    raw = tmp_path / "val.jsonl"
    row = {"ctx": "A cat", "endings": ["sat", "ran", "is", "é"], "label": 2, "ind": 5}
    raw.write_text("\n".join([json.dumps(row)] * 3), "utf-8")
    plain = Tokenizer.bytes()
    examples = list(encode_examples(raw, plain))
    write_examples(path, examples)
    read = read_examples(path, 257)
    assert len(read) == 3
    assert plain.decode(read[2].context) == "A cat"
    assert [plain.decode(e) for e in read[2].endings] == [" sat", " ran", " is", " é"]
    assert read[2].label == 2


@pytest.mark.parametrize(
    "row", [5, {}, {"ctx": "a", "endings": ["b"] * 3, "label": 0}, {"ctx": "a", "endings": ["b"] * 4, "label": 4},
            {"ctx": 1, "endings": ["b"] * 4, "label": 1}]
)  # fmt: skip
def test_invalid_lines(tmp_path, row):
    raw = tmp_path / "val.jsonl"
    raw.write_text(json.dumps(row))
    with refused("hellaswag.invalid-line", raw, "line 1"):
        list(encode_examples(raw, Tokenizer.bytes()))


@pytest.mark.parametrize(
    ("examples", "code"),
    [
        ([], "hellaswag.empty"),
        ([example(0, 1, 1, 1, 1)], "hellaswag.unencodable"),
        ([example(1, 1, 1, 1, 1, start=65535)], "hellaswag.unencodable"),
        ([example(40_000, 1, 1, 1, 1)], "hellaswag.unencodable"),
    ],
)
def test_unencodable_examples(path, examples, code):
    with refused(code, path, "example"):
        write_examples(path, examples)
    assert not path.exists()


@pytest.mark.parametrize(
    ("at", "width", "value", "names"),
    [
        (1024, 2, 1, ["example 0", "[1, 36, 0, 1, 4]"]),
        (1026, 2, 38, ["example 0", "38", "36"]),
        (1028, 2, 1, ["example 0", "[65535, 36, 1, 1, 4]"]),
        (1030, 2, 4, ["example 0", "[65535, 36, 0, 4, 4]"]),
        (1032, 2, 5, ["example 0", "[65535, 36, 0, 1, 5]"]),
        (1034, 2, 0, ["example 0", "0 of 0"]),
        (1034, 2, 60000, ["example 0", "of 60,000"]),
        (1036, 2, 60000, ["example 0", "token 60000", "50,257"]),
        (0, 4, 5, ["[5, 1]"]),
        (4, 4, 2, ["[20240522, 2]"]),
        (8, 4, 3, ["expected 5, got 0"]),
        (8, 4, -1, ["88 bytes"]),
        (8, 4, 1, ["52 bytes"]),
    ],
)
def test_corruption(path, at, width, value, names):
    write_examples(path, EXAMPLES)
    content = bytearray(path.read_bytes())
    content[at : at + width] = value.to_bytes(width, "little", signed=value < 0)
    path.write_bytes(content)
    with refused("hellaswag.corrupt", path, *names):
        read_examples(path, 50257)


@pytest.mark.parametrize("keep", [0, 1, 9, 1023, 1024, 1025, 1060, 1100, 1111])
def test_cut(path, keep):
    write_examples(path, EXAMPLES)
    path.write_bytes(path.read_bytes()[:keep])
    with refused("hellaswag.corrupt", path):
        read_examples(path, 50257)
    with refused("file.missing", path.with_name("none")):
        read_examples(path.with_name("none"), 50257)
