"""Records → documents with counted characters; errors name file, record and field; memory stays bounded."""

import gzip
import json
import re
import sys
import tracemalloc
from pathlib import Path

import pytest
from support.refused import refused

from llmpy.data.encode import encode
from llmpy.data.records import Document, NotText, Tally, kind_of, read_records
from llmpy.data.tokenizer import EOT, Tokenizer
from llmpy.errors import LlmpyError

PARTS = [{"type": "text", "text": "Two"}, {"type": "text", "text": "?"}]
U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
CHAT = [{"role": "system", "content": "Be brief."}, U | {"content": PARTS}, A, U, A | {"content": "Bye"}]
QA = "user: q\n\nassistant: a\n\n"
CALL = [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]
ALPACA = {"instruction": "q", "input": "", "output": "a"}


def write(tmp_path, *lines, name="a.jsonl"):
    path = tmp_path / name
    content = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def read(path, tally=None):
    return list(read_records(path, kind_of(path, path.read_bytes()[:16]), tally))


def counted(document):
    spans = [(0, len(document.text))] if document.counted is None else document.counted
    return [document.text[a:b] for a, b in spans]


def told(path):
    tally = Tally()
    documents = read(path, tally)
    return [d.text for d in documents], list(tally.lines())


LAYOUTS = [  # record, text, what counts
    ({"text": "é\n"}, "é\n", ["é\n"]),
    ({"prompt": "2+2=", "completion": "4", "id": 1}, "2+2=4", ["4"]),
    ({"prompt": "q", "completion": ""}, "q", [""]),
    ({"messages": CHAT},
     "system: Be brief.\n\nuser: Two?\n\nassistant: a\n\nuser: q\n\nassistant: Bye\n\n", ["a\n\n", "Bye\n\n"]),
    ({"messages": [{**U, "tool_calls": [], "name": None, "images": [None]}, A], "tools": []}, QA, ["a\n\n"]),
    ({"messages": [U | {"role": "User"}, A | {"role": "model"}]}, QA, ["a\n\n"]),
    # TRL's conversational pairs: only the completion counts
    ({"prompt": [U, A, U], "completion": [A]}, QA + QA, ["a\n\n"]),
    ({"prompt": [U], "completion": [A, U, A]}, QA + QA, ["a\n\n", "a\n\n"]),
    ({"prompt": [HUMAN], "completion": [GPT]}, QA, ["a\n\n"]),
    ({"prompt": "", "completion": [A]}, "assistant: a\n\n", ["a\n\n"]),
    # ShareGPT
    ({"conversations": [HUMAN, GPT], "system": "s", "id": "x"}, "system: s\n\n" + QA, ["a\n\n"]),
    ({"conversations": [HUMAN, {"from": "chatgpt", "value": "a"}]}, QA, ["a\n\n"]),
    ({"conversations": [U, A], "system": None}, QA, ["a\n\n"]),
    ({"messages": [{**U, "from": None, "value": ""}, {"role": None, "content": "", **GPT}]}, QA, ["a\n\n"]),
    # Alpaca, as LLaMA-Factory reads it
    (ALPACA, QA, ["a\n\n"]),
    (ALPACA | {"input": "i"}, "user: q\ni\n\nassistant: a\n\n", ["a\n\n"]),
    ({"instruction": "", "input": "q", "output": "a"}, QA, ["a\n\n"]),
    ({"instruction": "q", "output": ""}, "user: q\n\nassistant: \n\n", ["\n\n"]),
    (ALPACA | {"system": "s", "history": [["h", "b"]]},
     "system: s\n\nuser: h\n\nassistant: b\n\n" + QA, ["b\n\n", "a\n\n"]),
    # weights of messages
    ({"messages": [U, A | {"weight": 0}, U, A | {"weight": 1}]}, QA + QA, ["a\n\n"]),
    ({"messages": [U | {"weight": 1.0}, A | {"weight": 0.0}]}, QA, []),
    ({"messages": [U | {"weight": None}, A | {"weight": None}]}, QA, ["a\n\n"]),
    ({"conversations": [HUMAN | {"weight": 0}, GPT | {"weight": 0}]}, QA, []),
    ({"messages": [U | {"train": True}, A | {"train": False}]}, QA, ["q\n\n"]),
    ({"messages": [U | {"training": False}, A | {"training": True, "weight": 1}]}, QA, ["a\n\n"]),
    ({"messages": [U, A | {"loss": False}]}, QA, []),
    # the fields that hold something are used
    ({"text": "", "prompt": "q", "completion": "a"}, "qa", ["a"]),
    ({"text": None, "messages": [U, A]}, QA, ["a\n\n"]),
    ({"text": "t", "messages": [], "prompt": None, "completion": ""}, "t", ["t"]),
    ({"text": " ", "prompt": "", "completion": None, **ALPACA, "conversations": None}, QA, ["a\n\n"]),
    ({"prompt": "q", "prompt_id": "7", "messages": [U, A]}, QA, ["a\n\n"]),  # the prompt is one of the messages
    ({"text": "t", "label": 1, "images": ["x.png"], "input": "x"}, "t", ["t"]),
]  # fmt: skip


