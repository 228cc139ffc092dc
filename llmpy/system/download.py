"""Files from the network: resumed when cut, checked by length and sha256, in their place only when whole.

    GET, Range: bytes=N-   →   .NAME.part   →   length, sha256   →   NAME

Of several processes that want a file one downloads it, and the others wait.
What a part of an earlier process holds is only built on if a sha256 proves the whole; within a process the
server's ETag does. A model hub's redirect tells length and sha256 of the file it leads to (X-Linked-Size,
X-Linked-Etag), and a small file's ETag there is git's hash of it: they are checked where the caller names none.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from ..errors import LlmpyError
from ..version import __version__
from .durable import put_in_place
from .lock import Lock

CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds without a byte
TRIES = 5  # in a row that bring nothing
PAUSE = 1.0  # seconds before the second try; then twice as long each time
TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
WEB_PAGE = re.compile(rb"\s*(<!doctype|<html|<\?xml)", re.IGNORECASE)
ELSEWHERE = "download it in another way and name the file, or try again later"


def hub() -> str:
    """The address of the Hugging Face hub; $HF_ENDPOINT names a mirror."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def fetch(
    url: str, path: Path, *, size: int | None = None, sha256: str | None = None, say: Callable[[str], None]
) -> Path:
    """Download `url` to `path`, unless it is there as it should be; returns `path`.

    Raises LlmpyError for an address that leads nowhere, a server that keeps failing, a web page instead of
    the file, another length than `size`, another hash than `sha256` (hex), and a full disk.
    """
    if not url.startswith(("https://", "http://")):
        raise LlmpyError(f"{url} is no address of a file on the network", "use one that begins with https://")
    download = _Download(url, path, size, sha256, say)
    try:
        if path.exists():
            if download.fault_of(path) is None:
                return path
            say(f"{path} is not what it should be: {download.fault_of(path)}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with Lock(path.with_name(f".{path.name}.lock")).waited(say, f"downloads {path.name}"):
            if path.exists() and download.fault_of(path) is None:  # it came meanwhile
                return path
            download.run()
            put_in_place(download.part, path)
    except OSError as fault:
        raise LlmpyError(
            f"cannot write {fault.filename or path}: {fault.strerror or fault}",
            "free some space or choose another folder",
        ) from fault
    return path


class _Cut(Exception):
    """An attempt that ended before the file did, and may be repeated."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, keeping what a hub says there about the file."""

    def __init__(self, learn: Callable[[Any], None]) -> None:
        self.learn = learn

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        secure = req.full_url.startswith("https:")
        if not newurl.startswith("https:" if secure else ("https:", "http:")):
            fp.close()
            raise LlmpyError(f"{req.full_url} leads to {newurl}, which is not {'encrypted' if secure else 'the web'}")
        self.learn(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Download:
    """One file on its way."""

    def __init__(self, url: str, path: Path, size: int | None, sha256: str | None, say: Callable[[str], None]) -> None:
        self.url, self.size, self.sha256, self.say = url, size, sha256, say
        self.blob: str | None = None  # git's hash of it
        self.part = path.with_name(f".{path.name}.part")
        self._validator = ""  # the server's name for what we have a part of
        self._bar: Any = None

    def run(self) -> None:
        """Bring the part to its full length, and check it. What is wrong is removed, what is cut stays."""
        furthest = self._have()
        resumed = furthest > 0
        misses = 0
        try:
            while True:
                try:
                    self._attempt()
                except _Cut as cut:
                    misses = 1 if self._have() > furthest else misses + 1
                    furthest = max(furthest, self._have())
                    if misses >= TRIES:
                        raise LlmpyError(f"{self.url}: {cut}, {TRIES} times in a row", ELSEWHERE) from cut
                    pause = PAUSE * 2 ** (misses - 1)
                    self.say(f"{cut} after {self._have():,} bytes: going on in {pause:g} s")
                    time.sleep(pause)
                    resumed = True
                    continue
                fault = self.fault_of(self.part)
                if fault is None:
                    return
                self.part.unlink()
                if not resumed:
                    raise LlmpyError(f"{self.url} is not the file expected: {fault}", ELSEWHERE)
                self.say(f"the parts of {self.url} do not fit each other: downloading it from the start")
                resumed = False
        finally:
            if self._bar is not None:
                self._bar.close()

    def fault_of(self, path: Path) -> str | None:
        """What is wrong with a file, by all that is known of it."""
        there = path.stat().st_size
        if self.size is not None and there != self.size:
            return f"{there:,} bytes instead of {self.size:,}"
        if self.sha256 is not None:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != self.sha256:
                return f"sha256 {digest[:12]}… instead of {self.sha256[:12]}…"
        if self.blob is not None:
            digest = hashlib.sha1(b"blob %d\0" % there + path.read_bytes(), usedforsecurity=False).hexdigest()
            if digest != self.blob:
                return f"git's hash {digest[:12]}… instead of {self.blob[:12]}…"
        return None

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _attempt(self) -> None:
        """One request, and all that it brings. Raises _Cut if another one may bring more."""
        have = self._have()
        if have and (self.size is not None and have >= self.size):
            if have == self.size and self.sha256 is not None:
                return
            self.part.unlink()
            have = 0
        headers = {"User-Agent": f"llmpy/{__version__}", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if self._validator:
                headers["If-Range"] = self._validator
        opener = urllib.request.build_opener(_Redirects(self._learn))
        try:
            with opener.open(urllib.request.Request(self.url, headers=headers), timeout=TIMEOUT) as reply:
                self._learn(reply.headers)
                self._receive(reply, have)
        except urllib.error.HTTPError as fault:
            fault.close()
            self._refused(fault, have)
        except urllib.error.URLError as fault:
            self._unreachable(fault)
        except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as fault:
            raise _Cut(f"the connection broke ({str(fault) or type(fault).__name__})") from fault

    def _learn(self, headers: Any) -> None:
        """Take over what the hub says of the file, where the caller said nothing."""
        git = "X-Repo-Commit" in headers
        etag = (headers.get("X-Linked-Etag") or (headers.get("ETag", "") if git else "")).removeprefix("W/").strip('"')
        if self.sha256 is None and re.fullmatch("[0-9a-f]{64}", etag):
            self.sha256 = etag
        if self.sha256 is None and git and re.fullmatch("[0-9a-f]{40}", etag):
            self.blob = etag
        if self.size is None and headers.get("X-Linked-Size", "").isdecimal():
            self.size = int(headers["X-Linked-Size"])

    def _refused(self, fault: urllib.error.HTTPError, have: int) -> None:
        if fault.code == 416 and have:  # our part is not a part of what the server has now
            self.part.unlink()
            raise _Cut("the server has another file now") from fault
        if fault.code in TRY_AGAIN:
            raise _Cut(f"the server answers {fault.code} {fault.reason}") from fault
        why = {401: "it wants a login", 403: "it is not open to us", 404: "there is no such file"}.get(fault.code, "")
        raise LlmpyError(
            f"{self.url}: the server answers {fault.code} {' '.join(str(fault.reason).split())}"
            + (f": {why}" if why else ""),
            "check the address, or " + ELSEWHERE,
        ) from fault

    def _unreachable(self, fault: urllib.error.URLError) -> None:
        reason = fault.reason
        host = self.url.split("/")[2]
        if isinstance(reason, socket.gaierror):
            raise LlmpyError(f"cannot find {host}: is there a network?", ELSEWHERE) from fault
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise LlmpyError(f"{host} does not prove who it is: {reason.verify_message}", ELSEWHERE) from fault
        raise _Cut(f"cannot reach {host} ({getattr(reason, 'strerror', None) or reason})") from fault

    def _receive(self, reply: Any, have: int) -> None:
        """The body of a reply, appended to the part; from its start if that is what the server sends."""
        if have and (reply.status != 206 or not self._continues(reply, have)):
            self.part.unlink()
            have = 0
            if reply.status == 206:
                raise _Cut("the part that is here cannot be continued")
        if reply.headers.get_content_type() == "text/html":
            raise self._web_page()
        etag = reply.headers.get("ETag", "")
        self._validator = "" if etag.startswith("W/") else etag  # a weak one promises no equal bytes
        length = reply.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else None
        if self.size is not None and total is not None and total != self.size:
            self.part.unlink(missing_ok=True)
            raise LlmpyError(
                f"{self.url} is not the file expected: {total:,} bytes instead of {self.size:,}", ELSEWHERE
            )
        expected = self.size if total is None else total
        self._check_space(expected, have)
        self._show(expected, have)
        with self.part.open("ab") as file:
            while chunk := _read(reply):
                if not have and WEB_PAGE.match(chunk):
                    file.truncate(0)
                    raise self._web_page()
                have += len(chunk)
                if self.size is not None and have > self.size:
                    file.truncate(0)
                    raise LlmpyError(f"{self.url} is not the file expected: longer than {self.size:,} bytes", ELSEWHERE)
                file.write(chunk)
                self._bar.update(len(chunk))
        if expected is not None and have < expected:
            raise _Cut("the connection was cut")

    def _continues(self, reply: Any, have: int) -> bool:
        """Whether a partial reply goes on where the part ends, and can be known to be of the same file."""
        begins = re.match(r"bytes (\d+)-", reply.headers.get("Content-Range", ""))
        return begins is not None and int(begins[1]) == have and bool(self.sha256 or self.blob or self._validator)

    def _web_page(self) -> LlmpyError:
        return LlmpyError(
            f"{self.url} gave a web page instead of the file: a login, a proxy or an error page", ELSEWHERE
        )

    def _check_space(self, expected: int | None, have: int) -> None:
        free = shutil.disk_usage(self.part.parent).free
        if expected is not None and expected - have > free:
            raise LlmpyError(
                f"{self.url} has {expected / 1e6:,.0f} MB, {self.part.parent} has room for {free / 1e6:,.0f}",
                "free some space or choose another folder",
            )

    def _show(self, expected: int | None, have: int) -> None:
        """A line for the log, and on a terminal a bar."""
        if self._bar is None:
            from tqdm import tqdm

            length = "" if expected is None else f" ({expected / 1e6:,.1f} MB)"
            self.say(f"downloading {self.url}{length}")
            self._bar = tqdm(total=expected, unit="B", unit_scale=True, leave=False, disable=None)
        self._bar.n = have
        self._bar.refresh()


def _read(reply: Any) -> bytes:
    """The next chunk. Raises _Cut where the network fails, for an OSError elsewhere is the disk's."""
    try:
        return bytes(reply.read(CHUNK))
    except (http.client.HTTPException, OSError) as fault:
        what = "no byte for a while" if isinstance(fault, TimeoutError) else "the connection was cut"
        raise _Cut(what) from fault
