"""Files of records → one document each: JSON lines, JSON arrays, both compressed with gzip, and parquet.

record_fields.py reads their fields. Records are read one at a time, so memory is bounded by the longest record, even
for files that unpack to 1000 times their size.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LlmpyError, unreadable
from ..system.command import install
from ..system.words import count_of
from .chat_template import ChatTemplate, Spans
from .record_fields import ASSISTANT, CONTENT, KINDS, KNOWN, Reading, read_fields
from .shards import CHUNK, COUNTED, START, Shard
from .tokenizer import Tokenizer

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonlines": "jsonl", ".jl": "jsonl", ".json": "json"}
RECORD = re.compile(  # of known fields, maybe after others: in files of any name
    rb'(?s)(?:\xef\xbb\xbf)?\s*+(\[?)\s*+\{\s*(?:"[^"\\]*"\s*:\s*(?:"(?:[^"\\]|\\.)*"|[\w.+-]+|\{[^{}]*\}|\[[^][]*\])\s*,\s*)*'
    rb'"(?:%s)"\s*:' % "|".join(sorted(CONTENT)).encode()
)
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
ROWS = 64  # of a parquet file read at a time
LOOKED_AT = 1000  # counted stretches examined per shard
CHARACTERS = 1 << 16  # of a .json file read at a time, more for longer records
BETWEEN = re.compile(r"[\s,]*")  # records of a .json file


@dataclass(frozen=True)
class Document:
    """A text, its source, and which characters count in the loss (None: all)."""

    source: str
    text: str
    counted: Spans | None = None
    literal: Spans | bool = False  # where special tokens are text; True: everywhere
    rendered: bool = False  # by a chat template: no token precedes it

    def part(self, start: int, stop: int) -> Document:
        """Return characters [start, stop) as a document."""

        def cut(spans: Spans) -> Spans:
            return tuple((max(a, start) - start, min(b, stop) - start) for a, b in spans if a < stop and b > start)

        counted = None if self.counted is None else cut(self.counted)
        literal = self.literal if isinstance(self.literal, bool) else cut(self.literal)
        return replace(self, text=self.text[start:stop], counted=counted, literal=literal)


class NotText(LlmpyError):
    """A file that is not text, or whose first record has no known fields."""


class Tally:
    """How the records of files were read, for the log."""

    def __init__(self) -> None:
        self._files: defaultdict[str, Counter[str]] = defaultdict(Counter)  # layout, "": empty → file → records
        self._ignored: defaultdict[str, set[str]] = defaultdict(set)  # layout → names of fields

    def add(self, file: str, reading: Reading | None) -> None:
        """Count a record; None: an empty one."""
        layout, ignored = (reading.layout, reading.ignored) if reading else ("", set[str]())
        self._files[layout][file] += 1
        if ignored:
            self._ignored[layout] |= ignored

    def lines(self) -> Iterator[str]:
        """Yield a line for each layout: "a.json: 52,002 records, …"."""
        for layout, files in self._files.items():
            more = f" and {count_of(len(files) - 1, 'other file')}" if len(files) > 1 else ""
            count = count_of(files.total(), "record" if layout else "empty record")
            ignored = f" (ignored: {_some(self._ignored[layout])})" if self._ignored[layout] else ""
            yield f"{next(iter(files))}{more}: {count}{f', {layout}' if layout else ' left out'}{ignored}"


def kind_of(path: Path, start: bytes) -> str | None:
    """Return jsonl, json, jsonl.gz, json.gz or parquet by the first bytes and name of a file, None for others."""
    if start.startswith(PARQUET):
        return "parquet"
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if start.startswith(GZIP):
        kind = SUFFIXES.get(suffixes[0]) if len(suffixes) == 2 and suffixes[1] == ".gz" else None
        return kind and f"{kind}.gz"
    if start.startswith(WIDE):
        start = start.decode("utf-16", "ignore").encode("utf-8", "ignore")
    by_content = ("json" if found[1] else "jsonl") if (found := RECORD.match(start)) else None
    return SUFFIXES.get(path.suffix.lower(), by_content)


def read_records(
    path: Path, kind: str, tally: Tally | None = None, template: ChatTemplate | None = None
) -> Iterator[Document]:
    """Yield the documents of a file of `kind_of`, in order, without empty ones, and count them in `tally`.

    `template` formats messages.
    Raises LlmpyError, naming file, record and field, for corrupt files and records that cannot be used (NotText: the
    first record has no known fields, or a .json file is not JSON).
    """
    tally = tally or Tally()
    rows = enumerate(_parquet_rows(path), 1) if kind == "parquet" else json_records(path, kind)
    unit, of, name = "line" if kind.startswith("jsonl") else "record", str(path), path.name
    for index, (number, row) in enumerate(rows):
        where = f"{unit} {number:,} of {of}"
        if row is not None and (not isinstance(row, dict) or row and not row.keys() & CONTENT):
            found = f"has the fields {_some(row)}" if isinstance(row, dict) else "is not an object with fields"
            error = NotText if index == 0 else LlmpyError
            raise error("record.unknown-fields", f"{where} {found}", f"Give {KINDS}")
        try:
            reading = read_fields(where, row or {}, template)
        except RecursionError as error:
            raise LlmpyError("record.invalid", f"{where} is nested too deeply", f"Give {KINDS}") from error
        tally.add(name, reading)
        for part in reading.parts if reading else ():
            yield Document(f"{of}:{number}", *part, rendered=part.literal is not True)


def json_records(path: Path, kind: str = "jsonl") -> Iterator[tuple[int, Any]]:
    """Yield number and value of each non-blank line, or of each element of an array or value (`kind`: json).

    Raises LlmpyError if the file is corrupt, NotText if nothing in a .json file is JSON.
    """
    number, lines = 0, kind.startswith("jsonl")
    try:
        with gzip.open(path) if kind.endswith(".gz") else path.open("rb") as file:
            wide = file.peek(2)[:2] in WIDE
            if lines:
                rows: Iterable[str | bytes] = io.TextIOWrapper(file, "utf-16", newline="\n") if wide else file
                for number, line in enumerate(rows, 1):
                    if line.strip():
                        yield number, json.loads(line)
            else:
                text = io.TextIOWrapper(file, "utf-16" if wide else "utf-8-sig")
                for number, value in enumerate(_values(text.read), 1):
                    yield number, value
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise LlmpyError("file.corrupt", f"{path} is cut off or corrupt", "Download or compress it again") from error
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        where = f"line {number:,}" if lines else f"record {number + 1:,}"
        known = {RecursionError: "it is nested too deeply", UnicodeDecodeError: "it is not UTF-8"}
        wrong = (
            f"column {error.colno:,} is wrong" if isinstance(error, json.JSONDecodeError) else "a number is too long"
        )
        why = known.get(type(error), wrong)
        kind_of_error = LlmpyError if lines or number else NotText
        hint = "Write one JSON object per line, or an array of objects"
        raise kind_of_error("record.not-json", f"{where} of {path} is not JSON: {why}", hint) from error


def _values(read: Callable[[int], str]) -> Iterator[Any]:
    """Yield the elements of an array, or all values, of a JSON text. Raises ValueError or RecursionError.

    A value that the text read so far cuts off is decoded again with twice as much text: in linear time.
    """
    decode, text = json.JSONDecoder().raw_decode, read(CHARACTERS).lstrip()
    array = text.startswith("[")
    at = int(array)
    while True:
        at = BETWEEN.match(text, at).end()  # type: ignore[union-attr]
        if array and text.startswith("]", at):
            if text[at + 1 :].strip() or any(more.strip() for more in iter(lambda: read(CHARACTERS), "")):
                raise json.JSONDecodeError("Extra data after the array", text, at)
            return
        try:
            value, at = decode(text, at)
        except json.JSONDecodeError as error:
            cut_off = error.msg.startswith("Unterminated string") or error.pos > len(text) - 16
            if not (more := read(max(CHARACTERS, len(text) - at)) if cut_off else ""):
                if at == len(text) and not array:
                    return
                raise
            text, at = text[at:] + more, 0
        else:
            yield value


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
            if not names & CONTENT:
                raise NotText(
                    "record.unknown-fields", f"{path} has the columns {_some(names)}", f"Give columns named {KINDS}"
                )
            unread = dict.fromkeys(names - KNOWN, True)  # columns: only named in the log
            for batch in file.iter_batches(ROWS, columns=sorted(names & KNOWN), use_threads=False):
                yield from (unread | row for row in batch.to_pylist())
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        raise LlmpyError("file.corrupt", f"{path} is corrupt: {error}", "Download it again") from error


def holds_answers(shard: Shard, tokenizer: Tokenizer) -> bool:
    """Return whether a counted stretch starts where an assistant message does; any if there is a chat template."""
    if tokenizer.template is not None:
        return next(begins(shard), None) is not None
    head = f"{ASSISTANT}: "
    places = islice(begins(shard), LOOKED_AT)
    return any(tokenizer.decode(shard.tokens[max(0, i - len(head)) : i].tolist()).endswith(head) for i in places)


def question(shards: Sequence[Shard], tokenizer: Tokenizer, most: int) -> list[int]:
    """Return the tokens before the first answer, if only answers count, else none.

    At most `most` tokens, none of an earlier document.
    """
    for shard in shards:
        for place in begins(shard):
            first = max(0, place - most)
            if shard.packed and shard.mask is not None:
                first += max(np.flatnonzero(shard.mask[first:place] & START).tolist(), default=0)
            before: list[int] = shard.tokens[first:place].tolist()
            while tokenizer.template is None and tokenizer.eot in before[1:]:  # in chats it may end each message
                before = before[before.index(tokenizer.eot, 1) :]
            return before
    return []


def begins(shard: Shard) -> Iterator[int]:
    """Yield each position where tokens of a document start to count after others that do not.

    A first token does not count if there is padding before it, so the second starts nothing.
    """
    if shard.mask is not None:
        for start in range(0, len(shard), CHUNK):
            stretch = shard.mask[start : start + CHUNK + 1]
            yield from (start + 1 + np.flatnonzero((stretch[:-1] == 0) & (stretch[1:] == COUNTED))).tolist()


def _some(names: Any) -> str:
    """Return the first names, shortened, since files can contain any."""
    listed = sorted(map(str, names))
    return ", ".join(name[:30] for name in listed[:6]) + (", …" if len(listed) > 6 else "")