@pytest.mark.parametrize(("record", "text", "answers"), LAYOUTS)
def test_layouts(tmp_path, record, text, answers):
    (document,) = read(write(tmp_path, "", record))
    assert document == Document(f"{tmp_path / 'a.jsonl'}:2", text, document.counted, literal=True)
    assert counted(document) == answers
    assert (document.counted is None) is (record.get("text") == text)


def test_a_byte_order_mark_and_empty_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a", "url": "u"}\r\n{"text": " "}\n\nnull\n{}\n{"text": "b"}')
    assert told(path) == (["a", "b"], ["a.jsonl: 2 records, text (ignored: url)", "a.jsonl: 3 empty records left out"])


REFUSED = [  # record, code, what the message names
    ("{", "record.not-json", ["column 2"]),
    ("[" * 100_000, "record.not-json", ["nested too deeply"]),
    ("\ud800", "record.not-json", ["not JSON"]),
    ("1" * 5000, "record.not-json", ["too long"]),
    ('"text"', "record.unknown-fields", ["not an object"]),
    ({"a": 1, "b": 2}, "record.unknown-fields", ["a, b", "text, prompt"]),
    ({"instruction_": "x", "output": "y"}, "record.unknown-fields", ["instruction_, output"]),
    ({"text": 5}, "record.invalid", ["text is a number, not text"]),
    ({"text": ["a"]}, "record.invalid", ["text is a list"]),
    ({"text": True}, "record.invalid", ["text is true or false"]),
    ('{"text": "\\ud800"}', "record.invalid", [r"text has '\ud800'"]),
    ({"prompt": "a", "completion": None}, "record.invalid", ["only prompt"]),
    ({"prompt": "a"}, "record.invalid", ["only prompt"]),
    ({"completion": "a", "text": ""}, "record.invalid", ["only completion"]),
    ({"instruction": "a", "input": "b", "output": None}, "record.invalid", ["only instruction"]),
    ({"prompt": "a", "completion": [A]}, "record.invalid", ["prompt is text, completion a list"]),
    ({"prompt": {"a": "b"}, "completion": "c"}, "record.invalid", ["prompt is an object"]),
    ({"messages": "hi"}, "record.invalid", ["messages is text, not a list"]),
    ({"messages": ["hi"]}, "record.invalid", ["message 1 is text"]),
    ({"messages": [U, {"role": "assistant"}]}, "record.invalid", ["message 2 has no content"]),
    ({"messages": [U, {"content": "a"}]}, "record.invalid", ["message 2 has no role"]),
    ({"messages": [U | {"content": 5}]}, "record.invalid", ["message 1: content is a number"]),
    ({"messages": [U | {"content": ["a", "b"]}]}, "record.invalid", ["message 1: content is a list"]),
    ({"messages": [U | {"content": [{"type": "text"}]}]}, "record.invalid", ["text of content is empty"]),
    ({"conversations": [{"from": 1, "value": "x"}]}, "record.unsupported", ["the role 1"]),
    (ALPACA | {"history": [["a"]]}, "record.invalid", ["history"]),
    (ALPACA | {"output": 4}, "record.invalid", ["content is a number"]),
    (ALPACA | {"input": ["a"]}, "record.invalid", ["input is a list"]),
    # two kinds of content
    ({"text": "t", "prompt": "q", "completion": "a"}, "record.ambiguous", ["text and completion"]),
    ({"text": "t", "messages": [U, A]}, "record.ambiguous", ["text and messages"]),
    ({"messages": [U, A], "conversations": [HUMAN, GPT]}, "record.ambiguous", ["messages and conversations"]),
    ({"text": "q a", **ALPACA}, "record.ambiguous", ["text and output"]),
    ({"text": "t", "prompt": "q"}, "record.ambiguous", ["prompt is not part of text"]),
    ({"prompt": "q", "completion": "a", "system": "s"}, "record.ambiguous", ["system is not part"]),
    ({"messages": [{"role": "system", "content": "a"}, U, A], "system": "b"}, "record.ambiguous", ["two system"]),
    ({"messages": [U | HUMAN]}, "record.ambiguous", ["message 1 has both role and from"]),
    ({"messages": [U, A | {"train": True, "weight": 0}]}, "record.ambiguous", ["weight and train"]),
    # fields with a meaning that cannot be used
    ({"messages": [U, A | {"content": "", "tool_calls": CALL}]}, "record.unsupported", ["message 2 has tool_calls"]),
    ({"messages": [U, A | {"loss_weight": 0}]}, "record.unsupported", ["message 2 has loss_weight"]),
    ({"messages": [U, A | {"train_on_turn": False}]}, "record.unsupported", ["message 2 has train_on_turn"]),
    ({"messages": [U, A | {"reasoning": "hm"}]}, "record.unsupported", ["message 2 has reasoning"]),
    ({"messages": [U, A], "train": False}, "record.unsupported", ["train"]),
    ({"prompt": "Translate: ", "input": "Tag", "completion": "Day"}, "record.ambiguous", ["input"]),
    ({"messages": [U, A | {"content": None, "function_call": {"name": "f"}}]}, "record.unsupported", ["function_call"]),
    ({"messages": [U, {"role": "tool", "content": "4"}]}, "record.unsupported", ["message 2 has the role 'tool'"]),
    ({"conversations": [HUMAN, {"from": "observation", "value": "4"}]}, "record.unsupported", ["'observation'"]),
    ({"messages": [U | {"name": "Bob"}, A]}, "record.unsupported", ["message 1 has name"]),
    ({"messages": [U, A | {"reasoning_content": "hm"}]}, "record.unsupported", ["reasoning_content"]),
    ({"messages": [U, A | {"train_detail": [{"begin_offset": 0}]}]}, "record.unsupported", ["train_detail"]),
    ({"messages": [U, A | {"weight": 0.5}]}, "record.unsupported", ["message 2 has weight 0.5"]),
    ({"messages": [U, A | {"train": "no"}]}, "record.unsupported", ["message 2 has train 'no'"]),
    ({"messages": [U | {"content": [*PARTS, {"type": "image_url"}]}]}, "record.unsupported", ["'image_url'"]),
    ({"messages": [U, A], "tools": CALL}, "record.unsupported", ["has tools"]),
    ({"messages": [U, A], "functions": "[{}]"}, "record.unsupported", ["has functions"]),
    ({"conversations": [HUMAN, GPT], "images": ["a.png"]}, "record.unsupported", ["has images"]),
    (ALPACA | {"audios": ["a.wav"]}, "record.unsupported", ["has audios"]),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "record.unsupported", ["has chosen"]),
    ({"prompt": "q", "completion": "a", "label": False}, "record.unsupported", ["has label"]),
    ({"prompt": "q", "completions": ["a"], "labels": [True]}, "record.unsupported", ["has completions"]),
    ({"messages": [U, A], "kto_tag": True}, "record.unsupported", ["has kto_tag"]),
    ({"messages": [U, A], "weight": 0}, "record.unsupported", ["weight 0"]),
    ({"text": "t", "weight": 0.5}, "record.unsupported", ["weight 0.5"]),
]


