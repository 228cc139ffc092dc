"""A server of a small model with a chat template, and requests to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.chats import TEMPLATES, write
from support.laptop import TINY, Laptop
from support.samples import in_memory

from llmpy.formats import huggingface
from llmpy.options.serve import ServeOptions

REACH = 96
KEY = "a-key"


def chat_model(folder: Path, template: str | None = "calls") -> Path:
    """Write a random model of 96 tokens with a tokenizer and a chat template; return its folder."""
    huggingface.write_model(folder, in_memory(replace(TINY, vocab_size=400, context=REACH)), "float32")
    make, source, end = TEMPLATES[template or "calls"]
    write(folder, make, source if template else None, ends=["<|endoftext|>", end])
    return folder


@contextlib.contextmanager
def serving(folder: Path, **options: Any) -> Iterator[int]:
    """Serve a model in a thread, computed by the reference; give the port."""
    uvicorn = pytest.importorskip("uvicorn")
    from llmpy.serve.openai_server import serve

    servers: list[Any] = []
    ready = threading.Event()
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        ready.set()

    def run() -> None:
        with pytest.MonkeyPatch.context() as patch:
            true = uvicorn.Server.run
            patch.setattr(uvicorn.Server, "run", lambda self, *a: (servers.append(self), true(self, *a)))
            serve(ServeOptions(folder, port=0, **options), log, Laptop())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(30)
        yield int(lines[0].partition("/v1")[0].rpartition(":")[2])
    finally:
        servers[0].should_exit = True
        thread.join()


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The objects of a stream, without the end."""
        *lines, last, empty = self.body.decode().split("\n\n")
        assert (last, empty) == ("data: [DONE]", "")
        return [json.loads(line.removeprefix("data: ")) for line in lines]


def ask(port: int, path: str, body: Any = None, method: str = "", **headers: str) -> Answer:
    """Send a request: a body of bytes, or an object as JSON."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Host": "localhost", **{name.replace("_", "-"): value for name, value in headers.items()}}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request(method or ("GET" if body is None else "POST"), path, data, sent)
        with connection.getresponse() as answer:
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
