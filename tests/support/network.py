"""A network of one server in this process, with small things under the names and addresses of the real ones."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import threading
from collections.abc import Iterator
from typing import Any

import pytest


@contextlib.contextmanager
def network(files: dict[str, bytes], patch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """Serve path → content until the end, as the hub and to `stands_for`; its address and the paths asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            content = files.get(self.path)
            self.send_response(200 if content is not None else 404)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content or b"")

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        here = f"http://127.0.0.1:{server.server_address[1]}"
        patch.setenv("HF_ENDPOINT", here + "/")
        patch.setenv("no_proxy", "*")
        try:
            yield here, asked
        finally:
            server.shutdown()
            thread.join()


def stands_for(patch: pytest.MonkeyPatch, module: Any, name: str, address: str, content: bytes) -> None:
    """Have a download that `module` knows by address, size and sha256 be this one instead."""
    sha256 = hashlib.sha256(content).hexdigest()
    for what, value in (("", address), ("_RANKS", address), ("_BYTES", len(content)), ("_SHA256", sha256)):
        if hasattr(module, name + what):
            patch.setattr(module, name + what, value)
