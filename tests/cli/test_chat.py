"""A talk is cut into tokens as training cuts it, stays within the model's reach, and survives Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.laptop import Laptop

from llmpy import GPT2, Tokenizer
from llmpy.cli import main as cli
from llmpy.cli.chat import Talk, answer, chat, tuned
from llmpy.data.encode import encode
from llmpy.data.records import begins, conversation, holds_answers
from llmpy.data.shards import CHUNK, Shard
from llmpy.errors import LlmpyError
from llmpy.formats import hub
from llmpy.options.sample_chat import ChatOptions
from llmpy.options.train import TrainOptions
from llmpy.train.assemble import train

BYTES = Tokenizer.bytes()


def lines(*said: str) -> Callable[[], str]:
    """A user who says these, then leaves."""
    left = iter(said)

    def ask() -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return ask


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    GPT2.new("d1", tokenizer=BYTES, machine=Laptop()).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Prompts, counts and seeds that a model would have continued; it always says the same."""
    seen: list[tuple[str, int, int]] = []

    def continued(self: GPT2, ids: list[int], count: int, choice: Any, stop: Any, seed: int) -> Iterator[str]:
        seen.append((BYTES.decode(ids), count, seed))
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
    (whole,) = encode(tokenizer, [conversation("x", messages)])
    talk = Talk(tokenizer, 1000, "be brief")
    for message in messages[1:4]:
        talk.say(**message)
    prompt = talk.prompt(100)
    assert prompt == whole.ids[: len(prompt)].tolist()
    assert whole.counted is not None
    assert whole.counted[len(prompt)]  # the next token is the first of an answer
    assert not whole.counted[len(prompt) - 1]
    assert tokenizer.decode(whole.ids[len(prompt) :]) == "be hello\n\n"


def test_old_messages_make_room() -> None:
    talk = Talk(BYTES, 100, "S")
    for n in range(4):
        talk.say("user", f"question {n}")
        talk.say("assistant", f"answer {n}")
    talk.say("user", "last")
    text = BYTES.decode(talk.prompt(20))
    assert text.startswith("<|endoftext|>system: S\n\nuser: ")  # never an answer without its question
    assert text.endswith("user: last\n\nassistant: ")
    assert "question 3" in text
    assert "question 0" not in text
    assert len(talk.prompt(20)) <= 80
    assert len(talk.prompt(10_000)) <= 50  # an answer takes at most half
    talk.reset()
    talk.say("user", "x" * 200)
    with pytest.raises(LlmpyError, match="the message has 2.. tokens"):
        talk.prompt(20)
    assert talk.messages == []


def test_a_talk(folder: Path, asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    said = lines("Hi", "", "  ", "/rest", "And?", "/reset", "/help", "Bye", "/quit", "never read")
    chat(ChatOptions(folder, system="Be brief.", tokens=40, seed=7), said, Laptop())
    system, hi = "<|endoftext|>system: Be brief.\n\n", "user: Hi\n\nassistant: "
    assert asked == [
        (system + hi, 40, 7),
        (system + hi + "I see.\n\nuser: And?\n\nassistant: ", 40, 8),
        (system + "user: Bye\n\nassistant: ", 40, 9),
    ]
    told = capsys.readouterr()
    assert told.out == 3 * " I see.\n"
    assert "did you mean /reset?" in told.err
    assert "forget the talk so far" in told.err
    assert "\x1b" not in told.out + told.err


def test_what_cannot_be_said(folder: Path, asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    chat(ChatOptions(folder, tokens=40), lines("x" * 3000, "\udcff", "Hi"), Laptop())
    assert [prompt for prompt, _, _ in asked] == ["<|endoftext|>user: Hi\n\nassistant: "]
    err = capsys.readouterr().err
    assert "say it in fewer words" in err
    assert "not UTF-8" in err


def test_options_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "none", "--top-p", "2"]) == 1
    assert "--top-p 2" in capsys.readouterr().err
    assert cli.main(["chat", "none"]) == 1
    assert "no model none" in capsys.readouterr().err


