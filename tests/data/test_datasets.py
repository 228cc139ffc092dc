"""Named datasets, from files and from a local hub server: the same documents as in llm.c."""

import gzip
import hashlib
import io
import json
import tarfile

import pytest
from support.network import network
from support.refused import refused

from llmpy.data import datasets
from llmpy.data.datasets import SOURCES
from llmpy.data.records import Document
from llmpy.errors import LlmpyError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Path → content, served as the hub."""
    files = {}
    with network(files, tmp_path / "hub", monkeypatch):
        yield files


def documents(name, raw, said):
    return list(SOURCES[name].documents(raw, said.append))


def test_shakespeares_speeches(tmp_path, said):
    raw = tmp_path / "input.txt"
    raw.write_text("A:\nhello\n\nB:\nbye\n\n\n\nC:\nend\n")
    texts = [d.text for d in documents("tinyshakespeare", raw, said)]
    assert texts == ["A:\nhello\n\n", "B:\nbye\n\n", "\n\n", "C:\nend\n"]


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
    """llm.c's order: seed 1337 for the held-out and the first training file, 1347 for the eleventh."""
    order = {0: (0, 3, 7, 2, 1, 6, 4, 5, 8), 1: (0, 3, 7, 2, 1, 6, 4, 5, 8), 11: (4, 2, 5, 1, 8, 0, 6, 3, 7)}[i]
    return [Document(f"data{i:02}.json", f"story {i}.{j}") for j in order]


@pytest.mark.parametrize("how", ["tar.gz", "tar", "folder", "hub"])
def test_stories(tmp_path, said, hub, monkeypatch, how):
    """Files are sorted by name, whatever their order in the archive."""
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
        with pytest.raises(LlmpyError, match="TinyStories"):  # another hash
            documents("tinystories", raw, said)
        monkeypatch.setattr(datasets, "STORIES_SHA256", hashlib.sha256(content).hexdigest())
    else:
        raw.write_bytes(archive(members, "w:gz" if how == "tar.gz" else "w"))
    assert documents("tinystories", raw, said) == [d for i in (0, 1, 11) for d in expected_stories(i)]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"hello" * 1000, "dataset.unpack-failed"),
        (archive({"data00.json": json.dumps(stories(0)).encode() * 99})[:200], "dataset.unpack-failed"),
        (gzip.compress(b"hello" * 1000), "dataset.unpack-failed"),
        (archive({"readme": b"x"}), "dataset.incomplete"),
        (archive({"data00.json": b"{}x"}), "dataset.corrupt"),
        (archive({"data00.json": b'[{"tale": "x"}]'}), "dataset.corrupt"),
        (archive({"data00.json": b'[{"story": null}]'}), "dataset.corrupt"),
    ],
    ids=["text", "cut", "no archive", "no stories", "no JSON", "other fields", "null"],  # archives contain the time
)
def test_corrupt_stories(tmp_path, said, content, code):
    raw = tmp_path / "x.tar.gz"
    raw.write_bytes(content)
    with refused(code, raw, "data00.json" if "unpack" not in code else ""):
        documents("tinystories", raw, said)


def test_one_file_of_stories_and_only_the_folder_itself(tmp_path, said):
    (tmp_path / "again").mkdir()
    for path in (tmp_path / "data00.json", tmp_path / "again" / "data00.json"):
        path.write_text(json.dumps(stories(0)))
    assert documents("tinystories", tmp_path / "data00.json", said) == expected_stories(0)
    assert documents("tinystories", tmp_path, said) == expected_stories(0)


@pytest.mark.parametrize("name", ["fineweb", "fineweb-edu"])
def test_the_web_from_the_hub(tmp_path, said, hub, name):
    """Files are downloaded one at a time, when needed, sorted by name."""
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = f"/datasets/HuggingFaceFW/{name}/resolve/main/sample/10BT"
    hub[f"{folder}/README.md"] = b""
    for i in (2, 1, 0):
        parquet.write_table(arrow.table({"text": [f"page {i}.{j} " * 99 for j in range(2)]}), tmp_path / "x")
        hub[f"{folder}/00{i}_00000.parquet"] = (tmp_path / "x").read_bytes()
    stream = SOURCES[name].documents(None, said.append)
    assert next(stream).text.startswith("page 0.0")
    assert [path.name for path in (tmp_path / "hub").rglob("*.parquet")] == ["000_00000.parquet"]
    assert [d.text[:8] for d in stream] == ["page 0.1", "page 1.0", "page 1.1", "page 2.0", "page 2.1"]


def test_a_hub_without_the_files(hub, said):
    with pytest.raises(LlmpyError, match="HuggingFaceFW/fineweb/sample/10BT: 404"):
        documents("fineweb", None, said)
    hub["/datasets/HuggingFaceFW/fineweb/resolve/main/sample/10BT/README.md"] = b""
    with pytest.raises(LlmpyError, match="HuggingFaceFW/fineweb/sample/10BT"):
        documents("fineweb", None, said)
