"""Downloads of GPT-2 against a local server that answers as the hub does."""

from __future__ import annotations

import hashlib
import sys
import threading
import types
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from laptop import TINY
from samples import in_memory, same, with_tokenizer

from llmpy import formats
from llmpy.cache import user_cache
from llmpy.errors import LlmpyError
from llmpy.formats import hub, huggingface, open_model


class Hub(BaseHTTPRequestHandler):
    """HEAD of large files: a redirection that carries the promise; of small ones: 200."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        name = self.path.rpartition("/")[2]
        if not self.path.startswith("/openai-community/gpt2/resolve/main/"):
            self.send_error(404)
            return
        content = (self.folder / name).read_bytes()
        if name.endswith(".safetensors"):
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("X-Linked-ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        else:
            self.send_response(200)
            self.send_header("ETag", '"abc"')
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    huggingface.write_model(tmp_path / "served", with_tokenizer(in_memory(), tmp_path / "t.json"), "float32")
    handler = type("Handler", (Hub,), {"folder": tmp_path / "served", "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}/")
        monkeypatch.setenv("LLMPY_CACHE_DIR", str(tmp_path / "cache"))
        yield handler
        server.shutdown()


Fetched = list[tuple[str, int | None, str | None]]


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fetched:
    """What was asked of `fetch`, which here copies."""
    calls: Fetched = []

    def fetch(
        url: str, path: Path, *, size: int | None = None, sha256: str | None = None, say: Callable[[str], None]
    ) -> Path:
        calls.append((url.rpartition("/")[2], size, sha256))
        path.write_bytes((tmp_path / "served" / path.name).read_bytes())
        return path

    module = types.ModuleType("llmpy.download")
    module.fetch = fetch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llmpy.download", module)
    return calls


def test_a_model_of_the_hub(server: type[Hub], fetched: Fetched, tmp_path: Path) -> None:
    source = formats.resolve("gpt2", print)
    assert same(source, in_memory())
    assert source.tokenizer is not None
    weights = (tmp_path / "served" / "model.safetensors").read_bytes()
    assert fetched == [
        ("config.json", None, None),
        ("tokenizer.json", None, None),
        ("model.safetensors", len(weights), hashlib.sha256(weights).hexdigest()),
    ]
    assert user_cache() / "models" / "gpt2" == source.path
    asked = len(server.asked)
    assert same(formats.resolve("gpt2", print), source)
    assert len(server.asked) == asked  # what is there needs no network
    assert len(fetched) == 3


def test_a_download_that_broke_off_goes_on(server: type[Hub], fetched: Fetched) -> None:
    folder = hub.download("gpt2", print)
    (folder / "model.safetensors").unlink()
    fetched.clear()
    hub.download("gpt2", print)
    assert [name for name, *_ in fetched] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [(None, "the server answers 404"), ("http://127.0.0.1:9", "cannot reach"), ("nonsense", "cannot reach nonsense")],
)
def test_faults_of_the_network(
    server: type[Hub], fetched: Fetched, monkeypatch: pytest.MonkeyPatch, endpoint: str | None, said: str
) -> None:
    if endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(LlmpyError, match=f"{said}.*give its path to --init"):
        hub.download("gpt2-xl", print)
    assert fetched == []


def test_no_such_model() -> None:
    with pytest.raises(LlmpyError, match="no model gpt3 — use gpt2, "):
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
