"""`llmpy watch`: a page of this machine, for this machine.

It listens on 127.0.0.1 alone and answers three addresses: the page, its numbers as JSON, an empty icon. A request that
names another host is refused, for a name that points to 127.0.0.1 would let any web page read the answers (DNS
rebinding). The page may run its own script, known by its hash, and nothing else: what a run folder holds stays text.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import math
import os
import sys
import threading
import urllib.parse
import webbrowser
from collections.abc import Callable
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ..errors import LlmpyError
from ..options.watch import WatchOptions
from ..version import __version__
from .curves import CLOCKS, LARGEST_STEP
from .runs import Runs, board

ADDRESS = "127.0.0.1"
HOSTS = ("127.0.0.1", "localhost", "[::1]")  # with any port: ssh may forward another
PORTS = 100  # that are tried from the first one on
READ_SECONDS = 0.2  # of each run before an answer; what is left comes with the next ones
STALLED_SECONDS = 60.0
DATA_MARK = "<!-- data -->"


@cache
def parts() -> tuple[str, str, str]:
    """The page's markup, style and script."""
    here = Path(__file__).parent
    markup, style, *scripts = (
        (here / name).read_text("utf-8") for name in ("page.html", "page.css", "chart.js", "page.js")
    )
    return markup, style, "\n".join(scripts)


def policy() -> str:
    """The Content-Security-Policy: the page's own style and script by their hashes, numbers from here, nothing else."""
    _, style, script = parts()
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (script, style)
    ]
    return (
        f"default-src 'none'; script-src {hashes[0]}; style-src {hashes[1]}; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'"
    )


def page(data: dict[str, Any] | None = None) -> str:
    """The whole page in one text; with `data`, as `board` gives it, one that asks no server."""
    markup, style, script = parts()
    held = ""
    if data is not None:
        # A browser ends the element at the first "</script", whatever its type: no "<" is left in it.
        text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
        held = f'<script type="application/json" id="data">{text}</script>'
    for mark, text in (("POLICY", policy()), ("/* style */", style), ("/* script */", script), (DATA_MARK, held)):
        markup = markup.replace(mark, text, 1)
    return markup


class Page(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = f"llmpy/{__version__}", ""
    timeout = STALLED_SECONDS

    def do_GET(self) -> None:
        """Answer."""
        host = self.headers.get("Host", "")
        if host.rpartition(":")[0] not in HOSTS and host not in HOSTS:
            self._answer(403, "text/plain", "llmpy watch answers to localhost and 127.0.0.1 alone\n")
            return
        path, _, query = self.path.partition("?")
        if path == "/":
            self._answer(200, "text/html", page())
        elif path == "/board":
            self._board(query)
        elif path == "/favicon.ico":
            self._answer(204, "image/x-icon", "")
        else:
            self._answer(404, "text/plain", "there is nothing but /\n")

    do_HEAD = do_GET

    def _board(self, query: str) -> None:
        try:
            asked = urllib.parse.parse_qs(query, keep_blank_values=True, max_num_fields=1000)
            first, last, over = (number(asked, name) for name in ("first", "last", "over"))
            axis = asked.get("axis", ["step"])[0]
            if axis not in ("step", *CLOCKS):
                raise ValueError
        except ValueError:
            self._answer(400, "text/plain", "no such question\n")
            return
        show, have = asked.get("show"), asked.get("have", [])
        found = board(
            self.server.runs, show, dict(zip(show or (), have, strict=False)), -math.inf if first is None else first,
            math.inf if last is None else last, over, seconds=READ_SECONDS, axis=axis,
        )  # fmt: skip
        self._answer(200, "application/json", json.dumps(found, allow_nan=False))

    def _answer(self, code: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(code)
        for name, value in (
            ("Content-Type", f"{kind}; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", policy() + "; frame-ancestors 'none'"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: the terminal shows the address and no request a second."""


def number(asked: dict[str, list[str]], name: str) -> float | None:
    """A number of the question, if it is there. Raises ValueError for one that lies on no axis."""
    value = float(asked[name][0]) if name in asked else None
    if value is not None and not 0 <= value <= LARGEST_STEP:
        raise ValueError
    return value


class Server(ThreadingHTTPServer):
    """Answers about some runs until it is shut down; `address` is what to open."""

    daemon_threads = True
    allow_reuse_address = os.name == "posix"  # a port just left is free; on Windows it would share one in use

    def __init__(self, runs: Runs, port: int) -> None:
        """On `port` or the next free one. Raises LlmpyError if there is none."""
        self.runs = runs
        for candidate in range(port, min(port + PORTS, 1 << 16)):
            try:
                super().__init__((ADDRESS, candidate), Page)
                break
            except OSError as fault:
                if fault.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
        else:
            raise LlmpyError(f"no port from {port} on is free", "choose another with --port")
        self.address = f"http://{ADDRESS}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that was closed in the middle of an answer is no fault; any other is told as ever."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def watch(options: WatchOptions, say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C. Raises LlmpyError if there is no such run, or no free port."""
    runs = Runs(options.runs or ())
    with Server(runs, options.port) as server:
        say(f"{server.address}  (Ctrl-C ends it; the runs go on)")
        if options.open:
            # One that runs in this terminal returns only at its end, and needs answers until then.
            threading.Thread(target=webbrowser.open, args=(server.address,), daemon=True).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("")
