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
    for i, expected in enumerate(EXAMPLES):
        assert read[i].label == expected.label
        assert read[i].context.tolist() == expected.context.tolist()
        assert [e.tolist() for e in read[i].endings] == [e.tolist() for e in expected.endings]


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
            {"ctx": "a", "endings": ["b"] * 4, "label": True}, {"ctx": 1, "endings": ["b"] * 4, "label": 1}]
)  # fmt: skip
def test_lines_that_are_no_examples(tmp_path, row):
    raw = tmp_path / "val.jsonl"
    raw.write_text(json.dumps(row))
    with pytest.raises(LlmpyError, match="line 1 is no example of HellaSwag"):
        list(encode_examples(raw, Tokenizer.bytes()))


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "0 examples"),
        ([example(1, 1, 1, 1)], "example 0 has no label, or an empty part"),
        ([example(0, 1, 1, 1, 1)], "an empty part"),
        ([example(1, 1, 1, 1, 1, label=4)], "has no label"),
        ([example(1, 1, 1, 1, 1, start=65535)], "does not fit 16 bits"),
        ([example(40_000, 1, 1, 1, 1)], r"example 0 \(80,028 bytes, .* does not fit 16 bits"),
    ],
)
def test_what_cannot_be_written(path, examples, message):
    with pytest.raises(LlmpyError, match=message):
        write_examples(path, examples)
    assert not path.exists()


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        (0, 1, "example 0 begins with"),
        (1, 38, "the parts of example 0 do not fill it|do not fit"),
        (1, 35, "claims 35 bytes"),
        (1, 60000, "claims 60,000 bytes"),
        (2, 1, "example 0 begins with"),
        (3, 4, "example 0 begins with"),
        (4, 5, "example 0 begins with"),
        (5, 0, "the parts of example 0 do not fit it"),
        (5, 60000, "the parts of example 0 do not fit it"),
        (6, 60000, "holds token 60000, the vocabulary has 50,257"),
        (20, 7, "example 1 begins with"),
    ],
)
def test_damaged_streams(path, word, value, message):
    write_examples(path, EXAMPLES)
    content = bytearray(path.read_bytes())
    content[1024 + 2 * word : 1026 + 2 * word] = value.to_bytes(2, "little")
    path.write_bytes(content)
    with pytest.raises(LlmpyError, match=rf"hellaswag_val\.bin is not a multiple-choice file of llm\.c: .*({message})"):
        read_examples(path, 50257)


@pytest.mark.parametrize(
    ("slot", "value", "message"),
    [(0, 5, "begins with 5, 1"), (1, 2, "begins with"), (2, 3, "example 2 is cut off|do not fit"),
     (2, -1, "-1 examples"),
     (2, 1, "bytes after the last example"), (2, 65535, "65,535 examples do not fit"), (3, 40, "claims 52 bytes")],
)  # fmt: skip
def test_damaged_headers(path, slot, value, message):
    write_examples(path, EXAMPLES)
    content = bytearray(path.read_bytes())
    content[4 * slot : 4 * slot + 4] = value.to_bytes(4, "little", signed=True)
    path.write_bytes(content)
    with pytest.raises(LlmpyError, match=message):
        read_examples(path, 50257)


@pytest.mark.parametrize("keep", [0, 1, 1023, 1024, 1025, 1060, 1100, 1111])
def test_cut(path, keep):
    write_examples(path, EXAMPLES)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LlmpyError, match="is not a multiple-choice file"):
        read_examples(path, 50257)
    with pytest.raises(LlmpyError, match="cannot read"):
        read_examples(path.with_name("none"), 50257)
