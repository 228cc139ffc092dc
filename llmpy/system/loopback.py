"""Requests to a server on this machine that come from elsewhere, through a browser."""

from __future__ import annotations

HOSTS = ("127.0.0.1", "localhost", "[::1]")  # with any port: ssh may forward another


def foreign_host(host: str) -> bool:
    """Return whether a request's Host is another: a name that resolves to 127.0.0.1 (DNS rebinding)."""
    return host.rpartition(":")[0] not in HOSTS and host not in HOSTS


def foreign_site(site: str) -> bool:
    """Return whether a request's Sec-Fetch-Site names another site; "none": not by a page, or no such header."""
    return site not in ("same-origin", "none")
