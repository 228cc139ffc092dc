"""A local server with small files at the addresses of the real ones."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

COMMIT = 40 * "0"


@contextlib.contextmanager
def network(files: dict[str, bytes | int], cache: Path, patch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """Serve path → content or error status; yield the address and the requested paths.

    It also replaces the hub, and the hub's library downloads into `cache`. Paths with "cut" are sent truncated.
    """
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0]).replace(f"/{COMMIT}", "/main")
            if not path.startswith("/api/agent-"):  # requests of the library itself
                asked.append(path)
            content = files.get(path, 404)
            if "/tree/" in path:  # list the files of a hub folder
                start = path.removeprefix("/api").removeprefix("/models").replace("/tree/", "/resolve/") + "/"
                names = [name.partition("/main/")[2] for name in files if name.startswith(start)]
                entries = [{"type": "file", "path": name, "size": 1, "oid": ""} for name in names]
                content = json.dumps(entries).encode() if entries else 404
            status, body = (content, b"") if isinstance(content, int) else (200, content)
            self.send_response(status)
            self.send_header(
                "X-Error-Code", {403: "GatedRepo", 404: "EntryNotFound", 410: "RepoNotFound"}.get(status, "")
            )
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", hashlib.sha1(body).hexdigest())
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[:9] if "cut" in path else body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        here = f"http://127.0.0.1:{server.server_address[1]}"
        hub_is(here, cache, patch)
        try:
            yield here, asked
        finally:
            server.shutdown()
            thread.join()


def hub_is(address: str, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Point the hub's library to this address and `cache`; it reads the environment only when imported."""
    patch.setenv("HF_ENDPOINT", address + "/")
    patch.setenv("HF_HUB_CACHE", str(cache))
    patch.setenv("no_proxy", "*")
    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))


def stands_for(patch: pytest.MonkeyPatch, module: Any, name: str, address: str, content: bytes) -> None:
    """Replace the address, size and sha256 of a download in `module`."""
    sha256 = hashlib.sha256(content).hexdigest()
    for what, value in (("", address), ("_BYTES", len(content)), ("_SHA256", sha256)):
        if hasattr(module, name + what):
            patch.setattr(module, name + what, value)
