"""Tokens per second of concurrent chats with `llmpy serve` against one: random weights, interleaved, a quiet machine.

python dev/serving.py                        GPT-2 124M, bfloat16, 1 and 8 chats of 128 tokens, streamed, three rounds
python dev/serving.py --chats 1 4 16 --whole --rounds 5 --prompt 400
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from llmpy import ModelConfig, Tokenizer
from llmpy.backend.reference import Reference
from llmpy.model.families import language_model
from llmpy.model.initialise import initialise
from llmpy.run import checkpoint

TEMPLATE = """{% for m in messages %}{{ m.role + ": " + m.content + "\\n" }}{% endfor %}
{% if add_generation_prompt %}{{ "assistant: " }}{% endif %}"""
PRINTABLE = [chr(i) for i in range(33, 127)]


def tokenizer(folder: Path, size: int = 50_257) -> Tokenizer:
    """Return a tokenizer of this many tokens, as many as GPT-2's: bytes, then pairs and triples of ASCII."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in PRINTABLE for b in PRINTABLE]
    merges = [*pairs, *((a + b, c) for a, b in pairs for c in PRINTABLE)][: size - len(letters) - 1]
    vocabulary = {token: i for i, token in enumerate([*letters, *(a + b for a, b in merges)])}
    library = Library(models.BPE(vocabulary, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    library.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    return Tokenizer.load(folder)


def chat(port: int, body: dict[str, Any]) -> bytes:
    """Send a request; return the answer as it comes, without parsing it: the client has no core of its own."""
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(data)}"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + data)
        parts = []
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def rate(port: int, chats: int, body: dict[str, Any]) -> float:
    """Return the tokens per second of this many chats at the same time."""
    answers: list[bytes] = []
    threads = [
        threading.Thread(target=lambda seed: answers.append(chat(port, body | {"seed": seed})), args=[1 + i])
        for i in range(chats)
    ]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - start
    tokens = sum(int(answer.rpartition(b'"completion_tokens": ')[2].partition(b",")[0]) for answer in answers)
    assert len(answers) == chats and tokens, answers
    return tokens / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2", help="a size of llmpy train")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--chats", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=20, help="words of the question")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="answers at once, not streamed")
    parser.add_argument(
        "--set", default="{}", help='parameters of the requests, e.g. {"temperature": 0.7, "top_p": 0.9}'
    )
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer").mkdir()
        tokenizer(Path(folder, "tokenizer")).save(Path(folder, "tokenizer.json"))
        config = ModelConfig.from_dial(o.model)
        model = language_model(config, Reference(dtype=np.float32))  # compiles nothing
        initialise(model.params, config)
        checkpoint.save(Path(folder, "model.safetensors"), model, config.context)
        del model
        words = [sys.executable, "-m", "llmpy", "serve", folder, "--name", "m", "--port", "0"]
        words += ["--dtype", o.dtype, "--texts", str(max(o.chats)), "--length", "1024"]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, encoding="utf-8")
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().partition("/v1")[0].rpartition(":")[2])
            question = [{"role": "user", "content": " ".join(["word"] * o.prompt)}]
            body = {"model": "m", "messages": question, "max_tokens": o.tokens, **json.loads(o.set)}
            body |= {} if o.whole else {"stream": True, "stream_options": {"include_usage": True}}
            rate(port, max(o.chats), body | {"max_tokens": 8})
            rates: dict[int, list[float]] = {chats: [] for chats in o.chats}
            for _ in range(o.rounds):
                for chats in o.chats:
                    rates[chats].append(rate(port, chats, body))
            memory = psutil.Process(process.pid).memory_info().rss / 1e6
        finally:
            process.terminate()
            process.wait()
    one = statistics.median(rates[o.chats[0]])
    for chats, found in rates.items():
        middle = statistics.median(found)
        print(f"{chats:3} chats  {middle:7.1f} tokens/s  {middle / one:5.2f} x  " + " ".join(f"{r:.0f}" for r in found))
    print(f"memory {memory:,.0f} MB")


if __name__ == "__main__":
    main()
