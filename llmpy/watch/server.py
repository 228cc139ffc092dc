"""`llmpy watch`: a local web page with the curves of runs.

The server listens only on 127.0.0.1 and serves a few fixed paths: the page, its files, and its numbers as JSON.
Requests for another host name are refused, since any web page could read the answers through a name that resolves to
127.0.0.1 (DNS rebinding); so are requests by other sites' pages. The page runs only its own scripts and loads nothing
else; run folders are shown as text.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
import urllib.parse
import webbrowser
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ..errors import LlmpyError
from ..options.watch import AXES, CURVES, WatchOptions
from ..system.loopback import foreign_host, foreign_site
from ..version import __version__
from .figure import COLOURS, CONFIG, figure, need
from .runs import Runs

ADDRESS = "127.0.0.1"
PORTS = 100  # tried in order
LEAST_SECONDS, SHARE = 1.0, 0.1  # between answers; of a core for answers
SCRIPT = "text/javascript"
FILES = {"/": ("page.html", "text/html"), "/page.css": ("page.css", "text/css"), "/page.js": ("page.js", SCRIPT)}
# plotly needs inline styles; they cannot send data anywhere without a source of images or fonts.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "connect-src 'self'; img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
NUMBER = re.compile("[0-9]{1,12}")


def board(runs: Runs, query: str) -> dict[str, Any]:
    """Return the page's data for JSON: a row for every run, the samples and the plotly figure of those to `show`.

    Samples and figure are omitted if unchanged since the answer `have`. Missing or invalid fields of the query get
    their defaults. `wait`: seconds until the next request, so that training keeps the cores.
    """
    start = time.thread_time()
    asked = urllib.parse.parse_qs(query, keep_blank_values=True)
    axis, over, columns = (asked.get(name, [""])[0] for name in ("axis", "over", "columns"))
    view = (
        axis if axis in AXES else "steps", int(over) if NUMBER.fullmatch(over) else None, "log" in asked,
        min(3, max(1, int(columns))) if NUMBER.fullmatch(columns) else 2,
    )  # fmt: skip
    found = runs.all()
    shown = [name for name in found if name in asked["show"]] if "show" in asked else runs.chosen(found)
    colours = {name: COLOURS[run.index % len(COLOURS)] for name, run in found.items()}
    rows = [
        {"name": name, "colour": colours[name], "described": run.described(), "trains": run.trains(), **run.numbers()}
        for name, run in found.items()
    ]
    have = f"{hash((view, *((name, found[name].state()) for name in shown))):x}"
    answer = {"runs": rows, "shown": shown, "have": have}
    if asked.get("have") != [have]:
        drawn = figure({name: found[name].curves() for name in shown}, tuple(CURVES), *view, colours)
        samples = [{"name": name, **sample} for name in shown for sample in found[name].samples()]
        answer |= {"figure": drawn.to_json(), "config": CONFIG, "samples": samples}
    return answer | {"wait": max(LEAST_SECONDS, (time.thread_time() - start) / SHARE)}


class Page(BaseHTTPRequestHandler):
    """The handler of a connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = f"llmpy/{__version__}", ""
    timeout = 60.0  # seconds without data

    def do_GET(self) -> None:
        host = self.headers.get("Host", "")
        path, _, query = self.path.partition("?")
        foreign = foreign_site(self.headers.get("Sec-Fetch-Site", "none"))
        foreign = foreign and (path != "/" or self.headers.get("Sec-Fetch-Dest") != "document")  # a link to the page
        if foreign or foreign_host(host):
            self._answer(403, "text/plain", b"llmpy watch only serves localhost and 127.0.0.1, and no other site\n")
        elif path in FILES:
            name, kind = FILES[path]
            self._answer(200, kind, (Path(__file__).parent / name).read_bytes())
        elif path == "/plotly.js":
            from plotly.offline import get_plotlyjs

            self._answer(200, SCRIPT, get_plotlyjs().encode(), "max-age=86400")
        elif path == "/board":
            self._answer(200, "application/json", json.dumps(board(self.server.runs, query), allow_nan=False).encode())
        else:
            self._answer(404, "text/plain", b"not found; the page is at /\n")

    def _answer(self, code: int, kind: str, body: bytes, cache: str = "no-store") -> None:
        self.send_response(code)
        own = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body)), "Cache-Control": cache}
        for name, value in (HEADERS | own).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing: requests come every second."""


class Server(ThreadingHTTPServer):
    """A server for some runs; `address` is the URL of the page."""

    daemon_threads = True
    allow_reuse_address = os.name == "posix"  # reuse a port just closed; Windows would share a port in use

    def __init__(self, runs: Runs, port: int) -> None:
        """Listen on `port` or the next free one. Raises LlmpyError if there is none."""
        self.runs = runs
        for candidate in range(port, min(port + PORTS, 1 << 16)):
            with contextlib.suppress(OSError):
                super().__init__((ADDRESS, candidate), Page)
                break
        else:
            raise LlmpyError("watch.no-port", f"no free port from {port}", "Choose another one: --port")
        self.address = f"http://{ADDRESS}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report an error, unless the page closed the connection."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def watch(options: WatchOptions, log: Callable[[str], None]) -> None:
    """Serve until Ctrl-C. Raises LlmpyError if a run, a free port or plotly is missing."""
    need("plotly", "the page")
    runs = Runs(options.runs or ())
    with Server(runs, options.port) as server:
        log(f"{server.address}  (Ctrl-C stops the page, not the runs)")
        if options.open:
            threading.Thread(target=webbrowser.open, args=(server.address,), daemon=True).start()
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
        log("")
