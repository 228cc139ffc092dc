"""Named data sets, from files and from a hub that this machine plays: the documents that llm.c makes."""

import gzip
import hashlib
import io
import json
import random
import tarfile

import pytest
from support.network import network

from llmpy.data import datasets
from llmpy.data.datasets import SOURCES
from llmpy.data.records import Document
from llmpy.errors import LlmpyError


@pytest.fixture
def hub(monkeypatch):
    """A dict of path → content that is served as the hub."""
    files = {}
    with network(files, monkeypatch):
        yield files


def documents(name, raw, said):
    return list(SOURCES[name].documents(raw, said.append))


def test_shakespeares_speeches(tmp_path, said):
    raw = tmp_path / "input.txt"
    raw.write_text("A:\nhello\n\nB:\nbye\n\n\n\nC:\nend\n")
    texts = [d.text for d in documents("tinyshakespeare", raw, said)]
    assert texts == ["A:\nhello\n\n", "B:\nbye\n\n", "\n\n", "C:\nend\n"]
    assert "is not the file that llm.c uses" in said[0]


def stories(i):
    return [{"story": f"  story {i}.{j}\n", "summary": "x"} for j in range(9)]


def archive(members, mode="w:gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def expected_stories(i):
    """llm.c's order: seed 1337 for the held-out file and for the first one to train on, 1347 for the eleventh."""
    order = {0: (0, 3, 7, 2, 1, 6, 4, 5, 8), 1: (0, 3, 7, 2, 1, 6, 4, 5, 8), 11: (4, 2, 5, 1, 8, 0, 6, 3, 7)}[i]
    return [Document(f"data{i:02}.json", f"story {i}.{j}") for j in order]


@pytest.mark.parametrize("how", ["tar.gz", "tar", "folder", "hub"])
def test_stories(tmp_path, said, hub, monkeypatch, how):
    """In the order of the names, whatever that of the archive is."""
    members = {f"./data{i:02}.json": json.dumps(stories(i)).encode() for i in (11, 0, 1)} | {"./notes.txt": b"no"}
    raw = tmp_path / "raw"
    if how == "folder":
        raw.mkdir()
        for name, content in members.items():
            (raw / name).write_bytes(content)
    elif how == "hub":
        content = archive(members)
        hub["/datasets/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz"] = content
        raw = None
        with pytest.raises(LlmpyError, match=f"{len(content):,} bytes instead of 1,608,001,638"):
            documents("tinystories", raw, said)
        monkeypatch.setattr(datasets, "STORIES_BYTES", len(content))
        monkeypatch.setattr(datasets, "STORIES_SHA256", hashlib.sha256(content).hexdigest())
    else:
        raw.write_bytes(archive(members, "w:gz" if how == "tar.gz" else "w"))
    assert documents("tinystories", raw, said) == [d for i in (0, 1, 11) for d in expected_stories(i)]


def test_an_archive_is_read_once(tmp_path, monkeypatch):
    """Whatever its order; and no further than is asked for."""
    contents = {f"data{i:02}.json": random.Random(i).randbytes(50_000) for i in (1, 0, 3, 5, 2)}
    raw = tmp_path / "x.tar.gz"
    raw.write_bytes(archive(contents))
    read = []

    class Counting(io.FileIO):
        def read(self, size=-1):
            read.append(data := super().read(size))
            return data

    opened = tarfile.open
    with Counting(raw) as file:
        monkeypatch.setattr(tarfile, "open", lambda path, *mode: opened(None, *mode, fileobj=file))
        found = datasets._story_files(raw)
        assert next(found) == ("data00.json", contents["data00.json"])
        assert sum(map(len, read)) < 150_000
        assert list(found) == sorted(contents.items())[1:]
    assert sum(map(len, read)) == raw.stat().st_size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no whole tar archive"),
        (b"hello" * 1000, "no whole tar archive"),
        (archive({"data00.json": json.dumps(stories(0)).encode() * 99})[:200], "no whole tar archive"),
        (gzip.compress(b"hello" * 1000), "no whole tar archive"),
        (archive({"readme": b"x"}), "holds no data00.json"),
        (archive({"data00.json": b"{}x"}), "data00.json in .* holds no list of stories"),
        (archive({"data00.json": b'[{"tale": "x"}]'}), "holds no list of stories"),
        (archive({"data00.json": b'[{"story": 7}]'}), "holds no list of stories"),
    ],
)
def test_damaged_stories(tmp_path, said, content, message):
    raw = tmp_path / "x.tar.gz"
    raw.write_bytes(content)
    with pytest.raises(LlmpyError, match=message):
        documents("tinystories", raw, said)


