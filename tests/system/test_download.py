"""Downloads against a local server: the right bytes, or one clear error and nothing left."""

from __future__ import annotations

import errno
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from support.network import hub_is, network

from llmpy.errors import LlmpyError
from llmpy.system import download
from llmpy.system.download import fetch, from_hub, hub_files

DATA = bytes(range(256)) * 400
SHA = hashlib.sha256(DATA).hexdigest()
OF_HUB = "/datasets/a/b/resolve/main/c/d.parquet"


class Server(http.server.BaseHTTPRequestHandler):
    """Every file is DATA, or what its name says."""

    def do_GET(self) -> None:
        status = int(self.path[1:]) if self.path[1:].isdecimal() else 200
        self.send_response(status)
        if self.path == "/moved":
            self.send_header("Location", "/file")
        self.send_header("X-Error-Code", {403: "GatedRepo", 404: "EntryNotFound"}.get(status, ""))
        for name, value in (("ETag", "x"), ("X-Repo-Commit", 40 * "0"), ("Content-Length", str(len(DATA)))):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write({"/cut": DATA[:9], "/wrong": DATA[::-1]}.get(self.path, DATA))

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_file_is_downloaded_once(server: str, tmp_path: Path, said: list[str]) -> None:
    path = tmp_path / "cache" / "file"
    for wrong in (None, b"an old one"):
        if wrong:
            path.write_bytes(wrong)
        for _ in range(2):
            assert fetch(f"{server}/file", path, SHA, said.append) == path
        assert path.read_bytes() == DATA and [*path.parent.iterdir()] == [path]
    assert said == 2 * [f"downloading {server}/file"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("404", "Not Found — check the network"),
        ("503", "Service Unavailable"),
        ("cut", "IncompleteRead"),
        ("wrong", "is not the file expected: its sha256 differs"),
        ("nobody", "Connection refused"),
    ],
)
def test_a_file_that_does_not_come(server: str, tmp_path: Path, said: list[str], name: str, why: str) -> None:
    address = "http://127.0.0.1:9" if name == "nobody" else server
    with pytest.raises(LlmpyError, match=f"{address}/{name}.*{why}"):
        fetch(f"{address}/{name}", tmp_path / "file", SHA, said.append)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(server: str, tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(LlmpyError, match=r"cannot write .*x.*— free some space or choose another folder"):
        fetch(f"{server}/file", tmp_path / "x" / "file", SHA, said.append)


def test_a_file_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    files = {OF_HUB: DATA, "/datasets/a/b/resolve/main/c/README.md": b""}
    with network(files, tmp_path, monkeypatch) as (_, asked):
        assert hub_files("a/b", "c") == ["c/d.parquet"]
        with pytest.raises(LlmpyError, match="is not the file expected"):
            from_hub("a/b", "c/d.parquet", said.append, dataset=True, sha256=SHA[::-1])
        path = from_hub("a/b", "c/d.parquet", said.append, dataset=True, sha256=SHA)
        assert path.read_bytes() == DATA
        files.clear()
        asked.clear()
        assert from_hub("a/b", "c/d.parquet", said.append, dataset=True) == path
        assert asked == []
        with pytest.raises(LlmpyError, match=r"cannot download c/e of a/b: 404 .*— check the name"):
            from_hub("a/b", "c/e", said.append, dataset=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert from_hub("a/b", "c/d.parquet", said.append, dataset=True) == path
    with pytest.raises(LlmpyError, match=r"cannot download e of a/b: .*offline.*— check the network \(HF_HUB_OFF"):
        from_hub("a/b", "e", said.append)


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "log in"), (403, "log in"), (404, "check the name"), (500, "check the n")]
)
def test_a_hub_that_refuses(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], status: int, hint: str
) -> None:
    hub_is(server, tmp_path, monkeypatch)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server}/{status}")
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(LlmpyError, match=rf"cannot download x of a/b: .*— .*{hint}"):
        from_hub("a/b", "x", said.append)


def test_a_hub_that_is_cut_off_and_a_disk_that_is_full(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    hub_is(server, tmp_path, monkeypatch)
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server}/cut")
    with pytest.raises(LlmpyError, match="cannot download x of a/b: .*peer closed connection"):
        from_hub("a/b", "x", said.append)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(LlmpyError, match="No space left on device: .* — free some space, or set HF_HOME"):
        from_hub("a/b", "x", said.append)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 1000]


def test_the_address_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror/")
    assert download.hub() == "http://mirror"