@pytest.mark.parametrize(("line", "code", "names"), REFUSED)
def test_refused_records(tmp_path, line, code, names):
    text = line if isinstance(line, str) else json.dumps(line)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + text.encode("utf-8", "surrogatepass"))
    documents = read_records(path, "jsonl")
    assert next(documents).text == "fine"
    with refused(code, path, "line 3", *names) as error:
        next(documents)
    assert not isinstance(error.value, NotText)
    assert not re.search(r"\b(None|NoneType|dict|int|float|str|bool|recursion|sys)\b", str(error.value))


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


ROWS = [ALPACA, {"text": "t"}, ALPACA | {"input": "i " * 50_000}, {"messages": [U, A]}]


@pytest.mark.parametrize("name", ["a.json", "b.JSON", "a.json.gz"])
@pytest.mark.parametrize(
    "spell",
    [
        json.dumps,
        lambda rows: "\ufeff\n " + json.dumps(rows, indent=2) + "\n",
        lambda rows: "\n".join(map(json.dumps, rows)),  # JSON lines
        lambda rows: "\r\n".join(json.dumps(row, indent=1) for row in rows),
        lambda rows: json.dumps([{}, None, *rows]),
    ],
)
def test_json_files(tmp_path, name, spell, monkeypatch):
    monkeypatch.setattr("llmpy.data.records.CHARACTERS", 50)
    path = write(tmp_path, spell(ROWS), name=name)
    texts, log = told(path)
    assert texts == [QA, "t", f"user: q\n{'i ' * 50_000}\n\nassistant: a\n\n", QA]
    assert log[-3:] == [
        f"{name}: 2 records, instruction/input/output → user/assistant messages",
        f"{name}: 1 record, text",
        f"{name}: 1 record, messages",
    ]


