"""Records of jsonl, jsonl.gz and parquet → one document each.

    {"text": …}                                   all of it counts in the loss
    {"prompt": …, "completion": …}                one text; the completion counts
    {"messages": [{"role": …, "content": …}, …]}  "role: content" and a blank line for each; the assistant's content
                                                  counts, with the blank line after it

Records are read one at a time, so memory is bounded by the longest record, even for files that unpack to 1000 times
their size.
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
ROWS = 64  # of a parquet file read at a time
ASSISTANT = "assistant"  # the role that counts
LOOKED_AT = 1000  # counted stretches examined per shard
KINDS = "text, prompt and completion, or messages"


@dataclass(frozen=True)
class Document:
    """A text, its source, and which characters count in the loss (None: all)."""

    source: str
    text: str
    counted: tuple[tuple[int, int], ...] | None = None  # [start, stop), ascending

    def part(self, start: int, stop: int) -> Document:
        """Return characters [start, stop) as a document."""
        spans = self.counted
        if spans is not None:
            cut = ((max(a, start) - start, min(b, stop) - start) for a, b in spans)
            spans = tuple((a, b) for a, b in cut if a < b)
        return Document(self.source, self.text[start:stop], spans)


class NotText(LlmpyError):
    """A file that is not text, or a first record without known fields."""


def kind_of(path: Path, start: bytes) -> str | None:
    """Return "jsonl", "jsonl.gz" or "parquet" by the first bytes and name of a file, None for others."""
    if start.startswith(PARQUET):
        return "parquet"
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if start.startswith(GZIP):
        return "jsonl.gz" if len(suffixes) == 2 and suffixes[0] in SUFFIXES and suffixes[1] == ".gz" else None
    return "jsonl" if suffixes and suffixes[-1] in SUFFIXES else None


def read_records(path: Path, kind: str) -> Iterator[Document]:
    """Yield the documents of a file of `kind_of`, in order, without empty ones.

    Raises LlmpyError, naming file and record, for corrupt files and records without known fields (the first: NotText).
    """
    rows = _parquet_rows(path) if kind == "parquet" else (v for _, v in json_lines(path, packed=kind == "jsonl.gz"))
    for number, row in enumerate(rows, 1):
        document = _document(path, number, row)
        if document.text.strip():
            yield document


def json_lines(path: Path, packed: bool = False) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each non-blank line. Raises LlmpyError if the file is corrupt."""
    number = 0
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, json.loads(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise LlmpyError("file.corrupt", f"{path} is corrupt: {error}", "Download or compress it again") from error
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:  # also invalid UTF-8
        message = f"line {number:,} of {path} is not JSON: {error}"
        raise LlmpyError("record.not-json", message, "Write one JSON object per line") from error


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        hint = f"Install it: {install('llmpy[parquet]')}"
        raise LlmpyError("package.missing", f"{path} is parquet, which requires pyarrow", hint) from None
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            names = set(file.schema_arrow.names)
            columns = next((w for w in (["text"], ["prompt", "completion"], ["messages"]) if names >= set(w)), None)
            if columns is None:
                raise NotText(
                    "record.unknown-fields", f"{path} has the columns {_some(names)}", f"Give columns named {KINDS}"
                )
            for batch in file.iter_batches(ROWS, columns=columns, use_threads=False):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        raise LlmpyError("file.corrupt", f"{path} is corrupt: {error}", "Download it again") from error


def _document(path: Path, number: int, row: Any) -> Document:
    """Return the document of a record, by its fields."""
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
        why = f"a message without {error}" if isinstance(error, KeyError) else str(error)
        message = f"record {number:,} of {path} is invalid: {why}"
        raise LlmpyError("record.invalid", message, f"Give {KINDS}") from error
    found = f"has the fields {_some(fields)}" if fields else f"is {type(row).__name__}, not an object"
    kind = NotText if number == 1 else LlmpyError
    raise kind("record.unknown-fields", f"record {number:,} of {path} {found}", f"Give {KINDS}")


def conversation(source: str, messages: Sequence[Mapping[str, Any]]) -> Document:
    """Return `role: content` and a blank line for each message; the assistant's content counts.

    Raises TypeError or KeyError for invalid messages, UnicodeEncodeError for lone surrogates.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise TypeError("messages is not a list of objects")
    text, counted = "", []
    for message in messages:
        role, content = _string(message["role"]), message["content"]
        if isinstance(content, list):  # in parts; only text is used
            content = "".join(_string(part["text"]) for part in content if part["type"] == "text")
        text += f"{role}: "
        start = len(text)
        text += _string(content) + "\n\n"
        if role == ASSISTANT:
            counted.append((start, len(text)))
    return Document(source, text, tuple(counted))


def holds_answers(shard: Shard, tokenizer: Tokenizer) -> bool:
    """Return whether a counted stretch starts where an assistant message does."""
    head = f"{ASSISTANT}: "
    places = islice(begins(shard), LOOKED_AT)
    return any(tokenizer.decode(shard.tokens[max(0, i - len(head)) : i].tolist()).endswith(head) for i in places)


def question(shards: Sequence[Shard], tokenizer: Tokenizer, most: int) -> list[int]:
    """Return the tokens before the first answer, if only answers count, else none.

    At most `most` tokens, none of an earlier document.
    """
    for shard in shards:
        for place in begins(shard):
            before: list[int] = shard.tokens[max(0, place - most) : place].tolist()
            while tokenizer.eot in before[1:]:
                before = before[before.index(tokenizer.eot, 1) :]
            return before
    return []


def begins(shard: Shard) -> Iterator[int]:
    """Yield each position where tokens start to count after others that do not."""
    if shard.counted is not None:
        for start in range(0, len(shard), CHUNK):
            stretch = shard.counted[start : start + CHUNK + 1].view(np.int8)
            yield from (start + 1 + np.flatnonzero(np.diff(stretch) > 0)).tolist()


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} instead of a string")
    value.encode("utf-8")  # JSON can spell a lone surrogate: \ud800
    return value


def _some(names: Any) -> str:
    """Return the first names, shortened, since files can contain any."""
    listed = sorted(map(str, names))
    return ", ".join(name[:30] for name in listed[:6]) + (", …" if len(listed) > 6 else "")
