"""Templates render as in transformers, answers count to their end-of-turn token, and messages stay text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.chats import CALLING, CONVERSATIONS, SPELLED, TEMPLATES, TOOL, Json, talk, write
from support.refused import refused

from llmpy.data.chat_template import ChatTemplate
from llmpy.data.encode import encode
from llmpy.data.record_fields import read_fields
from llmpy.data.records import Document, Tally, read_records
from llmpy.data.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("default")
NAMES = [*TEMPLATES]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tokenizer]]:
    """Return template → folder, tokenizer."""
    made = {}
    for name, (make, source, _) in TEMPLATES.items():
        write(folder := tmp_path_factory.mktemp(name), make, source)
        made[name] = folder, Tokenizer.load(folder)
    return made


def read(tokenizer: Tokenizer, record: Json) -> list[Document]:
    reading = read_fields("record 1", record, tokenizer.template)
    assert reading
    return [Document("x", *part, rendered=True) for part in reading.parts]


def encoded(tokenizer: Tokenizer, document: Document) -> tuple[list[int], list[bool]]:
    blocks = list(encode(tokenizer, [document]))
    ids = np.concatenate([block.ids for block in blocks]).tolist()
    marks = [np.ones(len(b.ids), bool) if b.counted is None else b.counted for b in blocks]
    return ids, np.concatenate(marks).tolist()


def counted(document: Document) -> list[str]:
    return [document.text[a:b] for a, b in document.counted or ()]


@pytest.mark.parametrize("name", NAMES)
def test_what_counts(name: str, models: dict[str, tuple[Path, Tokenizer]]) -> None:
    """Every answer with its end, in one text or in one for each; the tokens that count are theirs."""
    tokenizer, end = models[name][1], TEMPLATES[name][2]
    for case, messages in CONVERSATIONS.items():
        if (name, case) == ("thinking", "two in a row"):  # the first one thinks until the second one is there
            with refused("template.inconsistent", "message 3"):
                read(tokenizer, {"messages": messages})
            continue
        documents = read(tokenizer, {"messages": messages})
        answers = [m["content"].strip() for m in messages if m["role"] == "assistant"]
        found = [text for document in documents for text in counted(document)]
        assert len(found) == len(answers), case
        for text, answer in zip(found, answers, strict=True):
            assert text.count(end) == 1 and text.endswith(end), case
            assert text.removesuffix(end).strip().endswith(answer.split("</think>")[-1].strip()), case
        if len(documents) > 1:
            assert name == "thinking" and len(documents) == len(answers), case
        for document in documents:
            ids, marks = encoded(tokenizer, document)
            assert ids == tokenizer.encode(document.text), case
            said = [tokenizer.continuation([ids[i] for i in run]) for run in runs(marks)]
            assert len(said) == len(document.counted or ()), case
            for text, shown in zip(counted(document), said, strict=True):
                assert shown.strip() == text.strip() or "e\u0301" in text, case  # NFC


def runs(marks: list[bool]) -> list[list[int]]:
    """Return the positions of each stretch that counts."""
    found: list[list[int]] = []
    for i, mark in enumerate(marks):
        if mark:
            if i == 0 or not marks[i - 1]:
                found.append([])
            found[-1].append(i)
    return found


def test_texts_and_spans(models: dict[str, tuple[Path, Tokenizer]]) -> None:
    messages = talk("a", "b", "c", "d", system="s")
    expected = {
        "chatml": ["b<|im_end|>", "d<|im_end|>"],
        "headers": ["b<|eot_id|>", "d<|eot_id|>"],
        "calls": ["b<|im_end|>", "d<|im_end|>"],
        "ended": ["b</s>", "d</s>"],
        "marked": ["b<|im_end|>", "d<|im_end|>"],
    }
    for name, answers in expected.items():
        (document,) = read(models[name][1], {"messages": messages})
        assert counted(document) == answers
    first, second = read(models["thinking"][1], {"messages": messages})
    system = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    thought = "<think>\n\n</think>\n\n"
    assert first.text == f"{system}{thought}b<|im_end|>\n" and counted(first) == [f"{thought}b<|im_end|>"]
    more = "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    assert second.text == f"{system}b<|im_end|>\n{more}{thought}d<|im_end|>\n"
    assert counted(second) == [f"{thought}d<|im_end|>"]


@pytest.mark.parametrize("name", NAMES)
def test_spellings_stay_text(name: str, models: dict[str, tuple[Path, Tokenizer]]) -> None:
    """The special tokens are those of the same conversation without the spellings, in training and in chats."""
    tokenizer, end = models[name][1], TEMPLATES[name][2]
    special = {i for i, t in tokenizer._library.get_added_tokens_decoder().items() if t.special}
    for messages in SPELLED.values():
        harmless = [m | {"content": m["content"].replace("<", "(").replace("|", "!")} for m in messages]
        pairs = [read(tokenizer, {"messages": these}) for these in (messages, harmless)]
        for document, like in zip(*pairs, strict=True):
            ids, marks = encoded(tokenizer, document)
            theirs, _ = encoded(tokenizer, like)
            assert [i for i in ids if i in special] == [i for i in theirs if i in special]
            shown, text = tokenizer.decode(ids), document.text
            assert shown == text or name == "ended" and shown.replace(" ", "") == text.replace(" ", "")
            assert [t.count(end) > 0 for t in counted(document)] == [True] * len(runs(marks))
        assert tokenizer.template
        prompt = Document("x", *tokenizer.template.prompt("x", messages[:-1]), rendered=True)
        assert sum(i in special for i in encoded(tokenizer, prompt)[0]) < sum(i in special for i in ids)


def test_spellings_that_cannot_be_kept_apart(tmp_path: Path) -> None:
    """Metaspace puts a blank in front of the first text only, so texts cannot be encoded one by one."""
    write(tmp_path, "metaspace first", TEMPLATES["ended"][1])
    tokenizer = Tokenizer.load(tmp_path)
    read(tokenizer, {"messages": talk("Hi", "Hello!")})
    with refused("record.unsupported", "record 1", "</s>"):
        read(tokenizer, {"messages": SPELLED["in a question"]})


@pytest.mark.parametrize("name", NAMES)
def test_as_transformers(name: str, models: dict[str, tuple[Path, Tokenizer]]) -> None:
    """Texts, ids and masks of apply_chat_template, tools included."""
    transformers = pytest.importorskip("transformers")
    folder, tokenizer = models[name]
    if TEMPLATES[name][0] == "smollm":  # transformers 5 ignores its words
        about = json.loads((folder / "tokenizer_config.json").read_text()) | {
            "tokenizer_class": "PreTrainedTokenizerFast"
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    template = tokenizer.template
    assert template and theirs.chat_template == template.source
    assert theirs.eos_token_id in tokenizer.stops
    cases = [(messages, None) for messages in CONVERSATIONS.values()]
    for messages, tools in [*cases, *[(CALLING, [TOOL])] * template.uses("tools")]:
        if tools is None:
            out = theirs.apply_chat_template(messages, add_generation_prompt=True)
            asked = Document("x", *template.prompt("x", messages), rendered=True)
            assert encoded(tokenizer, asked)[0] == out["input_ids"]
        if messages[-1]["role"] == "assistant" and messages != CONVERSATIONS["two in a row"]:
            record = {"messages": messages} | ({"tools": tools} if tools else {})
            *_, document = read(tokenizer, record)
            assert document.text == theirs.apply_chat_template(messages, tools=tools, tokenize=False)
            ids, marks = encoded(tokenizer, document)
            out = theirs.apply_chat_template(
                messages, tools=tools, return_dict=True, return_assistant_tokens_mask=name == "marked"
            )
            assert ids == out["input_ids"]
            assert name != "marked" or [int(mark) for mark in marks] == out["assistant_masks"]


def test_flags_of_messages(models: dict[str, tuple[Path, Tokenizer]]) -> None:
    messages = talk("a", "b", "c", "d")
    messages[1]["weight"] = 0
    for name in NAMES:
        (document,) = read(models[name][1], {"messages": messages})
        assert [text.strip().removesuffix(TEMPLATES[name][2])[-1:] for text in counted(document)] == ["d"]
    messages[0]["train"], messages[3]["train"] = True, False
    for name in ("chatml", "headers", "calls"):
        (document,) = read(models[name][1], {"messages": messages})
        assert counted(document) == ["a" + TEMPLATES[name][2]]
    with refused("record.unsupported", "generation"):
        read(models["marked"][1], {"messages": messages})


def test_tools(models: dict[str, tuple[Path, Tokenizer]]) -> None:
    """They reach the template, arguments as objects, if it has them."""
    record = {"messages": json.loads(json.dumps(CALLING)), "tools": json.dumps([TOOL])}
    call = record["messages"][1]["tool_calls"][0]["function"]
    call["arguments"] = json.dumps(call["arguments"])
    record["messages"][1] |= {"content": None, "tool_call_id": None}
    (document,) = read(models["calls"][1], record)
    assert '<tools>\n{"type": "function", "function": {"name": "add", "description": "a < b"' in document.text
    said = '\n<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": "é"}}\n</tool_call><|im_end|>'
    assert document.text.count(f"assistant{said}") == 1 and "<tool_response>\n4\n" in document.text
    assert counted(document) == [said.removeprefix("\n"), "4.<|im_end|>"]
    (document,) = read(models["headers"][1], record)
    assert '{"name": "add", "parameters": {"a": 2, "b": "é"}}<|eot_id|>' in counted(document)
    for name in ("chatml", "ended", "marked", "thinking"):
        with refused("record.unsupported", "tools"):
            read(models[name][1], record)
        with refused("record.unsupported"):
            read(models[name][1], {"messages": CALLING})
    for tools in ("{", "3", [1]):
        with refused("record.invalid", "tools"):
            read(models["calls"][1], {"messages": talk("a", "b"), "tools": tools})
    with refused("record.unsupported", "tools"):
        read(models["calls"][1], {"prompt": "a", "completion": "b", "tools": [TOOL]})
    call["arguments"] = "{"
    with refused("record.invalid", "arguments"):
        read(models["calls"][1], record)


def test_reasoning(models: dict[str, tuple[Path, Tokenizer]]) -> None:
    messages = talk("a", "b")
    messages[1]["reasoning_content"] = "r"
    (document,) = read(models["thinking"][1], {"messages": messages})
    assert counted(document) == ["<think>\nr\n</think>\n\nb<|im_end|>"]
    with refused("record.unsupported", "reasoning_content"):
        read(models["calls"][1], {"messages": messages})


def test_other_layouts(models: dict[str, tuple[Path, Tokenizer]], tmp_path: Path) -> None:
    """All layouts of messages use the template; texts do not. The log says so."""
    tokenizer = models["calls"][1]
    messages = talk("q", "a", system="s")
    (expected,) = read(tokenizer, {"messages": messages})
    for record in (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        {"instruction": "q", "input": "", "output": "a", "system": "s"},
        {"prompt": messages[:2], "completion": messages[2:]},
    ):
        assert read(tokenizer, record) == [expected]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"messages": messages}, {"prompt": "q", "completion": "a"}])))
    tally = Tally()
    first, second = read_records(path, "jsonl", tally, tokenizer.template)
    assert (first.rendered, second.rendered, second.text) == (True, False, "qa")
    assert [*tally.lines()] == [
        "a.jsonl: 1 record, messages → chat template", "a.jsonl: 1 record, prompt + completion",
    ]  # fmt: skip
    tally = Tally()
    path.write_text(json.dumps({"messages": talk("a", "b", "c", "d")}))
    assert len([*read_records(path, "jsonl", tally, models["thinking"][1].template)]) == 2
    assert "one answer at a time" in next(tally.lines())


def test_what_a_template_refuses(models: dict[str, tuple[Path, Tokenizer]]) -> None:
    late = [*talk("a", "b"), {"role": "system", "content": "s"}]
    with refused("template.refused", "record 1", "System comes first"):
        read(models["headers"][1], {"messages": late})
    with refused("template.refused", "record 1"):
        read(models["calls"][1], {"messages": [{"role": "assistant", "content": "a"}]})  # no message before it


def template(source: str, *special: str) -> ChatTemplate:
    return ChatTemplate(source, {"eos_token": "</s>"}, ["</s>", *special], lambda: True)


def spans(source: str, *contents: str) -> list[tuple[str, list[str]]]:
    found = template(source).conversation("x", talk(*contents), [*range(1, len(contents), 2)])
    return [(part.text, [part.text[a:b] for a, b in part.counted or ()]) for part in found]


def test_templates_of_other_kinds() -> None:
    loop = "{% for m in messages %}%s{% endfor %}"
    prompt = "{% if add_generation_prompt %}A:{% endif %}"
    plain = loop.replace("%s", "{{ m.role[0]|upper }}:{{ m.content }}\n") + prompt
    assert spans(plain, "a", "b") == [("U:a\nA:b\n", ["b\n"])]  # no token ends a turn
    early = loop.replace("%s", "{{ m.role[0]|upper }}:{{ m.content }}</s>[]\n") + prompt
    assert spans(early, "a", "b") == [("U:a</s>[]\nA:b</s>[]\n", ["b</s>[]\n"])]
    shown = loop.replace("%s", "{{ m.content }}</s>") + "{% if add_generation_prompt %}<think>{% endif %}"
    with refused("template.inconsistent", "x", "message 2"):
        spans(shown, "a", "b")
    for broken in ("{% if %}", "{% generation %}", "{{ 1 +"):
        with refused("template.invalid"):
            spans(broken, "a", "b")
    for hostile in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for i in range(10**9) %}{% endfor %}", "{{ 1 // 0 }}",
        "{{ messages.append(1) }}", "{{ messages[0]['content'].x.y }}", "{{ undefined() }}",
    ):  # fmt: skip
        with refused("template.refused", "x"):
            spans(hostile, "a", "b")
    assert template(plain).end_of_turn is None and template(early).end_of_turn == "</s>"
    assert template("{{ 1 // 0 }}").end_of_turn is None


def test_characters_that_stand_for_spellings() -> None:
    """Also in a conversation that has them, and the marks of {% generation %}."""
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}</s>{% endfor %}"
    odd = "".join(map(chr, range(0xF0000, 0xF0020))) + "</s>\ufdd0\ufdd1"
    (part,) = template(source).conversation("x", [{"role": "assistant", "content": odd}], [0])
    assert part.text == odd + "</s>" and part.counted == part.literal == ((0, len(odd)),)


def test_templates_are_kept(tmp_path: Path, models: dict[str, tuple[Path, Tokenizer]]) -> None:
    """In a tokenizer.json of ours, and in a folder of several named ones."""
    folder, tokenizer = models["headers"]
    tokenizer.save(tmp_path / "t.json")
    again = Tokenizer.load(tmp_path / "t.json")
    assert again.template and tokenizer.template and again.template.source == tokenizer.template.source
    assert (again.prefix, again.stops, again.names) == (tokenizer.prefix, tokenizer.stops, tokenizer.names)
    write(tmp_path, "llama3", ends=["<|end_of_text|>", "<|eom_id|>"])
    about: dict[str, Any] = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about | {"chat_template": named}))
    found = Tokenizer.load(tmp_path)
    assert found.template and found.template.prompt("x", []).text == "<|begin_of_text|>yes"
    ids = map(found._library.token_to_id, ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"))
    assert found.stops == {*ids}
    for wrong in (3, [{"name": "default"}], {"a": "b"}, [{"name": "default", "template": 3}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(about | {"chat_template": wrong}))
        with refused("tokenizer.invalid", "chat"):
            Tokenizer.load(tmp_path)
