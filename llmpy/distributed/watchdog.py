"""Signs of life between the ranks, beside MPI, and what happens when one gives none.

MPI itself waits for ever for a rank that was stopped or whose cable was pulled, and where it notices a death it often
ends everybody without saying whose. So every rank keeps a TCP connection to the first one:

every BEAT seconds          a line each way
a connection that closes    without a farewell: that rank is dead, at once
nothing for `patience`      that rank hangs, or its network is cut
a fault                     the rank that has it says so, the first rank tells all others; whoever waits for a message
                            raises it, and who does not come to wait within GRACE seconds is ended here

All addresses of the first rank and a secret travel over MPI; who connects without the secret is not listened to.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from typing import Any, NoReturn

import psutil

from ..errors import LlmpyError
from . import launch

BEAT = 1.0  # seconds
GRACE = 4.0  # for a rank to come to where it waits for others
FAREWELL = 0.5  # for a fault to reach all ranks before the first of them ends and the launcher kills the others
CONNECTING = 3.0  # for each address of the first rank
LONGEST = 1 << 16  # bytes of a line


@dataclass(frozen=True)
class Fault:
    """Why the world ends: which rank, what, and the exit code."""

    rank: int
    text: str
    code: int = 1
    lost: bool = False  # nobody's fault that can be told: who does the same again may succeed


@dataclass
class Peer:
    """The other end of a connection."""

    line: socket.socket
    rank: int
    name: str  # as people read it
    heard: float = field(default_factory=time.monotonic)
    unread: bytes = b""
    left: bool = False  # said farewell


class Watch:
    """The connections of one rank and the thread that looks after them."""

    def __init__(self, rank: int, size: int, patience: float, tell: Callable[[Any], list[Any]]) -> None:
        """`tell` gives a value to all ranks and returns theirs. Raises LlmpyError if the first rank cannot be reached.

        `patience` 0: nobody is watched, a fault of this rank alone is known.
        """
        self.rank, self.patience = rank, patience
        self.hint = ""  # how to go on, when there is something to go on with
        self.fault: Fault | None = None
        self.ending = threading.Event()  # the main thread saw to the fault
        self._peers: list[Peer] = []
        self._closed = False
        self._lock = threading.Lock()
        if patience:
            self._connect(size, tell)
            self._told_at = 0.0
            self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
            self._thread.start()

    def _connect(self, size: int, tell: Callable[[Any], list[Any]]) -> None:
        name = f"rank {self.rank} (process {os.getpid()} on {socket.gethostname()})"
        if self.rank == 0:
            server = socket.create_server(("", 0), backlog=size)
            secret = secrets.token_hex(16)
            names = tell({"addresses": addresses(), "port": server.getsockname()[1], "secret": secret, "name": name})
            server.settimeout(CONNECTING * (1 + len(names[0]["addresses"])))
            with contextlib.suppress(TimeoutError):
                while len(self._peers) < size - 1:
                    line, _ = server.accept()
                    if rank := _introduced(line, secret, size):
                        self._peers.append(Peer(line, rank, names[rank]["name"]))
            server.close()
            missing = sorted(set(range(1, size)) - {peer.rank for peer in self._peers})
            reached = not missing
            who = ", ".join(names[q]["name"] for q in missing)
        else:
            first = tell({"name": name})[0]
            called = (_call(address, first, self.rank) for address in first["addresses"])
            found = next((x for x in called if x is not None), None)
            self._peers = [Peer(found, 0, first["name"])] if found is not None else []
            reached, who = bool(self._peers), name
        if not all(tell(reached)):
            raise LlmpyError(
                f"{who or 'a rank'} cannot reach the first rank over TCP, by which ranks watch each other",
                "let the hosts connect to each other, or watch nobody: --rank-timeout 0",
            )

    def say(self, fault: Fault) -> None:
        """Let all ranks know; the first fault counts."""
        with self._lock:
            if self.fault is None:
                self.fault = fault
        self._send_all({"fault": astuple(self.fault)})

    def close(self) -> None:
        """The end of a run that went well: nobody is missed from now on."""
        self._closed = True
        self._send_all({"farewell": True})
        if self.patience:
            self._thread.join()

    def _send_all(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        for peer in self._peers:
            with contextlib.suppress(OSError):  # that it is gone comes out when it is read from
                peer.line.sendall(data)

    def _look(self) -> None:
        """The thread: beats out, beats in, until this rank's run or the world has ended."""
        began = 0.0
        while not self._closed:
            now = time.monotonic()
            if now - self._told_at >= BEAT:
                self._told_at = now
                self._send_all({"beat": True})
                launch.end_with_parent()
            listened = [peer.line for peer in self._peers if not peer.left]
            if not listened:
                time.sleep(BEAT / 4)
            for line in select.select(listened, [], [], BEAT / 4)[0] if listened else ():
                self._read(next(peer for peer in self._peers if peer.line is line))
            if self.fault is None:
                # A thread that was kept from running itself, by a suspended machine say, accuses nobody.
                late = time.monotonic() - now > self.patience / 2
                for peer in self._peers:
                    peer.heard = time.monotonic() if late else peer.heard
                    silent = time.monotonic() - peer.heard
                    if not peer.left and silent > self.patience:
                        self.say(
                            Fault(peer.rank, f"{peer.name} has given no sign of life for {silent:.0f} s", lost=True)
                        )
            else:
                began = began or time.monotonic()
                if time.monotonic() - began > GRACE and not self.ending.is_set():
                    end(self, self.fault)
        for peer in self._peers:
            peer.line.close()

    def _read(self, peer: Peer) -> None:
        try:
            data = peer.line.recv(LONGEST)
        except OSError:
            data = b""
        if not data:
            peer.left = True
            if not self._closed and self.fault is None:
                self.say(Fault(peer.rank, f"{peer.name} has died", lost=True))
            return
        peer.heard = time.monotonic()
        *lines, peer.unread = (peer.unread + data[-LONGEST:]).split(b"\n")
        for text in lines:
            message = json.loads(text)
            if "farewell" in message:
                peer.left = True
            if "fault" in message and self.fault is None:
                self.say(Fault(*message["fault"]))


