"""HellaSwag examples (a context with four endings, one correct) and llm.c's file format for them.

Header of 256 int32: 20240522, 1, number of examples, bytes of the longest. Then uint16, for each example:
65535 · its bytes · its index · label · 4 · n · n tokens of context · 4 times (n · n tokens of an ending).
The context is encoded unchanged, each ending with a leading space.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LlmpyError, unreadable
from ..system.command import command
from ..system.durable import write_whole
from .magic import EXAMPLES, HEADER_BYTES
from .records import json_records
from .tokenizer import Tokenizer

VERSION = 1
DELIMITER, ENDINGS = 65535, 4
WORD = np.dtype("<u2")


@dataclass(frozen=True)
class Example:
    """A context and its endings, uint16 (n,) each; `label` is the index of the correct ending."""

    context: np.ndarray
    endings: tuple[np.ndarray, ...]
    label: int


def encode_examples(path: Path, tokenizer: Tokenizer) -> Iterator[Example]:
    """Yield the examples of HellaSwag's jsonl. Raises LlmpyError, with the line number, for invalid lines."""
    lines = json_records(path)
    while rows := list(itertools.islice(lines, 1024)):
        texts = [text for number, row in rows for text in _texts(path, number, row)]
        ids = iter([np.array(row, np.int64) for row in tokenizer.encode_batch(texts)])
        for _, row in rows:
            yield Example(next(ids), tuple(itertools.islice(ids, ENDINGS)), row["label"])


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write llm.c's file atomically. Raises LlmpyError for examples that do not fit the format."""
    if not examples:
        raise LlmpyError("hellaswag.empty", f"no examples to write to {path}", "Give at least one")
    body = [_packed(path, i, example) for i, example in enumerate(examples)]
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:4] = EXAMPLES, VERSION, len(body), max(map(len, body))
    write_whole(path, lambda temporary: temporary.write_bytes(header.tobytes() + b"".join(body)))


def read_examples(path: Path, vocab_size: int) -> list[Example]:
    """Read llm.c's file and check all of it, tokens included. Raises LlmpyError if it is corrupt."""
    examples, at = [], 0
    try:
        content = path.read_bytes()
        header = np.frombuffer(content[:16], "<i4").tolist()
        if header[:2] != [EXAMPLES, VERSION]:
            raise ValueError(f"it starts with {header[:2]} instead of {[EXAMPLES, VERSION]}")
        stream = np.frombuffer(content, WORD, offset=HEADER_BYTES)
        for i in range(header[2]):
            example, at = _example(stream, at, i, vocab_size)
            examples.append(example)
        if at != len(stream):
            raise ValueError(f"{2 * (len(stream) - at):,} bytes after the last example")
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, IndexError, OverflowError) as error:
        message = f"{path} is not a multiple-choice file of llm.c: {error}"
        raise LlmpyError("hellaswag.corrupt", message, f"Write it again: {command('data', 'hellaswag')}") from error
    return examples


def _example(stream: np.ndarray, at: int, i: int, vocab_size: int) -> tuple[Example, int]:
    """Return example i, which starts at `at`, and its end. Raises ValueError or IndexError if it is corrupt."""
    words = stream[at : at + 5].tolist()
    delimiter, size, index, label, endings = words
    if (delimiter, index, endings) != (DELIMITER, i, ENDINGS) or label >= ENDINGS:
        raise ValueError(f"example {i:,} starts with {words}")
    parts, stop = [], at + 5
    for _ in range(1 + ENDINGS):
        n = int(stream[stop])
        part = stream[stop + 1 : stop + 1 + n]
        if n == 0 or len(part) < n:
            raise ValueError(f"a part of example {i:,} has {len(part):,} of {n:,} tokens")
        if part.max() >= vocab_size:
            raise ValueError(f"example {i:,} has token {part.max()}, the vocabulary has {vocab_size:,}")
        parts.append(part)
        stop += 1 + n
    if 2 * (stop - at) != size:
        raise ValueError(f"example {i:,} has {2 * (stop - at):,} bytes instead of {size:,}")
    return Example(parts[0], tuple(parts[1:]), label), stop


def _texts(path: Path, number: int, row: Any) -> list[str]:
    """Return context and endings of a line, as encoded. Raises LlmpyError if it is not an example."""
    try:
        texts = [row["ctx"], *(" " + ending for ending in row["endings"])]
        valid = len(texts) == 1 + ENDINGS and isinstance(texts[0], str) and isinstance(row["endings"], list)
        valid = valid and type(row["label"]) is int and row["label"] in range(ENDINGS)
    except (TypeError, KeyError):
        valid = False
    if not valid:
        message = (
            f"line {number:,} of {path} is not a HellaSwag example (ctx, {ENDINGS} endings, label 0–{ENDINGS - 1})"
        )
        raise LlmpyError("hellaswag.invalid-line", message, "Give the original hellaswag_val.jsonl")
    return texts


def _packed(path: Path, index: int, example: Example) -> bytes:
    parts = example.context, *example.endings
    words = [DELIMITER, 0, index, example.label, ENDINGS]
    for part in parts:
        words += [len(part), *part.tolist()]
    words[1] = 2 * len(words)
    if not all(map(len, parts)) or max(words[1:]) >= DELIMITER:
        message = f"{path}: example {index:,} has an empty part, or does not fit 16 bits"
        raise LlmpyError("hellaswag.unencodable", message, "Leave it out, or use a smaller vocabulary")
    return np.array(words, WORD).tobytes()
