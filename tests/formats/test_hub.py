"""Downloads of GPT-2 against a local server that answers as the hub does."""

from __future__ import annotations

import hashlib
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.laptop import TINY
from support.samples import in_memory, same, with_tokenizer

from llmpy import formats
from llmpy.cli import main as cli
from llmpy.errors import LlmpyError
from llmpy.formats import hub, huggingface, open_model
from llmpy.system import download
from llmpy.system.cache import user_cache

WORDS = replace(TINY, vocab_size=257)  # as many as its tokenizer has


class Hub(BaseHTTPRequestHandler):
    """Small files at once; large ones by a redirection that promises size and hash."""

    folder: Path
    asked: list[str]
    lie = b""  # what comes instead of the end of a large file

    def do_GET(self) -> None:
        self.asked.append(self.path)
        place, _, name = self.path.rpartition("/")
        if place not in ("/openai-community/gpt2/resolve/main", "/elsewhere"):
            self.send_error(404)
            return
        content = (self.folder / name).read_bytes()
        if name.endswith(".safetensors") and place != "/elsewhere":
            self.send_response(302)
            self.send_header("Location", f"/elsewhere/{name}")
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("X-Linked-ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.end_headers()
            return
        if place == "/elsewhere" and self.lie:
            content = content[: -len(self.lie)] + self.lie
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    huggingface.write_model(tmp_path / "served", with_tokenizer(in_memory(WORDS), tmp_path / "t.json"), "float32")
    handler = type("Handler", (Hub,), {"folder": tmp_path / "served", "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}/")
        monkeypatch.setenv("LLMPY_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setattr(download, "PAUSE", 0.0)
        yield handler
        server.shutdown()


def test_a_model_of_the_hub(server: type[Hub]) -> None:
    source = formats.resolve("gpt2", print)
    assert same(source, in_memory(WORDS))
    assert source.tokenizer is not None
    assert user_cache() / "models" / "gpt2" == source.path
    asked = len(server.asked)
    assert same(formats.resolve("gpt2", print), source)
    assert len(server.asked) == asked  # what is there needs no network


def test_convert_takes_a_name_of_the_hub(server: type[Hub], tmp_path: Path) -> None:
    assert cli.main(["convert", "gpt2", str(tmp_path / "out" / "m.bin")]) == 0
    found = open_model(tmp_path / "out" / "m.bin")
    assert same(found, in_memory(WORDS))
    assert found.tokenizer == tmp_path / "out" / "m.tokenizer.json"


def test_convert_takes_what_the_user_has_by_that_name(
    server: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(hub.download("gpt2", print), "gpt2")
    server.asked.clear()
    for i, name in enumerate(("gpt2", "./gpt2")):
        assert cli.main(["convert", name, f"out/{i}.bin"]) == 0
        assert same(open_model(Path(f"out/{i}.bin")), in_memory(WORDS))
    assert server.asked == []


def test_only_what_is_missing_is_downloaded(server: type[Hub]) -> None:
    folder = hub.download("gpt2", print)
    (folder / "model.safetensors").unlink()
    server.asked.clear()
    hub.download("gpt2", print)
    assert [path.rpartition("/")[2] for path in server.asked] == 2 * ["model.safetensors"]


def test_bytes_that_are_not_the_hubs(server: type[Hub]) -> None:
    server.lie = b"?"
    with pytest.raises(LlmpyError, match="is not the file expected: sha256"):
        hub.download("gpt2", print)
    assert not (user_cache() / "models" / "gpt2" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        (None, "the server answers 404"),
        ("http://127.0.0.1:9", "cannot reach 127.0.0.1:9"),
        ("nonsense", "no address of a file"),
    ],
)
def test_faults_of_the_network(
    server: type[Hub], monkeypatch: pytest.MonkeyPatch, endpoint: str | None, said: str
) -> None:
    if endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(LlmpyError, match=f"no gpt2-xl: .*{said}.*give its path"):
        hub.download("gpt2-xl", print)


def test_no_such_model() -> None:
    with pytest.raises(LlmpyError, match=r"no model gpt3 — did you mean gpt2\? use gpt2, "):
        formats.resolve("gpt3", print)


def test_a_path_needs_no_hub(tmp_path: Path) -> None:
    huggingface.write_model(tmp_path / "gpt2", in_memory(), "float32")
    assert formats.resolve(str(tmp_path / "gpt2"), print).config == TINY
    assert open_model(tmp_path / "gpt2").config == TINY


def test_where_caches_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LLMPY_CACHE_DIR", raising=False)
    for platform, variable, value, expected in (
        ("linux", "XDG_CACHE_HOME", str(tmp_path), tmp_path / "llmpy"),
        ("darwin", "HOME", str(tmp_path), tmp_path / "Library/Caches/llmpy"),
        ("win32", "LOCALAPPDATA", str(tmp_path), tmp_path / "llmpy"),
    ):
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setenv(variable, value)
        if platform == "darwin":
            monkeypatch.setenv("USERPROFILE", value)
        assert user_cache() == expected
