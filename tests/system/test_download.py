"""Downloads against a local server: the right bytes, or one clear error and nothing left."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.network import network

from llmpy.errors import LlmpyError
from llmpy.system.download import fetch, from_hub, hub_files

DATA = bytes(range(256)) * 400
SHA = hashlib.sha256(DATA).hexdigest()
OF_HUB = "/datasets/a/b/resolve/main/"
FILES = {"/file": DATA, "/cut": DATA, "/wrong": DATA[::-1], "/503": 503}


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """The address of a server, and the paths that were asked for."""
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
    ("name", "why"),
    [
        ("404", "Not Found — check the network"),
        ("503", "Service Unavailable"),
        ("cut", "IncompleteRead"),
        ("wrong", "is not the file expected: its sha256 differs"),
        ("nobody", "Connection refused"),
    ],
)
def test_a_file_that_does_not_come(
    served: tuple[str, list[str]], tmp_path: Path, said: list[str], name: str, why: str
) -> None:
    address = "http://127.0.0.1:9" if name == "nobody" else served[0]
    with pytest.raises(LlmpyError, match=f"{address}/{name}.*{why}"):
        fetch(f"{address}/{name}", tmp_path / "file", SHA, said.append)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_the_hub(served: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    assert hub_files("a/b", "c") == ["c/d.parquet"]
    with pytest.raises(LlmpyError, match="is not the file expected"):
        from_hub("a/b", "c/d.parquet", said.append, dataset=True, sha256=SHA[::-1])
    path = from_hub("a/b", "c/d.parquet", said.append, dataset=True, sha256=SHA)
    assert path.read_bytes() == DATA
    served[1].clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert from_hub("a/b", "c/d.parquet", said.append, dataset=True) == path
    with pytest.raises(LlmpyError, match=r"cannot download e of a/b: .*offline.*— check the network \(HF_HUB_OFF"):
        from_hub("a/b", "e", said.append)
    assert served[1] == []


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("401", "log in"),
        ("403", "log in"),
        ("404", "check the name"),
        ("500", "check the network"),
        ("cut", "the disk"),
    ],
)
def test_a_hub_that_refuses(
    served: tuple[str, list[str]], tmp_path: Path, said: list[str], name: str, hint: str
) -> None:
    with pytest.raises(LlmpyError, match=rf"cannot download {name} of a/b: .*— .*{hint}"):
        from_hub("a/b", name, said.append, dataset=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 1000]
