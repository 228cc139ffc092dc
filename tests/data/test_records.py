"""Records → documents with counted characters; errors name file and record; memory stays bounded."""

import gzip
import json
import sys
import tracemalloc

import pytest
from support.refused import refused

from llmpy.data.records import Document, NotText, kind_of, read_records
from llmpy.errors import LlmpyError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Two"}, {"type": "image"}, {"type": "text", "text": "?"}]},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Bye"},
]


def write(tmp_path, *lines, name="a.jsonl"):
    path = tmp_path / name
    content = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def counted(document):
    return [document.text[a:b] for a, b in document.counted]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_the_three_kinds(tmp_path, name):
    path = write(
        tmp_path, {"text": "é\n"}, "", {"prompt": "2+2=", "completion": "4", "id": 1}, {"messages": CHAT}, name=name
    )
    plain, pair, chat = read_records(path, kind_of(path, path.read_bytes()[:16]))
    assert plain == Document(f"{path}:1", "é\n")
    assert (pair.text, counted(pair)) == ("2+2=4", ["4"])
    assert chat.text == "system: Be brief.\n\nuser: Two?\n\nassistant: 2\n\nuser: Thanks\n\nassistant: Bye\n\n"
    assert counted(chat) == ["2\n\n", "Bye\n\n"]


def test_a_byte_order_mark_and_empty_texts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": " "}\n\n{"text": "b"}')
    assert [d.text for d in read_records(path, "jsonl")] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "code", "names"),
    [
        ("{", "record.not-json", ["line 2", "Expecting property name"]),
        ('"text"', "record.unknown-fields", ["record 2", "str"]),
        ({"a": 1, "b": 2}, "record.unknown-fields", ["record 2", "a, b", "text, prompt"]),
        ({"text": 5}, "record.invalid", ["record 2", "int"]),
        ('{"text": "\\ud800"}', "record.invalid", ["record 2", "surrogates not allowed"]),
        ({"prompt": "a", "completion": None}, "record.invalid", ["record 2", "NoneType"]),
        ({"messages": "hi"}, "record.invalid", ["record 2", "messages"]),
        ({"messages": ["hi"]}, "record.invalid", ["record 2", "messages"]),
        ({"messages": [{"role": "user"}]}, "record.invalid", ["record 2", "'content'"]),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "record.invalid", ["record 2", "'text'"]),
        ("[" * 100_000, "record.not-json", ["line 2"]),
        ("\ud800", "record.not-json", ["line 2"]),
    ],
)
def test_invalid_records(tmp_path, line, code, names):
    text = line if isinstance(line, str) else json.dumps(line)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + text.encode("utf-8", "surrogatepass"))
    documents = read_records(path, "jsonl")
    assert next(documents).text == "fine"
    with refused(code, path, *names) as error:
        next(documents)
    assert not isinstance(error.value, NotText)


def test_unknown_fields_of_the_first_record(tmp_path):
    with pytest.raises(NotText, match="loss, step"):
        list(read_records(write(tmp_path, {"step": 1, "loss": 2}), "jsonl"))


def test_compressed_records_need_little_memory(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress((b'{"text": "' + b"word " * 2000 + b'"}\n') * 5000))  # 50 MB
    tracemalloc.start()
    assert sum(1 for _ in read_records(path, "jsonl.gz")) == 5000
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


def test_corrupt_gzip(tmp_path):
    path = write(tmp_path, *[{"text": f"line {i * i}"} for i in range(1000)], name="a.jsonl.gz")
    whole = path.read_bytes()
    assert len(list(read_records(path, "jsonl.gz"))) == 1000
    for corrupt in (whole[:2000], whole[:2000] + b"\0\0\0" + whole[2003:]):
        path.write_bytes(corrupt)
        with pytest.raises(LlmpyError, match=r"a\.jsonl\.gz") as error:
            list(read_records(path, "jsonl.gz"))
        assert error.value.code in ("file.corrupt", "record.not-json")


def test_kinds_by_content_and_name(tmp_path):
    for name, start, expected in [
        ("a.jsonl", b"{", "jsonl"),
        ("a.NDJSON", b"{", "jsonl"),
        ("a.jsonl.gz", b"\x1f\x8b\x08", "jsonl.gz"),
        ("a.txt.gz", b"\x1f\x8b\x08", None),
        ("any", b"PAR1", "parquet"),
        ("a.parquet", b"x", None),
        ("a.txt", b"{", None),
    ]:
        assert kind_of(tmp_path / name, start) == expected


def test_a_part_of_a_document():
    document = Document("x", "abcdefgh", ((1, 3), (5, 8)))
    assert document.part(2, 6) == Document("x", "cdef", ((0, 1), (3, 4)))
    assert document.part(3, 5) == Document("x", "de", ())
    assert Document("x", "abc").part(1, 2) == Document("x", "b")


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"id": [1, 2, 3], "text": ["a", "", "é"]}), path)
    assert [d.text for d in read_records(path, "parquet")] == ["a", "é"]
    parquet.write_table(arrow.table({"prompt": ["p"], "completion": ["c"]}), path)
    assert [counted(d) for d in read_records(path, "parquet")] == [["c"]]
    parquet.write_table(arrow.table({"messages": [CHAT[2:]]}), path)
    assert [counted(d) for d in read_records(path, "parquet")] == [["2\n\n", "Bye\n\n"]]
    parquet.write_table(arrow.table({"step": [1]}), path)
    with pytest.raises(NotText, match="step"):
        list(read_records(path, "parquet"))
    parquet.write_table(arrow.table({"text": [1]}), path)
    with refused("record.invalid", path, "record 1", "int"):
        list(read_records(path, "parquet"))
    path.write_bytes(path.read_bytes()[:-5])
    with refused("file.corrupt", path):
        list(read_records(path, "parquet"))


def test_parquet_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with refused("package.missing", "pyarrow", "pip install 'llmpy[parquet]'"):
        list(read_records(tmp_path / "a.parquet", "parquet"))
