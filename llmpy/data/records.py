"""Records of jsonl, jsonl.gz and parquet → documents, a record each.

    {"text": …}                                   all of it counts in the loss
    {"prompt": …, "completion": …}                one text; the completion counts
    {"messages": [{"role": …, "content": …}, …]}  "role: content" and a blank line for each; what the assistant
                                                  says counts, with the blank line that ends it

Records are read one after another: a file that unpacks to a thousand times its size needs no more memory
than its longest record.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LlmpyError, unreadable
from ..system.command import install
from .shards import CHUNK, Shard
from .tokenizer import Tokenizer

SUFFIXES = {".jsonl", ".ndjson"}
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
ROWS = 64  # of a parquet file at a time
ASSISTANT = "assistant"  # whose words count
LOOKED_AT = 1000  # stretches that count, of each shard
KINDS = "text, prompt and completion, or messages"


@dataclass(frozen=True)
class Document:
    """One text, the name of what it came from, and which characters count in the loss (None: all)."""

    source: str
    text: str
    counted: tuple[tuple[int, int], ...] | None = None  # [start, stop), ascending

    def part(self, start: int, stop: int) -> Document:
        """Characters [start, stop)."""
        spans = self.counted
        if spans is not None:
            cut = ((max(a, start) - start, min(b, stop) - start) for a, b in spans)
            spans = tuple((a, b) for a, b in cut if a < b)
        return Document(self.source, self.text[start:stop], spans)


class NotText(LlmpyError):
    """A file that is something else; of records the first has none of the known fields."""


def kind_of(path: Path, start: bytes) -> str | None:
    """ "jsonl", "jsonl.gz" or "parquet" by how a file begins and is named; None: none of them."""
    if start.startswith(PARQUET):
        return "parquet"
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if start.startswith(GZIP):
        return "jsonl.gz" if len(suffixes) == 2 and suffixes[0] in SUFFIXES and suffixes[1] == ".gz" else None
    return "jsonl" if suffixes and suffixes[-1] in SUFFIXES else None


def read_records(path: Path, kind: str) -> Iterator[Document]:
    """The documents of a file of `kind_of`, in order; empty texts are left out.

    Raises LlmpyError, naming file and record, for damage and for records without known fields (NotText if
    it is the first).
    """
    rows = _parquet_rows(path) if kind == "parquet" else (v for _, v in json_lines(path, packed=kind == "jsonl.gz"))
    for number, row in enumerate(rows, 1):
        document = _document(path, number, row)
        if document.text.strip():
            yield document


def json_lines(path: Path, packed: bool = False) -> Iterator[tuple[int, Any]]:
    """Yield line number and value of each line that is not blank. Raises LlmpyError for damage."""
    number = 0
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, json.loads(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise LlmpyError("data.x", f"{path} is cut off or damaged: {error}", "Download or pack it again") from error
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:  # no UTF-8 is a ValueError too
        raise LlmpyError(
            "data.x", f"{path}: line {number:,} is not JSON: {error}", "Give one JSON object a line"
        ) from error


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise LlmpyError(
            "data.x", f"{path} is parquet, which needs the pyarrow library", f"Install it: {install('llmpy[parquet]')}"
        ) from None
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            names = set(file.schema_arrow.names)
            wanted = next((w for w in (["text"], ["prompt", "completion"], ["messages"]) if names >= set(w)), None)
            if wanted is None:
                raise NotText("data.x", f"{path} has the columns {_some(names)}", f"Give columns named {KINDS}")
            for batch in file.iter_batches(ROWS, columns=wanted, use_threads=False):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        raise LlmpyError("data.x", f"{path} is no readable parquet file: {error}", "Download it again") from error


def _document(path: Path, number: int, row: Any) -> Document:
    """What a record says, by its fields."""
    fields = row if isinstance(row, dict) else {}
    source = f"{path}:{number}"
    try:
        if "text" in fields:
            return Document(source, _string(fields["text"]))
        if "prompt" in fields and "completion" in fields:
            prompt, completion = _string(fields["prompt"]), _string(fields["completion"])
            return Document(source, prompt + completion, ((len(prompt), len(prompt) + len(completion)),))
        if "messages" in fields:
            return conversation(source, fields["messages"])
    except (TypeError, KeyError, UnicodeEncodeError) as error:
        what = f"no {error} in a message" if isinstance(error, KeyError) else str(error)
        raise LlmpyError("data.x", f"{path}: record {number:,}: {what}", f"Give {KINDS}") from error
    what = f"the fields {_some(fields)}" if fields else f"{type(row).__name__}, no object"
    raise (NotText if number == 1 else LlmpyError)("data.x", f"{path}: record {number:,} has {what}", f"Give {KINDS}")


def conversation(source: str, messages: Sequence[Mapping[str, Any]]) -> Document:
    """Write `role: content` and a blank line for each message; the assistant's words count.

    Raises TypeError and KeyError for what is no list of messages, UnicodeEncodeError for half a character.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise TypeError("messages that are no list of objects")
    text, counted = "", []
    for message in messages:
        role, content = _string(message["role"]), message["content"]
        if isinstance(content, list):  # parts, of which the textual ones are taken
            content = "".join(_string(part["text"]) for part in content if part["type"] == "text")
        text += f"{role}: "
        start = len(text)
        text += _string(content) + "\n\n"
        if role == ASSISTANT:
            counted.append((start, len(text)))
    return Document(source, text, tuple(counted))


def holds_answers(shard: Shard, tokenizer: Tokenizer) -> bool:
    """Whether something that counts begins where an assistant speaks."""
    head = f"{ASSISTANT}: "
    places = islice(begins(shard), LOOKED_AT)
    return any(tokenizer.decode(shard.tokens[max(0, i - len(head)) : i].tolist()).endswith(head) for i in places)


def question(shards: Sequence[Shard], tokenizer: Tokenizer, most: int) -> list[int]:
    """What stands before the first answer of shards in which answers alone count: at most so many tokens, from the end
    of another document on; of other shards nothing.
    """
    for shard in shards:
        for place in begins(shard):
            before: list[int] = shard.tokens[max(0, place - most) : place].tolist()
            while tokenizer.eot in before[1:]:
                before = before[before.index(tokenizer.eot, 1) :]
            return before
    return []


def begins(shard: Shard) -> Iterator[int]:
    """Where tokens begin to count, after others that do not."""
    if shard.counted is not None:
        for start in range(0, len(shard), CHUNK):
            stretch = shard.counted[start : start + CHUNK + 1].view(np.int8)
            yield from (start + 1 + np.flatnonzero(np.diff(stretch) > 0)).tolist()


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} instead of a text")
    value.encode("utf-8")  # JSON can spell half a character: \ud800
    return value


def _some(names: Any) -> str:
    """The first names, shortened: they are whatever the file says."""
    listed = sorted(map(str, names))
    return ", ".join(name[:30] for name in listed[:6]) + (", …" if len(listed) > 6 else "")
