"""`llmpy watch`: a page of this machine, for this machine.

It listens on 127.0.0.1 alone and answers a few fixed addresses: the page, its parts, and its numbers as JSON. A request
that names another host is refused, for a name that points to 127.0.0.1 would let any web page read the answers (DNS
rebinding). The page runs its own scripts and no others, and loads nothing from elsewhere: what a run folder holds stays
text.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import urllib.parse
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from ..errors import LlmpyError
from ..options.options import AXES, CURVES, WatchOptions
from ..version import __version__
from .curves import LARGEST_STEP
from .figure import COLOURS, CONFIG, figure, need
from .runs import Runs

ADDRESS = "127.0.0.1"
HOSTS = ("127.0.0.1", "localhost", "[::1]")  # with any port: ssh may forward another
PORTS = 100  # that are tried from the first one on
STALLED_SECONDS = 60.0
HTML, CSS, SCRIPT = "text/html", "text/css", "text/javascript"
FILES = {"/": ("page.html", HTML), "/page.css": ("page.css", CSS), "/page.js": ("page.js", SCRIPT)}
# plotly sets styles of its own elements; without a source of images or fonts they give nothing away.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@cache
def plotly_script() -> bytes:
    """plotly's JavaScript, as its package holds it."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()).encode()


@dataclass(frozen=True)
class Question:
    """What a page asks for."""

    show: frozenset[str] | None  # names of runs; None: as `Runs.chosen`
    have: str  # of the answer that it has
    axis: str
    over: float | None  # steps to average over
    log: bool
    columns: int

    @classmethod
    def of(cls, query: str) -> Self:
        """Raises ValueError for one that makes no sense."""
        asked = urllib.parse.parse_qs(query, keep_blank_values=True, max_num_fields=1000)
        first = {name: values[0] for name, values in asked.items()}
        show = frozenset(asked["show"]) if "show" in asked else None
        over = float(first["over"]) if first.get("over") else None
        axis, columns = first.get("axis", AXES[0]), int(first.get("columns", 2))
        if axis not in AXES or not 1 <= columns <= 6 or not (over is None or 0 <= over < LARGEST_STEP):
            raise ValueError
        return cls(show, first.get("have", ""), axis, over, "log" in asked, columns)


def board(runs: Runs, asked: Question) -> dict[str, Any]:
    """All that the page shows, as JSON: a row for every run, and of those shown the samples and plotly's figure.

    There are neither if nothing has changed since the answer that the page has.
    """
    found = runs.all()
    shown = runs.chosen(found) if asked.show is None else [name for name in found if name in asked.show]
    colours = {name: COLOURS[run.index % len(COLOURS)] for name, run in found.items()}
    rows = [
        {"name": name, "colour": colours[name], "described": run.described(), "trains": run.trains(), **run.numbers()}
        for name, run in found.items()
    ]
    state = [(name, found[name].state()) for name in shown]
    answer = {"runs": rows, "shown": shown, "have": f"{hash((replace(asked, show=None, have=''), *state)):x}"}
    if answer["have"] != asked.have:
        curves = {name: found[name].curves() for name in shown}
        drawn = figure(curves, tuple(CURVES), asked.axis, asked.over, asked.log, asked.columns, colours)
        samples = [{"name": name, **sample} for name in shown for sample in found[name].samples()]
        answer |= {"figure": drawn.to_json(), "config": CONFIG, "samples": samples}
    return answer


class Page(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = f"llmpy/{__version__}", ""
    timeout = STALLED_SECONDS

    def do_GET(self) -> None:
        """Answer."""
        host = self.headers.get("Host", "")
        path, _, query = self.path.partition("?")
        if host.rpartition(":")[0] not in HOSTS and host not in HOSTS:
            self._answer(403, "text/plain", b"llmpy watch answers to localhost and 127.0.0.1 alone\n")
        elif path in FILES:
            name, kind = FILES[path]
            self._answer(200, kind, (Path(__file__).parent / name).read_bytes())
        elif path == "/plotly.js":
            self._answer(200, SCRIPT, plotly_script(), "max-age=86400")
        elif path == "/board":
            try:
                asked = Question.of(query)
            except ValueError:
                self._answer(400, "text/plain", b"invalid question\n")
                return
            found = json.dumps(board(self.server.runs, asked), allow_nan=False)
            self._answer(200, "application/json", found.encode())
        else:
            self._answer(404, "text/plain", b"there is nothing but /\n")

    do_HEAD = do_GET

    def _answer(self, code: int, kind: str, body: bytes, keep: str = "no-store") -> None:
        self.send_response(code)
        for name, value in (
            ("Content-Type", f"{kind}; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", POLICY),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", keep),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing: the terminal shows the address and no request a second."""


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
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
        else:
            raise LlmpyError(f"no port from {port} on is free", "choose another with --port")
        self.address = f"http://{ADDRESS}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a page that was closed in the middle of an answer; report any other error."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def watch(options: WatchOptions, say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C. Raises LlmpyError if there is no such run, no free port, or plotly is missing."""
    need("plotly", "the page")
    runs = Runs(options.runs or ())
    with Server(runs, options.port) as server:
        say(f"{server.address}  (Ctrl-C ends it; the runs go on)")
        if options.open:
            # A browser that runs in this terminal returns only at its end, and needs answers until then.
            threading.Thread(target=webbrowser.open, args=(server.address,), daemon=True).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("")
