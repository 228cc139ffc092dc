"""Downloads from a local server: the right bytes, or one error and no leftovers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.network import network
from support.refused import refused

from llmpy.system.download import fetch, from_hub, hub_files

DATA = bytes(range(256)) * 400
SHA = hashlib.sha256(DATA).hexdigest()
OF_HUB = "/datasets/a/b/resolve/main/"
FILES = {"/file": DATA, "/cut": DATA, "/wrong": DATA[::-1], "/503": 503}


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """The address of a server, and the requested paths."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    files = {f"{OF_HUB}{name}": content for name, content in (
        ("c/d.parquet", DATA), ("c/README.md", b""), ("cut", DATA), ("401", 401), ("403", 403), ("500", 500)
    )}  # fmt: skip
    with network(FILES | files, tmp_path / "hub", monkeypatch) as found:
        yield found


def test_a_file_is_downloaded_once(served: tuple[str, list[str]], tmp_path: Path, said: list[str]) -> None:
    path, address = tmp_path / "cache" / "file", f"{served[0]}/file"
    for wrong in (None, b"an old one"):
        if wrong:
            path.write_bytes(wrong)
        for _ in range(2):
            assert fetch(address, path, SHA, said.append) == path
        assert path.read_bytes() == DATA and [*path.parent.iterdir()] == [path]
    assert said == 2 * [f"downloading {address}"]


@pytest.mark.parametrize(
    ("name", "code", "why"),
    [
        ("404", "download.failed", "Not Found"),
        ("503", "download.failed", "Service Unavailable"),
        ("cut", "download.failed", "IncompleteRead"),
        ("wrong", "download.mismatch", "sha256"),
        ("nobody", "download.failed", "Connection refused"),
    ],
)
def test_a_failed_download(
    served: tuple[str, list[str]], tmp_path: Path, said: list[str], name: str, code: str, why: str
) -> None:
    address = "http://127.0.0.1:9" if name == "nobody" else served[0]
    with refused(code, f"{address}/{name}", why):
        fetch(f"{address}/{name}", tmp_path / "file", SHA, said.append)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_the_hub(served: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    assert hub_files("a/b", "c") == ["c/d.parquet"]
    with refused("download.mismatch", "c/d.parquet of a/b"):
        from_hub("a/b", "c/d.parquet", said.append, dataset=True, sha256=SHA[::-1])
    path = from_hub("a/b", "c/d.parquet", said.append, dataset=True, sha256=SHA)
    assert path.read_bytes() == DATA
    served[1].clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert from_hub("a/b", "c/d.parquet", said.append, dataset=True) == path
    with refused("download.failed", "e of a/b", "offline", "HF_HUB_OFFLINE"):
        from_hub("a/b", "e", said.append)
    assert served[1] == []


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("401", "HF_TOKEN"),
        ("403", "HF_TOKEN"),
        ("404", "HF_ENDPOINT"),
        ("500", "HTTPS_PROXY"),
        ("cut", "HF_HOME"),
    ],
)
def test_a_failed_download_from_the_hub(
    served: tuple[str, list[str]], tmp_path: Path, said: list[str], name: str, hint: str
) -> None:
    with refused("download.failed", f"{name} of a/b", hint):
        from_hub("a/b", name, said.append, dataset=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 1000]