TALK = """
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
def test_ctrl_c_ends_the_answer_and_not_the_talk(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", TALK, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
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
    def talk(*said: str) -> str:
        roles = ("user", "assistant")
        return json.dumps({"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]})

    talks = [talk("ping", "pong", "red", "blue"), talk("red", "blue", "ping", "pong")]
    (tmp_path / "talks.jsonl").write_text("\n".join(talks * 60), "utf-8")
    told = TrainOptions(
        data=(tmp_path / "talks.jsonl",), model="d1", out=tmp_path / "run", batch_size=8, sequence_length=32,
        steps=120, lr=5e-3, vocab_size=300, dtype="float32", checkpoint_every=0, sample_tokens=2, eval_batches=1,
    )  # fmt: skip
    assert train(told) == 0
    capsys.readouterr()
    chat(ChatOptions(tmp_path / "run", tokens=12, temperature=0, dtype="float32"), lines("ping", "red"))
    assert capsys.readouterr().out.split() == ["pong", "blue"]


NOTE = "nothing shows that {} was tuned on messages"


def test_who_only_continues_text_says_so(
    tmp_path: Path, folder: Path, asked: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, beforehand, with what to do; what was tuned on messages says nothing, as far as that can be known."""
    monkeypatch.chdir(tmp_path)
    messages = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]
    records: dict[str, Any] = {
        "talks": {"messages": messages}, "pairs": {"prompt": "assistant: ping", "completion": " pong"},
        "texts": {"text": "user: ping\n\nassistant: pong"},
    }  # fmt: skip
    for name, record in records.items():
        Path(f"{name}.jsonl").write_text(f"{json.dumps(record)}\n" * 60, "utf-8")
    assert cli.main(["data", "talks.jsonl", "--tokenizer", "bytes", "--out", "tokens"]) == 0

    def trained(name: str, data: str) -> None:
        told = TrainOptions(
            data=(Path(data),), model="d1", out=Path(name), batch_size=2, sequence_length=16, steps=1,
            sample_tokens=1, eval_batches=1,
        )  # fmt: skip
        assert train(told, Laptop()) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == (
            f"talk with it:  llmpy chat {name}" if name in "ab"
            else f'continue a text with:  llmpy sample {name} --prompt "…"'
        )  # fmt: skip

    def noted(model: str) -> bool:
        capsys.readouterr()
        chat(ChatOptions(Path(model)), lines("ping", "ping"), Laptop())
        err = capsys.readouterr().err
        assert err.count(NOTE.format(model)) == err.count("note:") <= 1
        assert ("llmpy sample" in err) is ("llmpy train --init" in err) is ("note:" in err)
        return "note:" in err

    for name, data in (("a", "talks.jsonl"), ("b", "tokens"), ("c", "pairs.jsonl"), ("d", "texts.jsonl")):
        trained(name, data)
    assert [noted(name) for name in ("a", "a/best.safetensors", "b")] == [False, False, False]
    assert [noted(name) for name in ("c", "d", str(folder))] == [True, True, True]
    with monkeypatch.context() as patch:  # a model of the hub is none of the run that it is named in
        patch.chdir("b")
        patch.setattr(hub, "download", lambda *_: folder)
        assert [noted("."), noted("gpt2")] == [False, True]
        newest = Path("checkpoints/step-00000001")
        assert tuned(newest, BYTES) and tuned(newest / "model.safetensors", BYTES)
    Path("b/config.json").write_text("{")
    Path("tokens").rename("elsewhere")
    assert noted("b")
    assert asked[0][0] == "<|endoftext|>user: ping\n\nassistant: "  # and it talks all the same


def test_where_answers_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """By chunks, whose ends hide none; a mask of any length takes no memory to speak of."""
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
    """As training has them between messages; those within it stay."""
    assert answer(iter(["It is", " 4", "\n", "\nor 5", ".\n\n"])) == "It is 4\n\nor 5."
    assert capsys.readouterr().out == "It is 4\n\nor 5.\n"
