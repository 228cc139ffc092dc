"""Heartbeats between the ranks, next to MPI, and what happens when one stops.

MPI itself waits for ever for a rank that was stopped or whose cable was pulled, and where it notices a death it often
ends everybody without saying whose. So every rank keeps a TCP connection to the first one:

every BEAT seconds          a line each way
a connection that closes    without a farewell: that rank is dead, at once
nothing for `patience`      that rank hangs, or its network is cut
an error                    the rank that has it reports it, the first rank passes it on to all; a rank that waits for a
                            message raises it, and one that is not waiting within GRACE seconds is terminated here

The addresses of the first rank and a secret travel over MPI; connections without the secret are dropped.
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
CONNECTING = 3.0  # for each address of the first rank
LONGEST = 1 << 16  # bytes of a line
WELCOME = b"welcome\n"


@dataclass(frozen=True)
class RankFailure:
    """Why the world ends: which rank, what, and the exit code."""

    rank: int
    text: str
    code: int = 1
    lost: bool = False  # that rank is gone: a resumed run may succeed


@dataclass
class Peer:
    """The other end of a connection."""

    line: socket.socket
    rank: int
    name: str  # as people read it
    heard: float = field(default_factory=time.monotonic)
    unread: bytes = b""
    left: bool = False  # said farewell

    def fileno(self) -> int:
        """For `select`."""
        return self.line.fileno()


class Watch:
    """The connections of one rank and the thread that looks after them."""

    def __init__(self, rank: int, patience: float) -> None:
        """`patience` 0: nobody is watched, only an error of this rank is known."""
        self.rank, self.patience = rank, patience
        self.hint = ""  # how to resume, once there is a checkpoint folder
        self.failure: RankFailure | None = None
        self.ending = threading.Event()  # the main thread acts on the failure
        self._peers: list[Peer] = []
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def start(self, size: int, gather_values: Callable[[Any], list[Any]]) -> None:
        """Connect; `tell` gives a value to all ranks and returns theirs. Raises LlmpyError if a rank cannot."""
        if not self.patience:
            return
        secret, name = secrets.token_hex(16), f"rank {self.rank} (process {os.getpid()} on {socket.gethostname()})"
        if self.rank == 0:
            with socket.create_server(("", 0), backlog=size) as server:
                found = addresses()
                names = [told[0] for told in gather_values([name, secret, server.getsockname()[1], found])]
                server.settimeout(CONNECTING * (1 + len(found)))
                with contextlib.suppress(TimeoutError):
                    while len(self._peers) < size - 1:
                        line = server.accept()[0]
                        if rank := _introduced(line, secret):
                            self._peers.append(Peer(line, rank, names[rank]))
        else:
            told = gather_values([name])
            names = [who[0] for who in told]
            _, secret, port, found = told[0]
            called = next(filter(None, (_call(address, port, secret, self.rank) for address in found)), None)
            self._peers = [Peer(called, 0, names[0])] if called else []
        reached = gather_values(self.rank == 0 or bool(self._peers))
        missing = [name for name, there in zip(names, reached, strict=True) if not there]
        if missing:
            raise LlmpyError(
                "distributed.x",
                f"{', '.join(missing)} cannot reach the first rank over TCP, by which ranks watch each other",
                "Let the hosts connect to each other, or watch nobody: --rank-timeout 0",
            )
        self._thread.start()

    def broadcast(self, failure: RankFailure) -> None:
        """Let all ranks know; the first failure counts."""
        with self._lock:
            self.failure = self.failure or failure
        self._send_all({"failure": astuple(self.failure)})

    def close(self) -> None:
        """End the watch of a run that went well: nobody is missed from now on."""
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
            # A thread that was kept from running itself, by a suspended machine say, accuses nobody.
            late = time.monotonic() - now > self.patience / 2
            for peer in present if self.failure is None else ():
                peer.heard = time.monotonic() if late else peer.heard
                silent = time.monotonic() - peer.heard
                if not peer.left and silent > self.patience:
                    self.broadcast(
                        RankFailure(peer.rank, f"{peer.name} has given no sign of life for {silent:.0f} s", lost=True)
                    )
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
                self.broadcast(RankFailure(peer.rank, f"{peer.name} has died", lost=True))
            return
        peer.heard = time.monotonic()
        *lines, peer.unread = (peer.unread + data).split(b"\n")
        for message in map(json.loads, lines):
            peer.left = peer.left or "farewell" in message
            if "failure" in message and self.failure is None:
                self.broadcast(RankFailure(*message["failure"]))


def end(watch: Watch, failure: RankFailure) -> NoReturn:
    """Report what ended the world, unless another rank does, and leave at once: MPI would wait for who is gone."""
    watch.ending.set()
    # The first rank speaks for all; if it is the one that is gone, everyone for himself.
    speaks = watch.rank == 0 or failure.rank == 0 or not watch.patience
    launch.leave(failure.text + (watch.hint if failure.lost else ""), failure.code, speaks)


def addresses() -> list[str]:
    """Return the IPv4 addresses of this host, those that only the host itself can reach last."""
    found = [a.address for of in psutil.net_if_addrs().values() for a in of if a.family == socket.AF_INET]
    return sorted(found, key=lambda address: address.startswith("127."))


def _call(address: str, port: int, secret: str, rank: int) -> socket.socket | None:
    """Return a connection to the first rank, if that is who answers here: it knows the secret."""
    with contextlib.suppress(OSError):
        line = socket.create_connection((address, port), timeout=CONNECTING)
        line.sendall(json.dumps([secret, rank]).encode())
        if line.recv(len(WELCOME)) == WELCOME:
            return line
        line.close()
    return None


def _introduced(line: socket.socket, secret: str) -> int:
    """Return the rank at the other end; 0 for a stranger."""
    line.settimeout(CONNECTING)
    with contextlib.suppress(OSError, ValueError, TypeError):
        told, rank = json.loads(line.recv(LONGEST))
        if secrets.compare_digest(told, secret):
            line.sendall(WELCOME)
            return int(rank)
    line.close()
    return 0
