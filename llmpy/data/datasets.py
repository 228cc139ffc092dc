"""Data sets that are known by name: where they are, what their documents are, how llm.c names and divides them.

tinyshakespeare   a document for each speech; the first 32,768 tokens are held out
tinystories       a document for each story, shuffled within each of 50 files; the first file is held out
fineweb           10 billion tokens of the web, in shards of 10⁸; the first is held out
fineweb-edu       the same, of pages that teach
hellaswag         10,042 contexts with four endings each, to evaluate on

Of tinystories, llm.c's script sorts the files by name, holds the first one out, and shuffles the list of each by
Python's generator with the seed 1337 + i, where i counts from 0 in each part anew. It joins what its workers make as it
comes: the order of the training files in TinyStories_train.bin is chance there, and that of their names here.
In all of these a text is encoded as it is: `<|endoftext|>` that somebody wrote is no end of a text.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import LlmpyError
from ..system.cache import data_cache
from ..system.download import fetch, hub
from .records import Document
from .text import find_files, read_text, stream_files

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
HELLASWAG = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
HELLASWAG_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
STORIES = "datasets/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz"
STORIES_BYTES = 1_608_001_638
STORIES_SHA256 = "26cf7605aca15bc4ea6fa637256400d9d01317b28ed296172b2d1dd160cd7699"
STORIES_FILE = re.compile(r"data\d\d\.json")
STORIES_AT_MOST = 1 << 30  # bytes of one of its files, which have 130 MB
SHARD_TOKENS = 100_000_000
Say = Callable[[str], None]


@dataclass(frozen=True)
class Layout:
    """What is held out, and how the token files are called."""

    val: int | str | None  # the first so many tokens, the documents of this file, or (None) the last tenth
    val_name: str = "val.bin"
    train_name: str = "train.bin"  # with {} for the number of a shard, from 1 on
    one_file: bool = False  # all of it to train on, if llm.c can read that


@dataclass(frozen=True)
class Source:
    """A named data set: `documents(raw, say)` are those of the file or folder `raw`, None: of the network."""

    layout: Layout
    documents: Callable[[Path | None, Say], Iterator[Document]]
    portion: int | None = None  # tokens that `llmpy train` makes if there are none; None: all


def hellaswag_lines(raw: Path | None, say: Say) -> Path:
    """HellaSwag's jsonl, downloaded if `raw` is None."""
    return raw or fetch(HELLASWAG, data_cache() / "raw" / "hellaswag_val.jsonl", sha256=HELLASWAG_SHA256, say=say)


def _shakespeare(raw: Path | None, say: Say) -> Iterator[Document]:
    path = raw or fetch(
        SHAKESPEARE,
        data_cache() / "raw" / "tinyshakespeare.txt",
        size=SHAKESPEARE_BYTES,
        sha256=SHAKESPEARE_SHA256,
        say=say,
    )
    if path.stat().st_size != SHAKESPEARE_BYTES:
        say(f"note: {path} is not the file that llm.c uses: it has {path.stat().st_size:,} bytes")
    *speeches, last = read_text(path).split("\n\n")
    yield from (Document("tinyshakespeare", speech + "\n\n") for speech in speeches)
    yield Document("tinyshakespeare", last)


def _stories(raw: Path | None, say: Say) -> Iterator[Document]:
    path = raw or fetch(
        f"{hub()}/{STORIES}",
        data_cache() / "raw" / "TinyStories_all_data.tar.gz",
        size=STORIES_BYTES,
        sha256=STORIES_SHA256,
        say=say,
    )
    found = False
    for name, content in _story_files(path):
        try:
            stories = [story["story"].strip() for story in json.loads(content)]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as fault:
            raise LlmpyError(f"{name} in {path} holds no list of stories", "download it again") from fault
        # data00.json and data01.json have the same seed: the one begins what is held out, the other what is trained on
        random.Random(1337 + max(0, int(name[4:6]) - 1)).shuffle(stories)
        found = True
        yield from (Document(name, story) for story in stories)
    if not found:
        raise LlmpyError(
            f"{path} holds no data00.json, data01.json …", "give TinyStories_all_data.tar.gz, or its folder"
        )


