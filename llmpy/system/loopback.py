"""Requests to a server on this machine that come from elsewhere, through a browser."""

from __future__ import annotations

HOSTS = ("127.0.0.1", "localhost", "[::1]")  # with any port: ssh may forward another


def foreign_host(host: str, *own: str) -> bool:
    """Return whether a request's Host is another than HOSTS and `own`: a name that resolves here (DNS rebinding)."""
    return not {host, host.rpartition(":")[0]} & {*HOSTS, *own}


def foreign_site(site: str) -> bool:
    """Return whether a request's Sec-Fetch-Site names another site; "none": not by a page, or no such header."""
    return site not in ("same-origin", "none")
