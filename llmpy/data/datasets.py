"""Named datasets: sources, documents, and llm.c's file names and validation splits.

tinyshakespeare   one document per speech; the first 32,768 tokens are held out
tinystories       one document per story, shuffled within each of 50 files; the first file is held out
fineweb           10 billion tokens of the web in shards of 10⁸; the first shard is held out
fineweb-edu       the same, of educational pages
hellaswag         10,042 contexts with four endings each, for evaluation only

For tinystories, llm.c's script sorts the files by name and holds out the first. It shuffles each file with Python's
generator, seed 1337 + i, where i counts from 0 in each split. Its workers append the training files in any order; here
they are sorted by name. In all these datasets, `<|endoftext|>` within a text is encoded as ordinary text.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import LlmpyError
from ..system.cache import data_cache
from ..system.download import fetch, from_hub, hub_files
from .file_roles import choose
from .records import Document
from .text import read_text, stream_files

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
HELLASWAG = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
HELLASWAG_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
STORIES, STORIES_ARCHIVE = "roneneldan/TinyStories", "TinyStories_all_data.tar.gz"
STORIES_SHA256 = "26cf7605aca15bc4ea6fa637256400d9d01317b28ed296172b2d1dd160cd7699"
STORIES_FILE = re.compile(r"data\d\d\.json")
SHARD_TOKENS = 100_000_000
Log = Callable[[str], None]


@dataclass(frozen=True)
class Layout:
    """The validation split and the names of the token files."""

    val: int | str | None  # held out: the first N tokens, the documents of this file, or (None) the last tenth
    val_name: str = "val.bin"
    train_name: str = "train.bin"  # {}: number of the shard, from 1
    one_file: bool = False  # a single training file if llm.c can read one of this size


@dataclass(frozen=True)
class Source:
    """A named dataset. `documents(raw, log)` yields those of the file or folder `raw` (None: downloads them)."""

    layout: Layout
    documents: Callable[[Path | None, Log], Iterator[Document]]
    portion: int | None = None  # tokens that `llmpy train` encodes if it finds none; None: all


def hellaswag_lines(raw: Path | None, log: Log) -> Path:
    """Return the path of HellaSwag's jsonl; download it if `raw` is None."""
    return raw or fetch(HELLASWAG, data_cache() / "raw" / "hellaswag_val.jsonl", HELLASWAG_SHA256, log)


def _from_hub(repository: str, name: str, kept: str, log: Log, sha256: str | None = None) -> Path:
    """Return the path of a file of a hub dataset; `kept`: its name in the cache of llmpy 0.1.0."""
    old = data_cache() / "raw" / kept
    return old if old.is_file() else from_hub(repository, name, log, dataset=True, sha256=sha256)


def _shakespeare(raw: Path | None, log: Log) -> Iterator[Document]:
    path = raw or fetch(SHAKESPEARE, data_cache() / "raw" / "tinyshakespeare.txt", SHAKESPEARE_SHA256, log)
    *speeches, last = read_text(path).split("\n\n")
    yield from (Document("tinyshakespeare", speech + "\n\n") for speech in speeches)
    yield Document("tinyshakespeare", last)


def _stories(raw: Path | None, log: Log) -> Iterator[Document]:
    path = raw or _from_hub(STORIES, STORIES_ARCHIVE, STORIES_ARCHIVE, log, STORIES_SHA256)
    with _unpacked(path) as folder:
        listed = folder.glob("*.json") if folder.is_dir() else [folder]
        files = sorted(file for file in listed if STORIES_FILE.fullmatch(file.name))
        if not files:
            hint = f"Give {STORIES_ARCHIVE}, or the folder it unpacks to"
            raise LlmpyError("dataset.incomplete", f"{path} has no data00.json, data01.json …", hint)
        for file in files:
            try:
                stories = [story["story"].strip() for story in json.loads(file.read_bytes())]
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                message = f"{file.name} in {path} is not a list of stories"
                raise LlmpyError("dataset.corrupt", message, "Download it again") from error
            # data00.json (held out) and data01.json (first of training) have the same seed
            random.Random(1337 + max(0, int(file.name[4:6]) - 1)).shuffle(stories)
            yield from (Document(file.name, story) for story in stories)


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """Yield `path`, or a temporary folder in the cache with its files if it is an archive (6.5 GB, in any order)."""
    if path.is_dir() or path.suffix == ".json":
        yield path
        return
    data_cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_cache()) as folder:
        try:
            with tarfile.open(path, "r|*") as archive:
                for member in archive:
                    name = Path(member.name).name
                    if STORIES_FILE.fullmatch(name) and (content := archive.extractfile(member)):
                        with Path(folder, name).open("wb") as file:
                            shutil.copyfileobj(content, file)
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            hint = "Download it again. It unpacks to 6.5 GB below LLMPY_DATA"
            raise LlmpyError("dataset.unpack-failed", f"cannot unpack the tar archive {path}: {error}", hint) from error
        yield Path(folder)


def _web(repository: str, name: str) -> Source:
    """Return the sample of 10 billion tokens; its parquet files are downloaded one at a time, when needed."""

    def documents(raw: Path | None, log: Log) -> Iterator[Document]:
        for file in [""] if raw else hub_files(repository, "sample/10BT"):
            kept = f"{repository.replace('/', '--')}/{Path(file).name}"
            path = raw or _from_hub(repository, file, kept, log)
            yield from stream_files(choose([path], log=log).train, log)

    layout = Layout(SHARD_TOKENS, f"{name}_val_000000.bin", name + "_train_{:06d}.bin")
    return Source(layout, documents, SHARD_TOKENS)


SOURCES = {
    "tinyshakespeare": Source(
        Layout(32_768, "tiny_shakespeare_val.bin", "tiny_shakespeare_train.bin", one_file=True), _shakespeare
    ),
    "tinystories": Source(
        Layout("data00.json", "TinyStories_val.bin", "TinyStories_train.bin", one_file=True), _stories
    ),
    "fineweb": _web("HuggingFaceFW/fineweb", "fineweb"),
    "fineweb-edu": _web("HuggingFaceFW/fineweb-edu", "edu_fineweb"),
}