def test_a_json_file_of_one_record_and_of_utf_16(tmp_path):
    assert told(write(tmp_path, json.dumps({"text": "t"}, indent=2), name="a.json"))[0] == ["t"]
    (tmp_path / "b.json").write_text(json.dumps([ALPACA], ensure_ascii=False), "utf-16")
    assert told(tmp_path / "b.json")[0] == [QA]
    assert told(write(tmp_path, "", name="c.json")) == ([], [])


@pytest.mark.parametrize(
    ("text", "code", "names"),
    [
        ('{\n "compilerOptions": {\n "strict": true}}', "record.unknown-fields", ["record 1", "compilerOptions"]),
        ('{"data": [{"text": "t"}]}', "record.unknown-fields", ["data"]),
        ("[1, 2]", "record.unknown-fields", ["record 1", "not an object"]),
        ("[" * 100_000, "record.not-json", ["record 1", "nested"]),
        ("{ // no comments\n}", "record.not-json", ["record 1"]),
        ('[{"text": "fine"}, {"text": }]', "record.not-json", ["record 2"]),
        ('[{"text": "fine"}, {"text": "cut', "record.not-json", ["record 2"]),
        ('[{"text": "fine"}', "record.not-json", ["record 2"]),
        ('[{"text": "fine"}] [{"text": "more"}]', "record.not-json", ["column 18"]),
        ('[{"text": "fine"}, {"text": 1}]', "record.invalid", ["record 2", "number"]),
    ],
)
def test_json_files_that_cannot_be_read(tmp_path, text, code, names):
    with refused(code, tmp_path / "a.json", *names) as error:
        read(write(tmp_path, text, name="a.json"))
    assert isinstance(error.value, NotText) is ("fine" not in text)


