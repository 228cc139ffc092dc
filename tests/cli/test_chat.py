"""A conversation is tokenized as in training, fits the model's trained length, and survives Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.chats import TEMPLATES, talk, write
from support.heard import lines
from support.laptop import TINY, Laptop
from support.refused import refused
from support.samples import in_memory

from llmpy import GPT2, Tokenizer
from llmpy.cli.chat import answer, chat, prompt, questions, reader
from llmpy.cli.sample import sample
from llmpy.data.encode import encode
from llmpy.data.record_fields import messages as read_messages
from llmpy.data.record_fields import plain
from llmpy.data.records import Document, begins, holds_answers, question
from llmpy.data.shards import CHUNK, Shard, open_shard
from llmpy.formats import find
from llmpy.formats.convert import convert
from llmpy.formats.huggingface import write_model as write_hf
from llmpy.options.sample_chat import ChatOptions, SampleOptions
from llmpy.options.tools import ConvertOptions
from llmpy.options.train import TrainOptions
from llmpy.train.assemble import train
from llmpy.watch.runs import Runs
from llmpy.watch.server import board

BYTES = Tokenizer.bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    GPT2.new("d1", tokenizer=BYTES, machine=Laptop()).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Return the (prompt, count, seed) of each call of a model with a constant answer."""
    seen: list[tuple[str, int, int]] = []

    def continued(self: GPT2, ids: list[int], count: int, choice: Any, stop: Any, seed: int) -> Iterator[str]:
        seen.append(
            (BYTES.decode(ids) if self.require_tokenizer().vocab_size == BYTES.vocab_size else ids, count, seed)
        )
        yield from (" I", " see.", "\n\n")

    monkeypatch.setattr(GPT2, "continued", continued)
    return seen


def test_the_tokens_are_those_of_training() -> None:
    tokenizer = Tokenizer.train(["user: hello there\n\nassistant: hello you\n\nsystem: be brief\n\n" * 50], 330)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hello you"},
        {"role": "user", "content": "there"},
        {"role": "assistant", "content": "be hello"},
    ]
    (whole,) = encode(tokenizer, [Document("x", *plain(read_messages("x", messages, set())), literal=True)])
    ids = prompt(tokenizer, messages[:1], messages[1:4], 900)
    assert ids == whole.ids[: len(ids)].tolist()
    assert whole.counted is not None
    assert whole.counted[len(ids)]  # the next token is the first of an answer
    assert not whole.counted[len(ids) - 1]
    assert tokenizer.decode(whole.ids[len(ids) :]) == "be hello\n\n"


@pytest.mark.parametrize("text", ["a<|endoftext|>b", "<|endoftext|>", "x\n\nuser: <|endoftext|>"])
def test_special_tokens_typed_are_text(text: str) -> None:
    for tokenizer in (BYTES, Tokenizer.train([text * 50], 300)):
        ids = prompt(tokenizer, [{"role": "system", "content": text}], [{"role": "user", "content": text}], 900)
        assert ids.count(tokenizer.eot) == 1
        assert tokenizer.decode(ids[1:]) == f"system: {text}\n\nuser: {text}\n\nassistant: "


def test_old_messages_make_room() -> None:
    system = [{"role": "system", "content": "S"}]
    messages = [{"role": role, "content": f"{role} {n}"} for n in range(5) for role in ("user", "assistant")][:-1]
    ids = prompt(BYTES, system, messages, 80)
    text = BYTES.decode(ids)
    assert text.startswith("<|endoftext|>system: S\n\nuser: ")  # no answer without its question
    assert text.endswith("user: user 4\n\nassistant: ")
    assert "user 3" in text and "user 0" not in text
    assert len(ids) <= 80
    with refused("chat.message-too-long", 80):
        prompt(BYTES, system, [{"role": "user", "content": "x" * 200}], 80)


