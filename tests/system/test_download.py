"""Downloads against a local server that cuts, redirects, lies and fails: the right bytes or a clear refusal."""

import hashlib
import http.server
import re
import threading
from types import SimpleNamespace

import pytest

from llmpy.errors import LlmpyError
from llmpy.system import download
from llmpy.system.download import fetch

DATA = bytes(range(256)) * 4000  # 1,024,000 bytes
SHA = hashlib.sha256(DATA).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Answers as `replies` say, one after another; the last one for good."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies = [reply()]
        self.asked = []
        self.url = f"http://127.0.0.1:{self.server_port}/file.bin"

    def handle_error(self, *_):
        pass  # the client may leave in the middle


def reply(data=DATA, cut=None, status=200, ranges=True, stall=False, etag='"v1"', **headers):
    """`cut`: close the connection after so many bytes of the body."""
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    return SimpleNamespace(data=data, cut=cut, status=status, ranges=ranges, stall=stall, etag=etag, headers=told)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.asked.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        told = server.replies.pop(0) if len(server.replies) > 1 else server.replies[0]
        if told.stall:
            threading.Event().wait(1.0)
            return
        body, status, extra = told.data, told.status, {}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        same = self.headers.get("If-Range") in (None, told.etag)
        if asked and told.ranges and same and status == 200:
            start = int(asked[1])
            if start >= len(body):
                body, status = b"", 416
            else:
                status, extra = 206, {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
                body = body[start:]
        self.send_response(status)
        if told.etag:
            extra["ETag"] = told.etag
        for name, value in ({"Content-Length": len(body)} | extra | told.headers).items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body if told.cut is None else body[: told.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.01)
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "file.bin"


def whole(path):
    """The file is right, and nothing lies beside it."""
    return path.read_bytes() == DATA and [p.name for p in path.parent.iterdir()] == [path.name]


def refused(server, path, said, message, **known):
    with pytest.raises(LlmpyError, match=message) as fault:
        fetch(server.url, path, say=said.append, **known)
    assert not path.exists()
    return str(fault.value)


@pytest.mark.parametrize("known", [{}, {"size": len(DATA)}, {"sha256": SHA}, {"size": len(DATA), "sha256": SHA}])
def test_a_plain_download(server, path, said, known):
    assert fetch(server.url, path, say=said.append, **known) == path
    assert whole(path)
    assert said == [f"downloading {server.url} (1.0 MB)"]
    assert fetch(server.url, path, say=said.append, **known) == path
    assert len(server.asked) == 1  # what is there is not asked for again


def test_several_want_one_file(server, path):
    """One downloads it, the others wait for that one."""
    said, faults = [], []

    def want():
        try:
            fetch(server.url, path, say=said.append)
        except BaseException as fault:
            faults.append(fault)

    server.replies = [reply(cut=300_000), reply()]  # the rest comes after a pause
    wanting = [threading.Thread(target=want) for _ in range(4)]
    for thread in wanting:
        thread.start()
    for thread in wanting:
        thread.join()
    assert not faults
    assert whole(path)
    assert len(server.asked) == 2
    assert sum(line.startswith("waiting for ") and line.endswith(", which downloads file.bin") for line in said) == 3


@pytest.mark.parametrize("known", [{}, {"sha256": SHA}])
def test_cut_and_resumed(server, path, said, known):
    server.replies = [reply(cut=300_000), reply(cut=1), reply(cut=0), reply(cut=400_000), reply()]
    fetch(server.url, path, say=said.append, **known)
    assert whole(path)
    starts = [int(asked[1].partition("=")[2][:-1]) for asked in server.asked[1:]]
    assert starts == [300_000, 300_001, 300_001, 700_001]
    assert {asked[2] for asked in server.asked[1:]} == {'"v1"'}
    assert said[1].startswith("the connection was cut after 300,000 bytes")


def test_cut_without_a_length(server, path, said):
    """Only the size that the caller knows tells that there is more."""
    server.replies = [reply(cut=300_000, Content_Length=None), reply(Content_Length=None)]
    fetch(server.url, path, size=len(DATA), say=said.append)
    assert whole(path)


def test_a_server_without_ranges(server, path, said):
    server.replies = [reply(cut=300_000, ranges=False), reply(ranges=False)]
    fetch(server.url, path, say=said.append)
    assert whole(path)


def test_the_file_changes_between_two_parts(server, path, said):
    server.replies = [reply(data=b"x" * len(DATA), cut=300_000, etag='"v0"'), reply()]
    fetch(server.url, path, say=said.append)
    assert whole(path)


def test_a_server_that_sends_another_part(server, path, said):
    shifted = reply(status=206, data=DATA[5:], Content_Range="bytes 5-9/10")
    server.replies = [reply(cut=300_000), shifted, reply()]
    fetch(server.url, path, say=said.append)
    assert whole(path)


@pytest.mark.parametrize("known", [{"sha256": SHA}, {}])
def test_a_part_of_an_earlier_process(server, path, said, known):
    path.parent.mkdir()
    path.with_name(".file.bin.part").write_bytes(DATA[:500_000])
    fetch(server.url, path, say=said.append, **known)
    assert whole(path)
    resumed = server.asked[-1][1] == "bytes=500000-"
    assert resumed == bool(known)  # only a hash proves that the parts belong together


@pytest.mark.parametrize("part", [b"y" * 500_000, b"y" * len(DATA), b"y" * (len(DATA) + 1)])
def test_a_wrong_part_of_an_earlier_process(server, path, said, part):
    path.parent.mkdir()
    path.with_name(".file.bin.part").write_bytes(part)
    fetch(server.url, path, sha256=SHA, say=said.append)
    assert whole(path)


def test_a_whole_part_of_an_earlier_process(server, path, said):
    path.parent.mkdir()
    path.with_name(".file.bin.part").write_bytes(DATA)
    fetch(server.url, path, sha256=SHA, size=len(DATA), say=said.append)
    assert whole(path)
    assert server.asked == []


def test_a_wrong_file_in_its_place(server, path, said):
    path.parent.mkdir()
    path.write_bytes(b"an old one")
    fetch(server.url, path, sha256=SHA, say=said.append)
    assert whole(path)
    assert "is not what it should be: sha256" in said[0]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects(server, path, said, status):
    server.replies = [reply(status=status, data=b"", Location="/there"), reply(cut=9), reply(status=302, Location="/a")]
    server.replies += [reply()]
    fetch(server.url, path, say=said.append)
    assert whole(path)
    assert [asked[0] for asked in server.asked] == ["/file.bin", "/there", "/file.bin", "/a"]
    assert server.asked[-1][1] == "bytes=9-"


def test_a_redirect_in_a_circle(server, path, said):
    server.replies = [reply(status=302, data=b"", Location="/file.bin")]
    refused(server, path, said, "the server answers 302")


@pytest.mark.parametrize("place", ["ftp://127.0.0.1/x", "file:///etc/passwd"])
def test_a_redirect_out_of_the_web(server, path, said, place):
    server.replies = [reply(status=302, data=b"", Location=place)]
    refused(server, path, said, "leads to ftp:.* not the web" if "ftp" in place else "the server answers 302")


def test_what_a_hub_says_of_its_file(server, path, said):
    linked = {"X_Linked_Etag": f'"{SHA}"', "X_Linked_Size": len(DATA)}
    server.replies = [reply(status=302, data=b"", Location="/cdn", **linked), reply()]
    fetch(server.url, path, say=said.append)
    assert whole(path)
    path.unlink()
    server.replies = [reply(status=302, data=b"", Location="/cdn", **linked), reply(data=b"z" * len(DATA))]
    refused(server, path, said, "is not the file expected: sha256")


@pytest.mark.parametrize("redirected", [False, True])
def test_what_git_says_of_a_small_file(server, path, said, redirected):
    blob = hashlib.sha1(b"blob %d\0" % len(DATA) + DATA).hexdigest()  # as `git hash-object` gives it
    told = {"etag": f'W/"{blob}"', "X_Repo_Commit": "607a30d783dfa663caf39e06633721c8d4cfcd7e"}
    first = [reply(status=307, data=b"", Location="/cache", **told)] if redirected else []
    server.replies = [*first, reply(**told)]
    fetch(server.url, path, say=said.append)
    assert whole(path)
    path.unlink()
    server.replies = [*first, reply(data=b"z" * len(DATA), **told)]
    refused(server, path, said, r"is not the file expected: git's hash [0-9a-f]{12}… instead of")
    server.replies = [reply(etag=f'"{blob[::-1]}"')]  # of a server that is no hub
    fetch(server.url, path, say=said.append)
    assert whole(path)


@pytest.mark.parametrize(
    "page",
    [
        reply(data=b"<!DOCTYPE html><html>Sign in</html>"),
        reply(data=b" \n<HTML>" + b" " * 5000),
        reply(data=b"error", Content_Type="text/html; charset=utf-8"),
    ],
)
@pytest.mark.parametrize("known", [{}, {"sha256": SHA}])
def test_a_web_page_instead(server, path, said, page, known):
    server.replies = [page]
    refused(server, path, said, "gave a web page instead of the file", **known)
    server.replies = [reply()]  # and it left nothing that would spoil the next try
    fetch(server.url, path, say=said.append, **known)
    assert whole(path)


def test_wrong_bytes(server, path, said):
    server.replies = [reply(data=DATA[:-1] + b"!")]
    refused(server, path, said, r"is not the file expected: sha256 [0-9a-f]{12}… instead of", sha256=SHA)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("headers", [{}, {"Content_Length": None}])
@pytest.mark.parametrize("data", [DATA[:-1], DATA + b"!", b""])
def test_wrong_length(server, path, said, data, headers):
    server.replies = [reply(data=data, **headers)]
    longer = "longer than 1,024,000" if headers and len(data) > len(DATA) else f"{len(data):,} bytes instead of"
    short = headers and len(data) < len(DATA)  # without a length it looks cut
    refused(server, path, said, "5 times in a row" if short else longer, size=len(DATA))


def test_a_length_that_lies(server, path, said):
    server.replies = [reply(Content_Length=len(DATA) + 5)]
    refused(server, path, said, "the connection was cut, 5 times in a row")


@pytest.mark.parametrize(("status", "why"), [(404, "there is no such file"), (403, "not open"), (401, "a login")])
def test_refusals_are_not_repeated(server, path, said, status, why):
    server.replies = [reply(status=status, data=b"no")]
    refused(server, path, said, f"the server answers {status} .*: .*{why}")
    assert len(server.asked) == 1


@pytest.mark.parametrize("failure", [reply(status=503, data=b""), reply(status=429, data=b""), reply(stall=True)])
def test_failures_are_repeated(server, path, said, failure):
    server.replies = [failure, failure, reply()]
    fetch(server.url, path, say=said.append)
    assert whole(path)
    server.replies, server.asked = [failure], []
    path.unlink()
    refused(server, path, said, "5 times in a row")
    assert len(server.asked) == 5


def test_nobody_there(server, path, said):
    server.url = "http://127.0.0.1:9/file"  # the discard port: nothing listens
    refused(server, path, said, r"cannot reach 127\.0\.0\.1:9 .*5 times in a row")
    server.url = "http://nowhere.invalid/file"
    refused(server, path, said, r"cannot find nowhere\.invalid: is there a network")
    server.url = "file:///etc/passwd"
    refused(server, path, said, "no address of a file on the network")


def test_no_room(server, path, said, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    refused(server, path, said, r"has 1 MB, .* has room for 0")


def test_a_folder_that_cannot_be_made(server, tmp_path, said):
    (tmp_path / "x").write_text("")
    with pytest.raises(LlmpyError, match=r"cannot write .*x.*— free some space or choose another folder"):
        fetch(server.url, tmp_path / "x" / "file", say=said.append)