def _story_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files of an archive or folder, by name.

    An archive is decompressed once: a file that comes before its turn waits in a temporary one.
    """
    try:
        if path.is_dir() or path.suffix == ".json":
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            yield from ((file.name, file.read_bytes()) for file in files if STORIES_FILE.fullmatch(file.name))
            return
        with tarfile.open(path, "r|*") as archive, contextlib.ExitStack() as temporary:
            waiting: dict[str, IO[bytes]] = {}
            number = 0
            for member in archive:
                name = Path(member.name).name
                if not (member.isfile() and STORIES_FILE.fullmatch(name)):
                    continue
                if name in waiting or name < _numbered(number):
                    raise LlmpyError(f"{path} holds {name} twice", "download it again")
                if member.size > STORIES_AT_MOST:
                    raise LlmpyError(f"{path}: {name} has {member.size:,} bytes", "download it again")
                content = archive.extractfile(member)
                assert content is not None  # it is a file
                if name != _numbered(number):
                    waiting[name] = temporary.enter_context(_set_aside(content.read()))
                    continue
                yield name, content.read()
                number += 1
                while (name := _numbered(number)) in waiting:
                    yield name, _taken(waiting.pop(name))
                    number += 1
            yield from ((name, _taken(waiting[name])) for name in sorted(waiting))
    except (tarfile.TarError, EOFError, zlib.error) as fault:
        raise LlmpyError(f"{path} is no whole tar archive: {fault}", "download it again") from fault
    except OSError as fault:
        raise LlmpyError(f"cannot read {path}: {fault.strerror or fault}", "check the path") from fault


def _numbered(number: int) -> str:
    return f"data{number:02}.json"


def _set_aside(content: bytes) -> IO[bytes]:
    """A temporary file that holds this, to be read from its start; beside the downloads, for it may be large."""
    folder = data_cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        file.write(content)
        file.seek(0)
    except OSError as fault:
        raise LlmpyError(
            f"cannot write to {folder}: {fault.strerror or fault}", "free some space, or choose another by LLMPY_DATA"
        ) from fault
    return file


def _taken(file: IO[bytes]) -> bytes:
    """What was set aside; its room on the disk is free again."""
    with file:
        return file.read()


def _web(repository: str) -> Callable[[Path | None, Say], Iterator[Document]]:
    """The documents of a data set's sample of 10 billion tokens, file by file as they are needed."""

    def documents(raw: Path | None, say: Say) -> Iterator[Document]:
        if raw is not None:
            yield from stream_files(find_files([raw], say), say)
            return
        for entry in _listing(repository, "sample/10BT", say):
            name = Path(entry["path"]).name
            path = data_cache() / "raw" / repository.replace("/", "--") / name
            fetch(
                f"{hub()}/datasets/{repository}/resolve/main/{entry['path']}",
                path,
                size=entry["size"],
                sha256=entry["lfs"]["oid"],
                say=say,
            )
            yield from stream_files(find_files([path], say), say)

    return documents


def _listing(repository: str, folder: str, say: Say) -> list[dict[str, Any]]:
    """The parquet files of a folder, with `path`, `size` and sha256 (`lfs`, `oid`), in order.

    The hub is asked each time; without it the last list serves, for all that it names may be here.
    """
    path = data_cache() / "raw" / repository.replace("/", "--") / "listing.json"
    fresh = path.with_name(f"listing.{os.getpid()}.json")  # another process may ask too
    fresh.unlink(missing_ok=True)
    try:
        fetch(f"{hub()}/api/datasets/{repository}/tree/main/{folder}", fresh, say=say)
        found = _parquet_files(fresh, f"{repository}/{folder}")
        fresh.replace(path)
    except LlmpyError as fault:
        fresh.unlink(missing_ok=True)
        if not path.exists():
            raise
        say(f"note: going by an earlier list of {repository}: {str(fault).partition(' — ')[0]}")
        found = _parquet_files(path, f"{repository}/{folder}")
    return found


def _parquet_files(listing: Path, where: str) -> list[dict[str, Any]]:
    """What a list of the hub holds. Raises LlmpyError if it is not understood, or names no parquet file."""
    try:
        entries = [e for e in json.loads(listing.read_bytes()) if e["path"].endswith(".parquet")]
        for entry in entries:
            int(entry["size"]), str(entry["lfs"]["oid"])
    except (ValueError, TypeError, KeyError, AttributeError) as fault:
        raise LlmpyError(f"the hub's list of {where} is not understood", "try again later") from fault
    if not entries:
        raise LlmpyError(f"the hub lists no parquet files in {where}", "download them yourself: --source")
    return sorted(entries, key=lambda entry: str(entry["path"]))


SOURCES = {
    "tinyshakespeare": Source(
        Layout(32_768, "tiny_shakespeare_val.bin", "tiny_shakespeare_train.bin", one_file=True), _shakespeare
    ),
    "tinystories": Source(
        Layout("data00.json", "TinyStories_val.bin", "TinyStories_train.bin", one_file=True), _stories
    ),
    "fineweb": Source(
        Layout(SHARD_TOKENS, "fineweb_val_000000.bin", "fineweb_train_{:06d}.bin"),
        _web("HuggingFaceFW/fineweb"),
        SHARD_TOKENS,
    ),
    "fineweb-edu": Source(
        Layout(SHARD_TOKENS, "edu_fineweb_val_000000.bin", "edu_fineweb_train_{:06d}.bin"),
        _web("HuggingFaceFW/fineweb-edu"),
        SHARD_TOKENS,
    ),
}