def test_a_conversation(folder: Path, asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    typed = lines("Hi", "", "  ", "/rest", "And?", "/reset", "/help", "Bye", "/quit", "never read")
    chat(ChatOptions(folder, system="Be brief.", tokens=40, seed=7), typed, Laptop())
    system, hi = "<|endoftext|>system: Be brief.\n\n", "user: Hi\n\nassistant: "
    assert asked == [
        (system + hi, 40, 7),
        (system + hi + "I see.\n\nuser: And?\n\nassistant: ", 40, 8),
        (system + "user: Bye\n\nassistant: ", 40, 9),
    ]
    printed = capsys.readouterr()
    assert printed.out == 3 * " I see.\n"
    assert printed.err.count("/reset") == 3
    assert "\x1b" not in printed.out + printed.err


def test_invalid_messages_are_skipped(folder: Path, asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    chat(ChatOptions(folder, tokens=40), lines("x" * 3000, "\udcff", "Hi"), Laptop())
    assert [prompt for prompt, _, _ in asked] == ["<|endoftext|>user: Hi\n\nassistant: "]
    err = capsys.readouterr().err
    assert "3,0" in err  # tokens of the first message
    assert "not valid in UTF-8" in err


PROGRAM = """
import sys, time
from llmpy import GPT2
from llmpy.cli import chat, main as cli
from support.laptop import Laptop
def continued(self, ids, *_):
    print("(", end="", flush=True)
    for n in range(600 if bytes(ids[1:]).endswith(b"user: long\\n\\nassistant: ") else 1):
        yield "word "
        time.sleep(0.05)
GPT2.continued = continued
true = chat.chat
chat.chat = lambda options: true(options, machine=Laptop())
sys.exit(cli.main(["chat", sys.argv[1]]))
"""


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_ends_only_the_answer(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, encoding="utf-8", env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("long\n")
    process.stdin.flush()
    assert process.stdout.read(6) == "(word "
    process.send_signal(signal.SIGINT)
    out, err = process.communicate("short\n", timeout=60)
    assert process.returncode == 0, err
    assert out.endswith("\n(word\n")
    assert out.count("word") < 100
    assert "Traceback" not in err


def test_a_model_answers_as_it_was_tuned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def record(*texts: str) -> str:
        roles = ("user", "assistant")
        return json.dumps({"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]})

    records = [record("ping", "pong", "red", "blue"), record("red", "blue", "ping", "pong")]
    (tmp_path / "chats.jsonl").write_text("\n".join(records * 60), "utf-8")
    options = TrainOptions(
        data=(tmp_path / "chats.jsonl",), model="d1", out=tmp_path / "run", batch_size=8, sequence_length=32,
        steps=120, lr=5e-3, vocab_size=300, dtype="float32", checkpoint_every=0, sample_tokens=2, eval_batches=1,
    )  # fmt: skip
    assert train(options) == 0
    capsys.readouterr()
    chat(ChatOptions(tmp_path / "run", tokens=12, temperature=0, dtype="float32"), lines("ping", "red"))
    assert capsys.readouterr().out.split() == ["pong", "blue"]


def test_a_model_with_a_chat_template(tmp_path: Path, asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Training, its samples, chats and conversions use it; texts are separated by end-of-text as before."""
    model, run = tmp_path / "model", tmp_path / "run"
    write_hf(model, in_memory(replace(TINY, vocab_size=400, context=96)), "float32")  # more rows than tokens
    write(model, "qwen", TEMPLATES["calls"][1], ends=["<|endoftext|>", "<|im_end|>"])
    conversations = [{"messages": talk("What is 2 + 2?", "It is 4.", system="s")}] * 30
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*conversations, {"prompt": "q", "completion": "a"}])))
    options = TrainOptions(
        init=str(model), data=(tmp_path / "a.jsonl",), out=run, batch_size=1, sequence_length=96, steps=1,
        sample_every=0, sample_tokens=4, eval_batches=1, checkpoint_every=0,
    )  # fmt: skip
    assert train(options, Laptop()) == 0
    out = capsys.readouterr().out
    assert "30 records, messages → chat template" in out and "llmpy chat" in out
    tokenizer = Tokenizer.load(run)
    ids = open_shard(run / "train.bin", tokenizer.vocab_size).tokens[:].tolist()
    text = tokenizer.decode(ids)
    start = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert text.startswith(2 * f"{start}It is 4.<|im_end|>\n")
    val = open_shard(run / "val.bin", tokenizer.vocab_size).tokens[:].tolist()
    assert "<|im_end|>\n<|im_end|>qa<|im_end|>" in tokenizer.decode(val)  # and padding
    assert question([open_shard(run / "train.bin", tokenizer.vocab_size)], tokenizer, 99) == tokenizer.encode(start)

    convert(ConvertOptions(run, tmp_path / "hf"), lambda _: None)
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == TEMPLATES["calls"][1]
    for folder in (run, tmp_path / "hf"):
        again = Tokenizer.load(folder)
        assert again.stops == {again._library.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>")}
        chat(ChatOptions(folder, system="s", tokens=40), lines("What is 2 + 2?", "<|im_end|>"), Laptop())
        assert "continues the text" not in capsys.readouterr().err
    assert len(asked) == 4
    first = prompt(tokenizer, [{"role": "system", "content": "s"}], talk("What is 2 + 2?"), 900)
    assert first == tokenizer.encode(start) == asked[0][0] == asked[2][0]
    again_ids = prompt(tokenizer, [], talk("old" * 9, "a", "<|im_end|>"), 40)
    assert tokenizer.decode(again_ids).endswith(
        "<|im_end|>\n<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert again_ids.count(tokenizer.eot) == 2 and "old" not in tokenizer.decode(again_ids)


def test_where_answers_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of any size, with little memory for a mask of any length."""
    counted = np.random.default_rng(1).integers(0, 2, 60).astype(np.uint8)
    shard = Shard(Path(), np.zeros(60, np.uint16), counted)
    expected = [i for i in range(1, 60) if counted[i] > counted[i - 1]]
    for chunk in range(1, 62):
        monkeypatch.setattr("llmpy.data.records.CHUNK", chunk)
        assert [*begins(shard)] == expected
    assert [*begins(Shard(Path(), np.zeros(60, np.uint16)))] == []
    monkeypatch.undo()
    count = 10 * CHUNK
    long = Shard(Path(), np.zeros(count, np.uint16), np.zeros(count, np.uint8))
    tracemalloc.start()
    try:
        assert not holds_answers(long, BYTES)
        assert tracemalloc.get_traced_memory()[1] < 4 * CHUNK
    finally:
        tracemalloc.stop()


def test_an_answer_ends_without_blank_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Those within it stay."""
    assert answer(iter(["It is", " 4", "\n", "\nor 5", ".\n\n"])) == "It is 4\n\nor 5."
    assert capsys.readouterr().out == "It is 4\n\nor 5.\n"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_answer_has_no_effect_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for screen, shown in ((Screen(), "a\n\tb\\x1b]52;c;x\\x07\n"), (io.StringIO(), "a\n\tb\x1b]52;c;x\x07\n")):
        monkeypatch.setattr(sys, "stdout", screen)
        assert answer(iter(["a\n", "\tb\x1b", "]52;c;x\x07 "])) == "a\n\tb\x1b]52;c;x\x07"
        assert screen.getvalue() == shown


OPENED: list[str] = []  # while WATCHED
WATCHED: list[bool] = []
sys.addaudithook(lambda event, arguments: OPENED.append(f"{event} {arguments}") if WATCHED else None)


@pytest.mark.parametrize("verb", ["chat", "sample", "convert", "init", "watch"])
def test_paths_in_a_foreign_config_are_not_followed(
    verb: str, folder: Path, tmp_path: Path, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign"
    (foreign / "deep").mkdir(parents=True)
    (foreign / "deep" / "a.jsonl").write_text('{"messages": []}')
    names = dict.fromkeys(("out", "init", "resume", "hellaswag"), str(foreign / "deep"))
    config = {"options": {"data": [str(foreign)], **names}, "machine": {}}
    (folder / "config.json").write_text(json.dumps(config))
    WATCHED.append(True)
    try:
        if verb == "chat":
            chat(ChatOptions(folder, tokens=2), lines("hello"), Laptop())
        elif verb == "sample":
            sample(SampleOptions(folder, tokens=2), lambda _: None, Laptop())
        elif verb == "convert":
            convert(ConvertOptions(folder, tmp_path / "out.bin"), lambda _: None)
        elif verb == "init":
            find(str(folder), lambda _: None)
        else:
            board(Runs([folder]), "show=")
    finally:
        WATCHED.clear()
    found = [event for event in OPENED if str(foreign) in event]
    OPENED.clear()
    assert found == []


@pytest.mark.parametrize(
    ("piped", "messages"),
    [
        (b"\xef\xbb\xbfone\r\ntwo\n", ["one", "two"]),
        ("a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g\rh\n".encode(), ["a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g\rh"]),
        ("é\n\n \ufeff last".encode(), ["é", "\ufeff last"]),
        (b"\xff\nx", ["\udcff", "x"]),
    ],
)
def test_piped_messages_are_lines(piped: bytes, messages: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped), "ascii"))
    assert list(questions(reader())) == messages