def test_an_archive_with_a_huge_file(tmp_path, said, monkeypatch):
    monkeypatch.setattr(datasets, "STORIES_AT_MOST", 100)
    raw = tmp_path / "x.tar.gz"
    raw.write_bytes(archive({"data00.json": b" " * 101}))
    with pytest.raises(LlmpyError, match="data00.json has 101 bytes"):
        documents("tinystories", raw, said)


@pytest.mark.parametrize("name", ["fineweb", "fineweb-edu"])
def test_the_web_from_the_hub(tmp_path, said, hub, cache, name):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    listing = [{"path": "sample/10BT/README.md", "size": 1}]
    for i in (1, 0):  # the order of the names counts
        parquet.write_table(arrow.table({"text": [f"page {i}.{j} " * 99 for j in range(3)]}), tmp_path / "x")
        content = (tmp_path / "x").read_bytes()
        path = f"sample/10BT/00{i}_00000.parquet"
        hub[f"/datasets/HuggingFaceFW/{name}/resolve/main/{path}"] = content
        listing.append({"path": path, "size": len(content), "lfs": {"oid": hashlib.sha256(content).hexdigest()}})
    hub[f"/api/datasets/HuggingFaceFW/{name}/tree/main/sample/10BT"] = json.dumps(listing).encode()
    stream = SOURCES[name].documents(None, said.append)
    assert next(stream).text.startswith("page 0.0")
    raw = cache / "raw" / f"HuggingFaceFW--{name}"
    assert sorted(p.name for p in raw.iterdir()) == ["000_00000.parquet", "listing.json"]  # the rest when needed
    assert [d.text[:8] for d in stream] == ["page 0.1", "page 0.2", "page 1.0", "page 1.1", "page 1.2"]
    hub[f"/datasets/HuggingFaceFW/{name}/resolve/main/sample/10BT/000_00000.parquet"] = b"PAR1"
    (raw / "000_00000.parquet").unlink()
    with pytest.raises(LlmpyError, match="is not the file expected"):
        documents(name, None, said)


def test_the_list_of_the_web_is_asked_for_again(tmp_path, said, hub, cache):
    """What the hub has now counts; without the network, what it had."""
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    where = "/api/datasets/HuggingFaceFW/fineweb/tree/main/sample/10BT"
    for i, name in enumerate(("old", "new")):
        parquet.write_table(arrow.table({"text": [f"{name} page " * 200]}), tmp_path / "x")
        content = (tmp_path / "x").read_bytes()
        path = f"sample/10BT/{name}.parquet"
        hub[f"/datasets/HuggingFaceFW/fineweb/resolve/main/{path}"] = content
        entry = {"path": path, "size": len(content), "lfs": {"oid": hashlib.sha256(content).hexdigest()}}
        hub[where] = json.dumps([entry]).encode()
        assert [d.text[:3] for d in documents("fineweb", None, said)] == [name]
        assert len(list((cache / "raw" / "HuggingFaceFW--fineweb").iterdir())) == i + 2
    for answer in (None, b"nonsense"):
        hub[where] = answer
        assert [d.text[:3] for d in documents("fineweb", None, said)] == ["new"]
        assert "going by an earlier list of HuggingFaceFW/fineweb" in said[-2]


@pytest.mark.parametrize("listing", [b"[]", b"nonsense", b'[{"path": "a.parquet"}]', b"{}", b"5"])
def test_a_hub_that_changed(hub, said, listing):
    hub["/api/datasets/HuggingFaceFW/fineweb/tree/main/sample/10BT"] = listing
    with pytest.raises(LlmpyError, match="the hub"):
        documents("fineweb", None, said)
