"""Heartbeats between the ranks, independent of MPI, and the end of a run that has lost a rank.

MPI waits forever for a rank that hangs or is disconnected, and kills all ranks after a death without naming the dead
one. So every rank keeps a TCP connection to the first one:

every BEAT seconds     a heartbeat each way
connection closed      without a farewell: that rank is dead
silent for `patience`  that rank hangs, or its network is down
error on a rank        sent to the first rank, which forwards it to all: a rank that waits for a message raises it,
                       and one that is not waiting within GRACE seconds is terminated

The addresses of the first rank and a secret are exchanged over MPI; connections without the secret are dropped.
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
from ..system.thread_limit import few
from . import launch

BEAT = 1.0  # seconds
GRACE = 4.0  # seconds for a rank to reach its next message
CONNECTING = 3.0  # seconds for each address of the first rank
LONGEST = 1 << 16  # bytes of a line
WELCOME = b"welcome\n"


@dataclass(frozen=True)
class RankFailure:
    """The error that ends all ranks, and the rank it comes from."""

    rank: int
    text: str
    exit_code: int = 1
    code: str = "rank.failed"
    lost: bool = False  # the rank is dead or unreachable: a resumed run may succeed


@dataclass
class Peer:
    """The other end of a connection."""

    line: socket.socket
    rank: int
    name: str  # for messages
    heard: float = field(default_factory=time.monotonic)
    unread: bytes = b""
    left: bool = False  # sent a farewell

    def fileno(self) -> int:
        """Return the descriptor for `select`."""
        return self.line.fileno()


class Watch:
    """The connections of one rank and the thread that serves them."""

    def __init__(self, rank: int, patience: float) -> None:
        """With `patience` 0 there are no connections; only errors of this rank are known."""
        self.rank, self.patience = rank, patience
        self.hint = ""  # how to resume, once there is a checkpoint folder
        self.failure: RankFailure | None = None
        self.ending = threading.Event()  # the main thread acts on the failure
        self._peers: list[Peer] = []
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def start(self, size: int, gather_values: Callable[[Any], list[Any]]) -> None:
        """Connect to the other ranks; `gather_values` is that of the world. Raises LlmpyError if a rank cannot."""
        if not self.patience:
            return
        if few():
            hint = "Raise it (ulimit -u, pids.max), or use --ranks 1"
            raise LlmpyError("rank.no-threads", "a limit of processes leaves too few threads for several ranks", hint)
        secret, name = secrets.token_hex(16), f"rank {self.rank} (process {os.getpid()} on {socket.gethostname()})"
        if self.rank == 0:
            with socket.create_server(("", 0), backlog=size) as server:
                found = addresses()
                names = [about[0] for about in gather_values([name, secret, server.getsockname()[1], found])]
                server.settimeout(CONNECTING * (1 + len(found)))
                with contextlib.suppress(TimeoutError):
                    while len(self._peers) < size - 1:
                        line = server.accept()[0]
                        if rank := _introduced(line, secret):
                            self._peers.append(Peer(line, rank, names[rank]))
        else:
            everyone = gather_values([name])
            names = [about[0] for about in everyone]
            _, secret, port, found = everyone[0]
            called = next(filter(None, (_call(address, port, secret, self.rank) for address in found)), None)
            self._peers = [Peer(called, 0, names[0])] if called else []
        reached = gather_values(self.rank == 0 or bool(self._peers))
        missing = [name for name, there in zip(names, reached, strict=True) if not there]
        if missing:
            raise LlmpyError(
                "rank.unreachable",
                f"{', '.join(missing)} cannot connect to the first rank over TCP for heartbeats",
                "Allow TCP connections between the hosts, or turn heartbeats off: --rank-timeout 0",
            )
        self._thread.start()

    def broadcast(self, failure: RankFailure) -> None:
        """Send a failure to all ranks; the first one counts."""
        with self._lock:
            self.failure = self.failure or failure
        self._send_all({"failure": astuple(self.failure)})

    def close(self) -> None:
        """Send farewells and stop watching: the run has succeeded."""
        self._closed = True
        self._send_all({"farewell": True})
        if self.patience:
            self._thread.join()

    def _send_all(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        for peer in self._peers:
            with contextlib.suppress(OSError):  # `_read` notices a closed connection
                peer.line.sendall(data)

    def _look(self) -> None:
        """Run the thread: send and read heartbeats until this rank closes or all ranks end."""
        beaten = ended = 0.0
        while not self._closed:
            now = time.monotonic()
            if now - beaten >= BEAT:
                beaten = now
                self._send_all({"beat": True})
                if self.rank == 0:
                    launch.end_with_parent()
            present = [peer for peer in self._peers if not peer.left]
            if not present:
                time.sleep(BEAT / 4)
            for peer in select.select(present, [], [], BEAT / 4)[0] if present else ():
                self._read(peer)
            # If this thread itself was stalled, for example by a suspended machine, no other rank is to blame.
            late = time.monotonic() - now > self.patience / 2
            for peer in present if self.failure is None else ():
                peer.heard = time.monotonic() if late else peer.heard
                silent = time.monotonic() - peer.heard
                if not peer.left and silent > self.patience:
                    text = f"no heartbeat from {peer.name} for {silent:.0f} s"
                    self.broadcast(RankFailure(peer.rank, text, code="rank.silent", lost=True))
            if self.failure is not None:
                ended = ended or now
                if now - ended > GRACE and not self.ending.is_set():
                    end(self, self.failure)
        for peer in self._peers:
            peer.line.close()

    def _read(self, peer: Peer) -> None:
        try:
            data = peer.line.recv(LONGEST)
        except OSError:
            data = b""
        if not data:
            peer.left = True
            if not self._closed and self.failure is None:
                self.broadcast(RankFailure(peer.rank, f"{peer.name} died", code="rank.died", lost=True))
            return
        peer.heard = time.monotonic()
        *lines, peer.unread = (peer.unread + data).split(b"\n")
        for message in map(json.loads, lines):
            peer.left = peer.left or "farewell" in message
            if "failure" in message and self.failure is None:
                self.broadcast(RankFailure(*message["failure"]))


def end(watch: Watch, failure: RankFailure) -> NoReturn:
    """Report the failure, unless another rank does, and exit at once: MPI would wait for a dead rank."""
    watch.ending.set()
    # The first rank prints for all; if it is the one that failed, each rank prints.
    prints = watch.rank == 0 or failure.rank == 0 or not watch.patience
    launch.leave(failure.code, failure.text + (watch.hint if failure.lost else ""), failure.exit_code, prints)


def addresses() -> list[str]:
    """Return the IPv4 addresses of this host, loopback last."""
    found = [a.address for of in psutil.net_if_addrs().values() for a in of if a.family == socket.AF_INET]
    return sorted(found, key=lambda address: address.startswith("127."))


def _call(address: str, port: int, secret: str, rank: int) -> socket.socket | None:
    """Return a connection to the first rank, or None unless the other end knows the secret."""
    with contextlib.suppress(OSError):
        line = socket.create_connection((address, port), timeout=CONNECTING)
        line.sendall(json.dumps([secret, rank]).encode())
        if line.recv(len(WELCOME)) == WELCOME:
            return line
        line.close()
    return None


def _introduced(line: socket.socket, secret: str) -> int:
    """Return the rank at the other end; 0 without the secret."""
    line.settimeout(CONNECTING)
    with contextlib.suppress(OSError, ValueError, TypeError):
        received, rank = json.loads(line.recv(LONGEST))
        if secrets.compare_digest(received, secret):
            line.sendall(WELCOME)
            return int(rank)
    line.close()
    return 0
