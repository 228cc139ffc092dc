"""Two thousand requests of 32 clients, a tenth cut off, a tenth malformed: none harms the others or the server."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.chats import talk
from support.serving import ask, chat_model

pytest.importorskip("uvicorn")
TEXTS, CHATS = "/v1/completions", "/v1/chat/completions"
CLIENTS, REQUESTS = 32, 2000
MALFORMED = (
    b"", b"{", json.dumps({"model": "m", "messages": talk("Hi")}).encode()[:-5], b"[" * 90_000, b'{"a":' * 90_000,
    b'{"model": "m", "messages": {"role": 1}}', b'{"model": 7}', b'{"model": "gpt-4", "messages": []}',
    b'{"model": "m", "messages": [{"role": "user", "content": "' + b"word " * 2_000_000 + b'"}]}',
    b'{"model": "m", "messages": [{"role": "user", "content": "' + b"x" * 1_000_000 + b'"}]}', b"\xff" * 1000,
    b'{"model": "m", "messages": [{"role": "user", "content": "Hi"}], "temperature": "hot", "n": [1]}',
)  # fmt: skip


async def exchange(port: int, path: str, data: bytes, leave: float | None) -> tuple[int, bytes]:
    """Return status and body; with `leave`, close after so many seconds and return (0, b"")."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        if leave is not None:
            await asyncio.sleep(leave)
            return 0, b""
        await writer.drain()
        answer = await asyncio.wait_for(reader.read(), 120)
        return int(answer.split(None, 2)[1]), answer.partition(b"\r\n\r\n")[2]
    finally:
        writer.transport.abort()


def body(rng: random.Random) -> dict[str, Any]:
    more: dict[str, Any] = {"max_tokens": rng.randrange(1, 60), "seed": rng.randrange(9), "stream": rng.random() < 0.5}
    more |= rng.choice([{}, {"n": 2}, {"logprobs": True}, {"temperature": 0.5, "top_p": 0.9}, {"stop": ["a"]}])
    return {"model": "m", "messages": talk("What is " + "2 + " * rng.randrange(9)), **more}


async def client(port: int, seed: int, count: int, seen: Counter[str], answers: dict[str, set[str]]) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        kind, asked = rng.random(), body(rng)
        if kind < 0.1:
            status, _ = await exchange(port, rng.choice([TEXTS, CHATS]), rng.choice(MALFORMED), None)
            assert status in (400, 404, 413)
            seen["malformed"] += 1
            continue
        status, answer = await exchange(
            port, CHATS, json.dumps(asked).encode(), rng.uniform(0, 0.2) if kind < 0.2 else None
        )
        if status == 0:
            seen["cut off"] += 1
            continue
        assert status in (200, 429), answer
        seen[str(status)] += 1
        if status == 429:
            await asyncio.sleep(0.05)
        elif asked["stream"]:
            assert answer.rstrip().endswith((b"[DONE]", b"0")), answer[-300:]
        else:
            found = [choice["message"]["content"] for choice in json.loads(answer)["choices"]]
            answers.setdefault(json.dumps(asked), set()).add(json.dumps(found))


async def load(port: int, requests: int, seed: int) -> tuple[Counter[str], dict[str, set[str]]]:
    seen: Counter[str] = Counter()
    answers: dict[str, set[str]] = {}
    await asyncio.gather(
        *(client(port, seed + i, requests // CLIENTS + (i < requests % CLIENTS), seen, answers) for i in range(CLIENTS))
    )
    return seen, answers


@pytest.mark.long
def test_two_thousand_requests(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "llmpy", "serve", str(chat_model(tmp_path)), "--name", "m", "--port", "0"]
    words += ["--texts", "6", "--waiting", "24"]
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", env=os.environ)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().partition("/v1")[0].rpartition(":")[2])
        server = psutil.Process(process.pid)
        asyncio.run(load(port, 600, 1000))  # caches and allocators grow to their size
        before = settled(server, port)
        start = time.perf_counter()
        seen, answers = asyncio.run(load(port, REQUESTS, 1))
        took = time.perf_counter() - start
        after = settled(server, port)
        assert sum(seen.values()) == REQUESTS and min(seen["malformed"], seen["cut off"]) > REQUESTS / 20
        assert all(len(found) == 1 for found in answers.values())  # the same request has the same text
        assert ask(port, "/health").json == {"status": "ok", "running": 0, "waiting": 0}
        print(f"{dict(seen)} in {took:.0f} s; memory {before / 1e6:.0f} MB before, {after / 1e6:.0f} MB after")
        assert after < before + 30e6
        assert server.num_threads() < 60 and server.num_fds() < 60
    finally:
        process.terminate()
        assert process.communicate(timeout=60) == ("", None) and process.returncode == 0
    assert "Traceback" not in (tmp_path / "errors").read_text()


def settled(server: psutil.Process, port: int) -> int:
    """Wait until the server is idle; return its memory."""
    for _ in range(600):
        found = ask(port, "/health").json
        if (found["running"], found["waiting"]) == (0, 0):
            break
        time.sleep(0.1)
    time.sleep(1)
    return int(server.memory_info().rss)
