"""`llmpy serve`: answers equal to `llmpy sample`, errors in OpenAI's form, access, limits, shutdown."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.chats import talk
from support.laptop import Laptop
from support.refused import refused
from support.serving import KEY, REACH, Answer, ask, chat_model, serving

from llmpy.api import Model
from llmpy.cli.sample import sample
from llmpy.data.encode import prompt_ids
from llmpy.generate.sampling import Choice
from llmpy.options.sample_chat import SampleOptions
from llmpy.options.serve import ServeOptions

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
from llmpy.serve import openai_server as module  # noqa: E402

TEXTS, CHATS = "/v1/completions", "/v1/chat/completions"
Json = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    with serving(folder, name="m", texts=4) as port:
        yield port


def sampled(folder: Path, *prompts: str, **options: Any) -> list[Json]:
    out: list[str] = []
    options = {"temperature": 1.0, "top_k": 0, "tokens": 12} | options
    sample(SampleOptions(folder, prompt=prompts, json=True, **options), out.append, Laptop())
    return list(json.loads(out[0])["texts"])


def test_completions_are_those_of_sample(port: int, folder: Path) -> None:
    """Each with a seed of its own; past the trained length, where the window slides, too."""
    asked = {"model": "m", "prompt": ["What is", "2 + 2"], "max_tokens": 12, "seed": 5}
    found = ask(port, TEXTS, asked).json
    want = sampled(folder, "What is", "2 + 2", seed=5)
    assert [c["text"] for c in found["choices"]] == [t["text"] for t in want]
    assert [c["index"] for c in found["choices"]] == [0, 1]
    prompt = sum(len(t["prompt_tokens"]) for t in want)
    assert found["usage"] == {"prompt_tokens": prompt, "completion_tokens": 24, "total_tokens": prompt + 24}
    twice = ask(port, TEXTS, asked | {"prompt": "What is", "n": 2}).json["choices"]
    assert [c["text"] for c in twice] == [t["text"] for t in sampled(folder, "What is", "What is", seed=5)]
    ids = asked | {"prompt": [t["prompt_tokens"] for t in want]}
    assert ask(port, TEXTS, ids).json["choices"] == found["choices"]
    for settings in ({"temperature": 0.6, "top_p": 0.8}, {"top_k": 9, "min_p": 0.02, "repetition_penalty": 1.4}):
        one = asked | settings | {"prompt": "Größe", "max_tokens": REACH + 30}
        (wanted,) = sampled(folder, "Größe", seed=5, **settings, tokens=REACH + 30)
        assert ask(port, TEXTS, one).json["choices"][0]["text"] == wanted["text"]
    assert ask(port, TEXTS, {"model": "m", "seed": 0, "max_tokens": 2}).status == 200  # end-of-text is the prompt


def test_stops_and_log_probabilities(port: int, folder: Path) -> None:
    (whole,) = sampled(folder, "What is", tokens=30)
    stop = whole["text"][5:7]
    (want,) = sampled(folder, "What is", tokens=30, stop=(stop,))
    asked = {"model": "m", "prompt": "What is", "max_tokens": 30, "seed": 1337, "stop": stop, "logprobs": 2}
    (found,) = ask(port, TEXTS, asked).json["choices"]
    assert (found["text"], found["finish_reason"]) == (want["text"], "stop")
    logs = found["logprobs"]
    assert logs["token_logprobs"] == want["logprobs"]
    assert logs["text_offset"][:2] == [0, len(logs["tokens"][0])]
    for token, value, top in zip(logs["tokens"], logs["token_logprobs"], logs["top_logprobs"], strict=True):
        assert value <= max(top.values()) and len(top) <= 2
        assert token not in top or top[token] == value or token == "\ufffd"  # of several tokens
    streamed = ask(port, TEXTS, asked | {"stream": True}).events
    assert "".join(c["choices"][0]["text"] for c in streamed) == want["text"]
    values = [v for c in streamed for v in (c["choices"][0]["logprobs"] or {}).get("token_logprobs", [])]
    assert values == want["logprobs"]


def chat_text(folder: Path, messages: list[Json], count: int, seed: int) -> str:
    model = Model.load(folder, machine=Laptop())
    ids = prompt_ids("x", messages, model.require_tokenizer())
    return "".join(model.continued(ids, count, Choice(), (), seed))


def test_chats_use_the_template(port: int, folder: Path) -> None:
    messages = talk("What is 2 + 2?", system="Be brief.")
    asked = {"model": "m", "messages": messages, "max_completion_tokens": 14, "seed": 1}
    want = [chat_text(folder, messages, 14, seed) for seed in (1, 2)]
    found = ask(port, CHATS, asked | {"n": 2}).json
    assert found["object"] == "chat.completion" and found["usage"]["completion_tokens"] == 28
    assert [c["message"] for c in found["choices"]] == [
        {"role": "assistant", "content": text, "refusal": None} for text in want
    ]
    assert {c["finish_reason"] for c in found["choices"]} == {"length"}
    options = {"n": 2, "stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 3}
    *chunks, last = ask(port, CHATS, asked | options).events
    assert last["choices"] == [] and last["usage"] == found["usage"]
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"} and all(c["usage"] is None for c in chunks)
    for i, text in enumerate(want):
        mine = [choice for c in chunks for choice in c["choices"] if choice["index"] == i]
        assert mine[0]["delta"]["role"] == "assistant" and mine[-1]["finish_reason"] == "length"
        assert "".join(choice["delta"].get("content", "") for choice in mine) == text
        tokens = [token for choice in mine if choice["logprobs"] for token in choice["logprobs"]["content"]]
        assert len(tokens) == 14 and {len(token["top_logprobs"]) for token in tokens} == {3}
        for token in tokens:
            assert token["bytes"] is None or bytes(token["bytes"]).decode() == token["token"]
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]
    named = [messages[0], {"role": "user", "content": parts, "name": None}]
    assert ask(port, CHATS, asked | {"messages": named}).json["choices"][0]["message"]["content"] == want[0]


def test_clients_get_what_each_gets_alone(port: int) -> None:
    asked = [
        {"model": "m", "messages": talk(f"What is {i}?"), "max_tokens": 5 + i, "seed": i, "stream": i % 2 == 0,
         "temperature": i % 3 / 2}
        for i in range(16)
    ]  # fmt: skip

    def text(body: Json) -> str:
        answer = ask(port, CHATS, body)
        if not body["stream"]:
            return str(answer.json["choices"][0]["message"]["content"])
        return "".join(c["choices"][0]["delta"].get("content", "") for c in answer.events)

    with ThreadPoolExecutor(16) as pool:
        together = [*pool.map(text, asked)]
    assert together == [text(body | {"stream": not body["stream"]}) for body in asked]


CHAT = {"model": "m", "messages": talk("Hi"), "max_tokens": 2}
TEXT = {"model": "m", "prompt": "Hi", "max_tokens": 2}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("user", "me"), ("metadata", {"a": "b"}), ("store", False), ("presence_penalty", 0), ("logit_bias", {}),
        ("tools", []), ("tool_choice", "none"), ("response_format", {"type": "text"}), ("seed", -1), ("stop", None),
        ("stop", ["a", "b"]), ("max_tokens", None), ("n", None), ("temperature", 0), ("stream_options", None),
        ("unheard_of", None),
    ],
)  # fmt: skip
def test_parameters_that_mean_nothing_are_accepted(port: int, name: str, value: Any) -> None:
    assert ask(port, CHATS, CHAT | {name: value}).status == 200


WRONG: list[tuple[str, str, Any]] = [
    *(
        (CHATS, name, value)
        for name, value in (
            ("tools", [{"type": "function"}]), ("response_format", {"type": "json_object"}), ("logit_bias", {"1": 5}),
            ("presence_penalty", 0.5), ("frequency_penalty", -1), ("unheard_of", 0), ("prompt", "x"), ("best_of", 2),
            ("temperature", "hot"), ("temperature", True), ("temperature", 2.5), ("temperature", 10**400),
            ("top_p", 0), ("top_p", 1.5), ("max_tokens", 0), ("max_tokens", 1.5), ("max_tokens", "9"),
            ("max_tokens", 10**400), ("n", 0), ("n", 10**6), ("store", True), ("seed", 1.5), ("seed", 1 << 64),
            ("stop", ["a"] * 5),
            ("stop", ""), ("stop", "x" * 300), ("stop", [1]), ("stream", "yes"), ("logprobs", 3), ("top_logprobs", 3),
            ("stream_options", {"include_usage": True}), ("messages", None), ("messages", []), ("messages", "Hi"),
            ("messages", [{"role": "user"}]), ("messages", [{"role": "robot", "content": "x"}]), ("messages", ["x"]),
            ("messages", [{"role": "user", "content": [{"type": "image_url"}]}]),
            ("messages", [{"role": "user", "content": "x", "name": "me"}]),
            ("messages", [{"role": "user", "content": "x", "colour": "red"}]),
            ("messages", [{"role": "user", "content": "\ud800"}]), ("messages", talk("word " * 99)),
            ("model", None), ("model", "other"), ("model", "\ud800"), ("model", 3),
        )
    ),
    *(
        (TEXTS, name, value)
        for name, value in (
            ("prompt", 3), ("prompt", []), ("prompt", [[]]), ("prompt", [-1]), ("prompt", [400]), ("prompt", [True]),
            ("prompt", ["a", 1]), ("prompt", [[1], 2]), ("prompt", "\udcff"), ("prompt", [1] * REACH),
            ("prompt", ["a"] * 1000), ("echo", True), ("suffix", "x"), ("logprobs", 21), ("logprobs", True),
            ("best_of", 3), ("messages", []), ("max_completion_tokens", 4),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("path", "param", "value"), WRONG)
def test_others_are_refused_by_name(port: int, path: str, param: str, value: Any) -> None:
    answer = ask(port, path, (CHAT if path == CHATS else TEXT) | {param: value})
    check_refusal(answer, 404 if value in ("other", "\ud800") else 400)
    assert answer.json["error"]["param"] == param


def check_refusal(answer: Answer, status: int) -> None:
    error = answer.json["error"]
    assert (answer.status, error.keys()) == (status, {"message", "type", "param", "code"}), answer.body
    assert error["message"] and len(error["message"]) < 400


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", 400), (b"{", 400), (json.dumps(CHAT).encode()[:-9], 400), (b"[]", 400), (b"3", 400), (b"\xff\xfe{", 400),
        (b"[" * 100_000, 400), (b'{"a":' * 100_000, 400), (b'{"model": NaN}', 400), (b"1" * 9000, 400),
        (b'{"model": "' + b"x" * 2_000_000 + b'"}', 413), (b" " * 10_000_000, 413),
        (b'{"model": "m", "messages": ' + b'[{"content":' * 900 + b"1" + b"}]" * 900 + b"}", 400),
    ],
)  # fmt: skip
def test_bodies_that_are_not_requests(port: int, data: bytes, status: int) -> None:
    for path in (TEXTS, CHATS):
        check_refusal(ask(port, path, data), status)
    assert ask(port, TEXTS, TEXT).status == 200


def test_paths_and_methods(port: int) -> None:
    models = ask(port, "/v1/models").json
    assert [model["id"] for model in models["data"]] == ["m"]
    assert ask(port, "/v1/models/m").json == models["data"][0]
    for path, method, status in (
        ("/v1/models/x", "GET", 404), ("/", "GET", 404), ("/v1/models/", "GET", 404), ("/v1/../health", "GET", 404),
        (TEXTS, "GET", 405), ("/health", "POST", 405), (CHATS, "OPTIONS", 405), ("/v1/embeddings", "POST", 404),
    ):  # fmt: skip
        check_refusal(ask(port, path, method=method), status)


@pytest.mark.parametrize(
    ("host", "site", "status"),
    [
        ("127.0.0.1:1", "none", 200), ("localhost", "same-origin", 200), ("[::1]:80", "none", 200),
        ("evil.example", "none", 403), ("localhost.evil.example:80", "none", 403), ("", "none", 403),
        ("localhost", "cross-site", 403), ("localhost", "same-site", 403),
    ],
)  # fmt: skip
def test_other_hosts_and_sites_are_refused(port: int, host: str, site: str, status: int) -> None:
    for path, body in (("/health", None), ("/v1/models", None), (TEXTS, TEXT)):
        answer = ask(port, path, body, Host=host, Sec_Fetch_Site=site)
        assert answer.status == status
        assert "access-control-allow-origin" not in answer.headers


def test_pages_of_browsers_without_sec_fetch_site(port: int) -> None:
    for origin, status in (("http://localhost:3000", 200), ("https://evil.example", 403), ("null", 403)):
        assert ask(port, TEXTS, TEXT, Origin=origin).status == status


def test_a_silent_connection_is_closed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENT", 0.05)
    with serving(folder, name="m") as port, socket.create_connection(("127.0.0.1", port), timeout=10) as silent:
        assert silent.recv(1) == b""


def test_the_key_opens_everything(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On all interfaces; without it only /health answers, and says nothing else."""
    with serving(folder, host="0.0.0.0", api_key=KEY, name="m") as port:
        for path, body, method in (
            ("/v1/models", None, ""), (TEXTS, TEXT, ""), (CHATS, CHAT, ""), ("/", None, ""), ("/health/", None, ""),
            ("/health?x", None, "POST"), ("//health", None, ""), ("/nothing", None, ""), (TEXTS, b"{", ""),
        ):  # fmt: skip
            for given in (None, "", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Basic {KEY}", KEY, "Bearer \xe9"):
                headers = {} if given is None else {"Authorization": given}
                answer = ask(port, path, body, method, **headers)
                if path != "/health?x":
                    check_refusal(answer, 401)
                    assert b'"m"' not in answer.body
        assert ask(port, "/health", Host="any.example").json == {"status": "ok"}
        key = {"Authorization": f"Bearer {KEY}", "Host": "any.example"}
        assert ask(port, "/health", **key).json == {"status": "ok", "running": 0, "waiting": 0}
        assert ask(port, CHATS, CHAT, **key).status == 200
    for host in ("0.0.0.0", "::"):
        with refused("serve.key-missing", host, "--api-key"):
            module.serve(ServeOptions(folder, host=host, port=0), print, Laptop())
    monkeypatch.setenv("LLMPY_API_KEY", KEY)
    with serving(folder, host="0.0.0.0") as port:
        assert ask(port, "/v1/models").status == 401
    with refused("serve.key-invalid"):
        module.serve(ServeOptions(folder, port=0, api_key="é"), print, Laptop())


def quiet(port: int) -> bool:
    """Wait until no text has a place."""
    for _ in range(1000):
        found = ask(port, "/health").json
        if (found["running"], found["waiting"]) == (0, 0):
            return True
        time.sleep(0.01)
    return False


LONG = {"model": "m", "prompt": "Hi", "max_tokens": 1_000_000, "temperature": 0}  # this model then ends none


def started(port: int, body: Json) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", TEXTS, json.dumps(body).encode())
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_places(port: int, stream: bool) -> None:
    connection = started(port, LONG | {"stream": stream, "n": 6})
    while ask(port, "/health").json != {"status": "ok", "running": 4, "waiting": 2}:
        time.sleep(0.01)
    if stream:
        assert connection.getresponse().read(9) == b'data: {"i'
    assert connection.sock is not None
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    assert quiet(port)


def test_too_many_texts_and_too_long_ones(folder: Path) -> None:
    with serving(folder, name="m", texts=1, waiting=1, length=40) as port:
        for body in (TEXT | {"max_tokens": 50}, TEXT | {"n": 3}, TEXT | {"prompt": ["a"] * 3}):
            check_refusal(ask(port, TEXTS, body), 400)
        assert ask(port, TEXTS, TEXT | {"max_tokens": 30}).status == 200
    with serving(folder, name="m", texts=1, waiting=1) as port:
        held = [started(port, LONG | {"stream": stream}) for stream in (True, False)]
        while ask(port, "/health").json["waiting"] < 1:
            time.sleep(0.01)
        check_refusal(answer := ask(port, TEXTS, TEXT), 429)
        assert answer.headers["retry-after"] == "1"
        for connection in held:
            connection.close()
        assert quiet(port) and ask(port, TEXTS, TEXT).status == 200


def test_requests_that_take_too_long(folder: Path) -> None:
    """A stream ends with the error, a whole answer is one; both free their places."""
    with serving(folder, name="m", texts=2, timeout=0.6) as port:
        streamed = ask(port, TEXTS, LONG | {"stream": True}).body.split(b"\n\n")
        assert json.loads(streamed[-2][6:])["error"]["code"] == "timeout" and len(streamed) > 3
        check_refusal(answer := ask(port, TEXTS, LONG), 503)
        assert answer.json["error"]["code"] == "timeout"
        assert quiet(port) and ask(port, TEXTS, TEXT).status == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """Its request ends after the time limit, as the transport never takes its answer."""
    monkeypatch.setattr(module, "SLOWEST_READER", 0.2)
    options = ServeOptions(folder, name="m", texts=1, timeout=0.1)
    api = module.Api(*module.prepared(options, Laptop()), options, "", local=False)
    body = [{"type": "http.request", "body": json.dumps(TEXT | {"stream": stream}).encode()}]

    async def receive() -> Json:
        return body.pop() if body else await asyncio.Event().wait() or {}

    async def send(_: Any) -> None:
        await asyncio.Event().wait()

    asked = {"type": "http", "method": "POST", "path": TEXTS, "headers": [], "query_string": b""}
    asyncio.run(asyncio.wait_for(api(asked, receive, send), 30))
    api.batcher.close()
    api.batcher.thread.join()
    assert api.batcher.counts == (0, 0)


def test_an_error_of_the_model_is_an_answer(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmpy.errors import LlmpyError
    from llmpy.generate import generation

    def choose(*_: Any) -> int:
        raise LlmpyError("model.not-finite", "the output is not finite")

    with monkeypatch.context() as patch:
        patch.setattr(generation, "choose", choose)
        check_refusal(answer := ask(port, TEXTS, TEXT), 500)
        assert answer.json["error"]["code"] == "model.not-finite"
        streamed = ask(port, CHATS, CHAT | {"stream": True})
        assert json.loads(streamed.body.split(b"\n\n")[-2][6:])["error"]["code"] == "model.not-finite"
    assert quiet(port) and ask(port, TEXTS, TEXT).status == 200


def test_a_model_without_a_template(tmp_path: Path) -> None:
    with serving(chat_model(tmp_path, None), name="m") as port:
        check_refusal(answer := ask(port, CHATS, CHAT), 400)
        assert answer.json["error"]["code"] == "no_chat_template" and TEXTS in answer.json["error"]["message"]
        assert ask(port, TEXTS, TEXT).status == 200


def test_a_port_in_use_and_missing_packages(port: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused("serve.no-port", port, "--port"):
        module.serve(ServeOptions(folder, port=port), print, Laptop())
    with refused("option.invalid", "--length", REACH):
        module.serve(ServeOptions(folder, port=0, length=REACH + 1), print, Laptop())
    with refused("serve.no-port", "no.such.host.invalid", "--host"):
        module.serve(ServeOptions(folder, host="no.such.host.invalid"), print, Laptop())
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else object())
    with refused("package.missing", "uvicorn", "[serve]"):
        module.serve(ServeOptions(folder), print, Laptop())


PROGRAM = """
import sys
from llmpy.cli import main as cli
from llmpy.serve import openai_server as module
from support.laptop import Laptop
true = module.serve
module.serve = lambda options, log: true(options, log, Laptop())
sys.exit(cli.main(["serve", *sys.argv[1:]]))
"""


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_sigterm_finishes_what_streams(folder: Path) -> None:
    """Texts that end within --grace are whole, others end with an error."""
    words = [sys.executable, "-c", PROGRAM, str(folder), "--name", "m", "--port", "0", "--grace", "1.5"]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert process.stdout is not None
    port = int(process.stdout.readline().partition("/v1")[0].rpartition(":")[2])
    held = [started(port, LONG | {"stream": True, "max_tokens": count}) for count in (20, 1_000_000)]
    answers = [connection.getresponse() for connection in held]
    first = [answer.read(100) for answer in answers]
    process.send_signal(signal.SIGTERM)
    short, long = (a + b.read() for a, b in zip(first, answers, strict=True))
    for opened in (*answers, *held):
        opened.close()
    assert short.endswith(b"data: [DONE]\n\n")
    assert json.loads(long.split(b"\n\n")[-2][6:])["error"]["code"] == "serve.closing"
    out, errors = process.communicate(timeout=20)
    assert (out, errors.splitlines()[1:], process.returncode) == ("", ["compiling nothing"], 0)  # after a note
