"""Emulate hosts on one machine: network namespaces joined by a switch of given rate and delay. Linux, root.

python dev/testhosts.py --rate 1e9 --delay 1e-3 2 -- COMMAND          run COMMAND on the first of 2 hosts
python dev/testhosts.py 2 --cut h1 --after 20 -- COMMAND              disconnect host h1 after 20 s

Each host is a namespace h0, h1 … with the address 10.77.0.1, .2 … and a TUN device. This program forwards packets
between them: each waits until the sender's link is free (its bytes / rate), then for the delay. A kernel with `netem`
could do both on veth links; the one this was written on has only `tbf`, which adds no delay.

In the environment of COMMAND, $HOSTS lists the hosts for mpiexec (h0,h1), and $RSH is a remote shell for launchers:
mpiexec -launcher ssh -launcher-exec $RSH -hosts $HOSTS … (MPICH), or mpiexec --prtemca plm_ssh_agent $RSH --host
$HOSTS … (Open MPI). The settings in FABRIC keep both from using shared memory between hosts.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import heapq
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MTU = 65_000  # few large packets, to save CPU time
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
QUEUE = 0.05  # seconds of queued packets at link rate; more are dropped, and TCP slows down
# Ranks must use the device of their host, not shared memory.
FABRIC = {
    "MPICH_CH4_NETMOD": "ofi", "MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp", "FI_TCP_IFACE": "host",
    "UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "host", "MPIR_CVAR_NOLOCAL": "1",
    "OMPI_MCA_btl": "tcp,self", "OMPI_MCA_pml": "ob1", "OMPI_MCA_btl_tcp_if_include": "10.77.0.0/24",
    "PRTE_MCA_prte_if_include": "10.77.0.0/24",
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}  # fmt: skip


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def device(number: int) -> int:
    """Create the TUN device of a host and move it to its namespace; return the handle for its packets."""
    handle = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(handle, TUNSETIFF, struct.pack("16sH", f"llmpy{number}".encode(), IFF_TUN | IFF_NO_PI))
    host = f"h{number}"
    ip("netns", "add", host)
    ip("link", "set", f"llmpy{number}", "netns", host, "name", "host")
    inside = ("netns", "exec", host, "ip")
    ip(*inside, "link", "set", "lo", "up")
    ip(*inside, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "host")
    ip(*inside, "link", "set", "host", "mtu", str(MTU), "txqueuelen", "1000", "up")
    return handle


def remove(hosts: int) -> None:
    for number in range(hosts):
        subprocess.run(["ip", "netns", "del", f"h{number}"], stderr=subprocess.DEVNULL)
        shutil.rmtree(f"/etc/netns/h{number}", ignore_errors=True)


def names(hosts: int) -> None:
    """Write /etc/hosts for every host."""
    text = "127.0.0.1 localhost\n" + "".join(f"10.77.0.{n + 1} h{n}\n" for n in range(hosts))
    for number in range(hosts):
        folder = Path(f"/etc/netns/h{number}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hosts").write_text(text)


def remote_shell(folder: Path) -> Path:
    """Write a replacement for ssh that runs a command in a host's namespace, under its host name."""
    path = folder / "rsh"
    path.write_text(
        "#!/bin/sh\n"
        'while [ "${1#-}" != "$1" ]; do shift; done\n'  # options of ssh
        "host=$1; shift\n"
        'exec ip netns exec "$host" unshare --uts sh -c "hostname $host; $*"\n'
    )
    path.chmod(0o755)
    return path


class Switch:
    """The switch and its packets in flight."""

    def __init__(self, handles: list[int], rate: float, delay: float) -> None:
        self.handles, self.rate, self.delay = handles, rate, delay
        self.free = [0.0] * len(handles)  # when each host's link becomes free
        self.travelling: list[tuple[float, int, int, bytes]] = []
        self.cut: int | None = None
        self.count = self.dropped = 0

    def turn(self) -> None:
        """Read packets from the hosts and deliver those that are due."""
        wait = max(0.0, min(0.05, self.travelling[0][0] - time.monotonic())) if self.travelling else 0.05
        ready, _, _ = select.select(self.handles, [], [], wait)
        for handle in ready:
            source = self.handles.index(handle)
            for _ in range(16):
                try:
                    packet = os.read(handle, MTU + 100)
                except BlockingIOError:
                    break
                self.take(source, packet)
        now = time.monotonic()
        while self.travelling and self.travelling[0][0] <= now:
            _, _, target, packet = heapq.heappop(self.travelling)
            with contextlib.suppress(OSError):
                os.write(self.handles[target], packet)

    def take(self, source: int, packet: bytes) -> None:
        if packet[0] >> 4 != 4 or packet[16:19] != bytes((10, 77, 0)):
            return
        target, now = packet[19] - 1, time.monotonic()
        start = max(now, self.free[source])
        if not 0 <= target < len(self.handles) or self.cut in (source, target) or start - now > QUEUE:
            self.dropped += 1
            return
        self.count += 1
        self.free[source] = start + 8 * len(packet) / self.rate
        heapq.heappush(self.travelling, (self.free[source] + self.delay, self.count, target, packet))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hosts", type=int)
    parser.add_argument("--rate", type=float, default=1e9, help="bits per second of each host's link")
    parser.add_argument("--delay", type=float, default=1e-3, help="seconds one way")
    parser.add_argument("--cut", metavar="HOST", help="disconnect this host")
    parser.add_argument("--after", type=float, default=20.0, help="seconds until then")
    split = sys.argv.index("--")
    options, command = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    remove(options.hosts)
    with tempfile.TemporaryDirectory() as name:
        try:
            switch = Switch([device(n) for n in range(options.hosts)], options.rate, options.delay)
            names(options.hosts)
            hosts = ",".join(f"h{n}" for n in range(options.hosts))
            environment = {**os.environ, **FABRIC, "HOSTS": hosts, "RSH": str(remote_shell(Path(name)))}
            inside = ["ip", "netns", "exec", "h0", "unshare", "--uts", "sh", "-c", 'hostname h0; exec "$@"', "sh"]
            process = subprocess.Popen([*inside, *command], env=environment)
            signal.signal(signal.SIGINT, lambda *_: process.send_signal(signal.SIGINT))
            start = time.monotonic()
            while process.poll() is None:
                switch.turn()
                if options.cut and switch.cut is None and time.monotonic() - start > options.after:
                    switch.cut = int(options.cut.removeprefix("h"))
                    print(f"testhosts: {options.cut} is disconnected", file=sys.stderr, flush=True)
            print(f"testhosts: {switch.count:,} packets, {switch.dropped:,} dropped", file=sys.stderr)
            return process.returncode
        finally:
            remove(options.hosts)


if __name__ == "__main__":
    sys.exit(main())