def test_an_error_is_found_before_the_whole_file_is_read(tmp_path):
    path = write(tmp_path, '[{"text": "fine"}, oops ' + " " * 20_000_000, name="a.json")
    tracemalloc.start()
    with refused("record.not-json", path, "record 2"):
        list(read_records(path, "json"))
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("text", [EOT, f"a{EOT}b", "<|begin_of_text|>"])
def test_special_tokens_in_records_are_text(tmp_path, text):
    tokenizer = Tokenizer.train(["some text, some more"], 300)
    documents = read(write(tmp_path, {"text": text}, {"messages": [U | {"content": text}, A]}, {"text": "some"}))
    ids = [int(i) for block in encode(tokenizer, documents) for i in block.ids]
    assert ids.count(tokenizer.eot) == 3 and tokenizer.decode(ids).count(text) == 2 + 3 * (text == EOT)
    ids = [int(i) for block in encode(tokenizer, [Document("plain", EOT), *documents]) for i in block.ids]
    assert ids[:2] == [tokenizer.eot] * 2 and ids.count(tokenizer.eot) == 5


def test_kinds_by_content_and_name(tmp_path):
    for name, start, expected in [
        ("a.jsonl", b"{", "jsonl"),
        ("a.NDJSON", b"{", "jsonl"),
        ("a.jsonl.gz", b"\x1f\x8b\x08", "jsonl.gz"),
        ("a.json.gz", b"\x1f\x8b\x08", "json.gz"),
        ("a.json", b"[", "json"),
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
    assert Document("x", "abc", literal=True).part(1, 2) == Document("x", "b", literal=True)


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"id": [1, 2, 3], "text": ["a", "", "é"]}), path)
    assert [d.text for d in read_records(path, "parquet")] == ["a", "é"]
    parquet.write_table(arrow.table({"prompt": ["p"], "completion": ["c"]}), path)
    assert [counted(d) for d in read_records(path, "parquet")] == [["c"]]
    parquet.write_table(arrow.table({"messages": [CHAT[2:]]}), path)
    assert [counted(d) for d in read_records(path, "parquet")] == [["a\n\n", "Bye\n\n"]]
    rows = [
        {"messages": [U, A | {"weight": 0}], "id": 1}, {"text": "t"}, {"prompt": "q", "completion": "a"}, ALPACA,
        {"messages": [U | {"tool_calls": None}, A]}, {"id": 2},
    ]  # fmt: skip
    parquet.write_table(arrow.Table.from_pylist(rows, arrow.table({
        "text": arrow.array([], arrow.string()), "messages": arrow.array([], arrow.list_(arrow.struct({
            "role": arrow.string(), "content": arrow.string(), "weight": arrow.int8(),
            "tool_calls": arrow.list_(arrow.struct({"id": arrow.string()}))}))),
        **{name: arrow.array([], arrow.string()) for name in ("prompt", "completion", *ALPACA)},
        "id": arrow.array([], arrow.int8())}).schema), path)  # fmt: skip
    tally = Tally()
    assert [counted(d) for d in read(path, tally)] == [[], ["t"], ["a"], ["a\n\n"], ["a\n\n"]]
    assert "a.parquet: 2 records, messages (ignored: id)" in tally.lines()
    parquet.write_table(arrow.table({"conversations": [[HUMAN, GPT]], "images": [["a.png"]]}), path)
    with refused("record.unsupported", path, "record 1", "images"):
        read(path)
    parquet.write_table(arrow.table({"step": [1]}), path)
    with pytest.raises(NotText, match="step"):
        list(read_records(path, "parquet"))
    parquet.write_table(arrow.table({"text": [1]}), path)
    with refused("record.invalid", path, "record 1", "number"):
        list(read_records(path, "parquet"))
    path.write_bytes(path.read_bytes()[:-5])
    with refused("file.corrupt", path):
        list(read_records(path, "parquet"))


def test_parquet_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with refused("package.missing", "pyarrow", "pip install 'llmpy[parquet]'"):
        list(read_records(tmp_path / "a.parquet", "parquet"))


def test_a_field_that_only_sounds_like_a_flag_is_ignored(tmp_path: Path) -> None:
    messages = [U, A | {"constraints": "short"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    tally = Tally()
    (document,) = read_records(tmp_path / "a.jsonl", "jsonl", tally)
    assert document.counted
    assert "(ignored: constraints)" in next(tally.lines())
