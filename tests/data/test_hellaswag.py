"""llm.c's multiple-choice file: to the byte as it writes it, and no other file read as one."""

import json

import numpy as np
import pytest

from llmpy.data.hellaswag import Example, encode_examples, read_examples, write_examples
from llmpy.data.tokenizer import Tokenizer
from llmpy.errors import LlmpyError


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
def test_lines_that_are_no_examples(tmp_path, row):
    raw = tmp_path / "val.jsonl"
    raw.write_text(json.dumps(row))
    with pytest.raises(LlmpyError, match="line 1 is no example of HellaSwag"):
        list(encode_examples(raw, Tokenizer.bytes()))


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "no examples"),
        ([example(0, 1, 1, 1, 1)], "an empty part"),
        ([example(1, 1, 1, 1, 1, start=65535)], "does not fit 16 bits"),
        ([example(40_000, 1, 1, 1, 1)], "example 0 has an empty part, or does not fit 16 bits"),
    ],
)
def test_what_cannot_be_written(path, examples, message):
    with pytest.raises(LlmpyError, match=message):
        write_examples(path, examples)
    assert not path.exists()


@pytest.mark.parametrize(
    ("at", "width", "value", "message"),
    [
        (1024, 2, 1, "example 0 begins with"),
        (1026, 2, 38, "example 0 claims 38 bytes, its parts make 36"),
        (1028, 2, 1, "example 0 begins with"),
        (1030, 2, 4, "example 0 begins with"),
        (1032, 2, 5, "example 0 begins with"),
        (1034, 2, 0, "a part of example 0 has 0 of 0 tokens"),
        (1034, 2, 60000, "a part of example 0 has"),
        (1036, 2, 60000, "example 0 holds token 60000, the vocabulary has 50,257"),
        (0, 4, 5, "it begins with"),
        (4, 4, 2, "it begins with"),
        (8, 4, 3, "expected 5, got 0"),
        (8, 4, -1, "bytes after the last example"),
        (8, 4, 1, "bytes after the last example"),
    ],
)
def test_damage(path, at, width, value, message):
    write_examples(path, EXAMPLES)
    content = bytearray(path.read_bytes())
    content[at : at + width] = value.to_bytes(width, "little", signed=value < 0)
    path.write_bytes(content)
    with pytest.raises(LlmpyError, match=rf"hellaswag_val\.bin is not a multiple-choice file of llm\.c: .*{message}"):
        read_examples(path, 50257)


@pytest.mark.parametrize("keep", [0, 1, 9, 1023, 1024, 1025, 1060, 1100, 1111])
def test_cut(path, keep):
    write_examples(path, EXAMPLES)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LlmpyError, match="is not a multiple-choice file"):
        read_examples(path, 50257)
    with pytest.raises(LlmpyError, match="cannot read"):
        read_examples(path.with_name("none"), 50257)
