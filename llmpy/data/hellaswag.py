"""HellaSwag: contexts with four endings each, one of them right; and llm.c's file of them.

256 int32 of header: 20240522, 1, number of examples, bytes of the longest; then a stream of uint16, for each example
65535 · its bytes · its index · label · 4 · n · n tokens of context · 4 times (n · n tokens of an ending).
The context is encoded as it is, every ending with a blank in front.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import LlmpyError
from ..system.durable import write_whole
from .magic import EXAMPLES, HEADER_BYTES
from .records import json_lines
from .tokenizer import Tokenizer

VERSION = 1
DELIMITER, ENDINGS = 65535, 4
EXAMPLES_AT_MOST = 65535
WORD = np.dtype("<u2")


@dataclass(frozen=True)
class Example:
    """A context, its endings and which of them is right: uint16 (n,) each."""

    context: np.ndarray
    endings: tuple[np.ndarray, ...]
    label: int


class Examples:
    """The examples of a file, memory-mapped and checked: `len`, and `[i]`."""

    def __init__(self, stream: np.ndarray, starts: np.ndarray) -> None:
        self._stream, self._starts = stream, starts

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Example:
        at = int(self._starts[i])
        parts = []
        label = int(self._stream[at + 3])
        at += 5
        for _ in range(1 + ENDINGS):
            n = int(self._stream[at])
            parts.append(self._stream[at + 1 : at + 1 + n])
            at += 1 + n
        return Example(parts[0], tuple(parts[1:]), label)


def encode_examples(path: Path, tokenizer: Tokenizer) -> Iterator[Example]:
    """The examples of HellaSwag's jsonl. Raises LlmpyError, naming the line, for anything else."""
    lines = json_lines(path)
    while rows := list(itertools.islice(lines, 1024)):
        texts = [text for number, row in rows for text in _texts(path, number, row)]
        ids = iter([np.array(row, np.int64) for row in tokenizer.encode_batch(texts)])
        for _, row in rows:
            yield Example(next(ids), tuple(itertools.islice(ids, ENDINGS)), row["label"])


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write llm.c's file, whole or not at all. Raises LlmpyError for what it cannot hold."""
    if not 0 < len(examples) <= EXAMPLES_AT_MOST:
        raise LlmpyError(f"{path}: {len(examples):,} examples", f"give 1 to {EXAMPLES_AT_MOST:,}")
    body = [_packed(path, i, example) for i, example in enumerate(examples)]
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:4] = EXAMPLES, VERSION, len(body), max(map(len, body))
    write_whole(path, lambda temporary: temporary.write_bytes(header.tobytes() + b"".join(body)))


def read_examples(path: Path, vocab_size: int) -> Examples:
    """Map llm.c's file into memory and check all of it, tokens included.

    Raises LlmpyError, naming the example, for any damage.
    """
    try:
        size = path.stat().st_size
        if size < HEADER_BYTES + 2 or size % 2:
            raise _damaged(path, f"{size:,} bytes cannot be whole")
        header = np.fromfile(path, "<i4", 4)
        magic, version, count, longest = (int(word) for word in header)
        if magic != EXAMPLES or version != VERSION:
            raise _damaged(path, f"it begins with {magic}, {version} instead of {EXAMPLES}, {VERSION}")
        stream = np.memmap(path, WORD, "r", offset=HEADER_BYTES)
    except OSError as fault:
        raise LlmpyError(f"cannot read {path}: {fault.strerror or fault}", "check the path") from fault
    least = 5 + 2 * (1 + ENDINGS)
    if not 0 < count <= EXAMPLES_AT_MOST or count * least > len(stream):
        raise _damaged(path, f"{count:,} examples do not fit its {size:,} bytes")
    starts = np.zeros(count, np.int64)
    at = 0
    for i in range(count):
        starts[i] = at
        at = _check_example(path, stream, at, i, vocab_size, longest)
    if at != len(stream):
        raise _damaged(path, f"{2 * (len(stream) - at):,} bytes after the last example")
    return Examples(stream, starts)


def _check_example(path: Path, stream: np.ndarray, at: int, i: int, vocab_size: int, longest: int) -> int:
    """Where the example at `at` ends, if it is one."""
    words = stream[at : at + 5].tolist()
    if len(words) < 5:
        raise _damaged(path, f"example {i:,} is cut off")
    delimiter, size, index, label, endings = words
    if (delimiter, index, endings) != (DELIMITER, i, ENDINGS) or label >= ENDINGS:
        raise _damaged(path, f"example {i:,} begins with {words}")
    stop = at + size // 2
    if size % 2 or stop > len(stream) or size > longest:
        raise _damaged(path, f"example {i:,} claims {size:,} bytes")
    part = at + 5
    for _ in range(1 + ENDINGS):
        n = int(stream[part]) if part < stop else 0
        if not n or part + 1 + n > stop:
            raise _damaged(path, f"the parts of example {i:,} do not fit it")
        tokens = stream[part + 1 : part + 1 + n]
        if tokens.max() >= vocab_size:
            raise _damaged(path, f"example {i:,} holds token {tokens.max()}, the vocabulary has {vocab_size:,}")
        part += 1 + n
    if part != stop:
        raise _damaged(path, f"the parts of example {i:,} do not fill it")
    return stop


def _texts(path: Path, number: int, row: object) -> list[str]:
    """Context and endings of a line, as they are encoded."""
    fields = row if isinstance(row, dict) else {}
    context, endings, label = fields.get("ctx"), fields.get("endings"), fields.get("label")
    texts = [context, *endings] if isinstance(endings, list) else []
    right = type(label) is int and 0 <= label < ENDINGS
    if len(texts) != 1 + ENDINGS or not right or not all(isinstance(text, str) for text in texts):
        raise LlmpyError(
            f"{path}: line {number:,} is no example of HellaSwag (ctx, {ENDINGS} endings, label 0 … {ENDINGS - 1})",
            "give hellaswag_val.jsonl as it is downloaded",
        )
    return [texts[0], *(" " + ending for ending in texts[1:])]


def _packed(path: Path, index: int, example: Example) -> bytes:
    words = [DELIMITER, 0, index, example.label, len(example.endings)]
    for part in (example.context, *example.endings):
        words += [len(part), *part.tolist()]
    words[1] = 2 * len(words)
    fits = len(example.endings) == ENDINGS and 0 <= example.label < ENDINGS
    if not fits or min(map(len, (example.context, *example.endings))) == 0:
        raise LlmpyError(f"{path}: example {index:,} has no label, or an empty part", "leave it out")
    if max(words[1:]) >= DELIMITER or min(words) < 0:
        raise LlmpyError(
            f"{path}: example {index:,} ({words[1]:,} bytes, tokens up to {max(words[5:]):,}) does not fit 16 bits",
            "use a smaller vocabulary, or leave it out",
        )
    return np.array(words, WORD).tobytes()


def _damaged(path: Path, why: str) -> LlmpyError:
    return LlmpyError(f"{path} is not a multiple-choice file of llm.c: {why}", "download or write it again")