def end(watch: Watch, fault: Fault) -> NoReturn:
    """Say what ended the world, unless another rank does, and leave at once: MPI would wait for who is gone."""
    watch.ending.set()
    # The first rank speaks for all; if it is the one that is gone, everyone for himself.
    if watch.rank == 0 or fault.rank == 0 or not watch.patience:
        launch.report(fault.text + (watch.hint if fault.lost else ""))
    time.sleep(FAREWELL)
    launch.leave(fault.code)


def addresses() -> list[str]:
    """The IPv4 and IPv6 addresses of this host, those by which it finds itself last."""
    found = [a for of in psutil.net_if_addrs().values() for a in of if a.family in (socket.AF_INET, socket.AF_INET6)]
    texts = [a.address for a in found]
    return sorted(texts, key=lambda text: text.startswith(("127.", "::1", "fe80")))


def _call(address: str, first: dict[str, Any], rank: int) -> socket.socket | None:
    """A connection to the first rank, if it is there that somebody listens who knows the secret."""
    try:
        line = socket.create_connection((address, first["port"]), timeout=CONNECTING)
        line.sendall(json.dumps({"secret": first["secret"], "rank": rank}).encode() + b"\n")
        if line.recv(16) != b"welcome\n":
            line.close()
            return None
        line.settimeout(BEAT)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return line
    except OSError:
        return None


def _introduced(line: socket.socket, secret: str, size: int) -> int:
    """The rank at the other end; 0 for a stranger."""
    line.settimeout(CONNECTING)
    try:
        hello = json.loads(line.recv(LONGEST))
        if secrets.compare_digest(hello["secret"], secret) and 0 < hello["rank"] < size:
            line.sendall(b"welcome\n")
            line.settimeout(BEAT)
            return int(hello["rank"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    line.close()
    return 0
