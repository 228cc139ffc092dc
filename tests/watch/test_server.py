"""The server of `llmpy watch`: access and answers."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.browser import started
from support.refused import refused

from llmpy.watch.figure import POINTS
from llmpy.watch.runs import Runs
from llmpy.watch.server import PORTS, Server, board

pytest.importorskip("plotly")


def run_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    rows = [{"step": s, "loss": 10 / s, "lr": 1e-3, "ms": 500.0, "tokens_per_s": 2000.0} for s in range(1, 301)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    run_folder(tmp_path / "runs" / "a")
    (tmp_path / "secret").write_text("secret")
    with Server(Runs([tmp_path / "runs"]), 20_000 + os.getpid() % 20_000) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def ask(server: Server, path: str, host: str = "localhost", method: str = "GET", **headers: str) -> Answer:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)) as connection:
        connection.putrequest(method, path, skip_host=True)
        for name, value in {"Host": host, **headers}.items():
            connection.putheader(name, value)
        connection.endheaders()
        with connection.getresponse() as answer:
            return Answer(answer.status, dict(answer.getheaders()), answer.read())


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200), ("localhost:9999", 200), ("[::1]:80", 200), ("evil.example", 403), ("", 403),
        ("evil.example:8642", 403), ("localhost.evil.example", 403), ("127.0.0.1.evil.example:80", 403),
        ("evil.example:80@localhost:80", 403),
    ],
)  # fmt: skip
def test_other_hosts_are_refused(server: Server, host: str, status: int) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.address == f"http://127.0.0.1:{server.server_port}/"
    for path in ("/", "/page.js", "/plotly.js", "/board"):
        answer = ask(server, path, host)
        assert answer.status == status
        assert status == 200 or len(answer.body) < 100


@pytest.mark.parametrize(
    ("site", "status"),
    [("same-origin", 200), ("none", 200), ("cross-site", 403), ("same-site", 403), ("", 403), ("None", 403)],
)
def test_requests_of_other_sites_are_refused(server: Server, site: str, status: int) -> None:
    for path in ("/", "/page.js", "/board"):
        answer = ask(server, path, **{"Sec-Fetch-Site": site})
        assert answer.status == status and (status == 200 or len(answer.body) < 100)
    assert ask(server, "/board", "evil.example", **{"Sec-Fetch-Site": "same-origin"}).status == 403


@pytest.mark.parametrize("path", ["/metrics.jsonl", "/../secret", "/%2e%2e/secret", "//secret", "/server.py", "x"])
def test_no_path_leads_to_a_file(server: Server, path: str) -> None:
    answer = ask(server, path)
    assert answer.status in (400, 404)
    assert b"secret" not in answer.body


def test_only_names_of_found_runs_are_read(server: Server, tmp_path: Path) -> None:
    run_folder(tmp_path / "other")
    for name in ("../other", str(tmp_path / "other"), "%2e%2e/other", "", "a/../../other"):
        answer = json.loads(ask(server, f"/board?show={name}").body)
        assert answer["shown"] == [] and json.loads(answer["figure"])["data"] == []
    answer = json.loads(ask(server, "/board").body)
    assert answer["shown"] == [row["name"] for row in answer["runs"]] == [str(tmp_path / "runs" / "a")]
    assert json.loads(answer["figure"])["data"]


def view(runs: Runs, query: str) -> dict[str, Any]:
    return dict(json.loads(board(runs, query)["figure"]))


def test_the_query_selects_the_view(tmp_path: Path) -> None:
    runs = Runs([run_folder(tmp_path / "run")])
    plain = view(runs, "")
    assert [trace["mode"] for trace in plain["data"]] == ["lines"] * 5  # loss and tokens per second have averages
    assert view(runs, "axis=time")["layout"]["xaxis"]["title"]["text"] == "training time (minutes)"
    assert view(runs, "log=")["layout"]["yaxis"]["type"] == "log"
    assert len(view(runs, "over=0")["data"]) == 3
    assert view(runs, "columns=1")["layout"]["height"] > plain["layout"]["height"]
    for nonsense in ("axis=miles", "over=-1", "over=nan", "columns=x", "columns=", "&".join(["a=1"] * 2000)):
        assert view(runs, nonsense) == plain


def test_an_unchanged_figure_is_not_sent_again(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    runs = Runs([run])
    have = board(runs, "")["have"]
    assert "figure" not in board(runs, f"have={have}")
    for other in ("axis=tokens", "over=3", "log=", "columns=3", "show="):
        assert "figure" in board(runs, f"have={have}&{other}")
    for name, text in (("metrics.jsonl", '{"step": 999, "loss": 1}\n'), ("samples.txt", "--- step 9\nthe\n\n")):
        with (run / name).open("a") as file:
            file.write(text)
        answer = board(runs, f"have={have}")
        assert answer["have"] != have and "figure" in answer
        have = answer["have"]
    assert (answer["runs"][0]["step"], answer["samples"][0]["text"]) == (999, "the")


def test_no_spike_is_lost(tmp_path: Path) -> None:
    rows = [{"step": s, "loss": 3 + 100 / (s + 15), "lr": 6e-4, "grad_norm": 0.5} for s in range(1, 200_001)]
    rows[123_455]["loss"] = 9.0
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = board(Runs([run]), "over=0")
    assert len(answer["figure"]) < 200_000
    curves = Runs([run]).all()[str(run)].curves()
    line = curves.line("run", "loss", "steps", None, POINTS)
    assert line is not None and line.x[line.y == 9].tolist() == [123_456]


def test_headers(server: Server) -> None:
    for path in ("/", "/page.js", "/page.css", "/plotly.js", "/board", "/nothing"):
        headers = ask(server, path).headers
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'; script-src 'self';" in policy and "connect-src 'self'" in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in headers
    assert "max-age" in ask(server, "/plotly.js").headers["Cache-Control"]
    assert ask(server, "/", method="POST").status == 501


def test_ports(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(Runs([tmp_path / "runs"]), server.server_port) as other:
        assert server.server_port < other.server_port < server.server_port + PORTS
    monkeypatch.setattr("llmpy.watch.server.PORTS", 1)
    with refused("watch.no-port", server.server_port, "--port"):
        Server(Runs([tmp_path / "runs"]), server.server_port)


@pytest.mark.skipif(os.name != "posix", reason="Windows sends Ctrl-C to whole consoles")
def test_ctrl_c_ends_it_cleanly_without_writing(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (run, *run.iterdir())}
    process, address = started(str(run), "--port", str(40_000 + os.getpid() % 20_000))
    with urllib.request.urlopen(address + "board") as answer:
        assert json.load(answer)["runs"][0]["step"] == 300
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=20)
    assert (process.returncode, out.strip(), errors) == (0, "", "")
    assert before == {p: p.stat().st_mtime_ns for p in (run, *run.iterdir())}


def test_watching_loads_no_kernels() -> None:
    program = (
        "import sys, llmpy.watch.server, llmpy.watch.plot\n"
        "print(sorted({'numba', 'llvmlite', 'matplotlib', 'plotly', 'plotext', 'tokenizers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"
