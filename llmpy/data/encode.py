"""Documents → token ids: EOT and then the text, for each.

Long texts are encoded in pieces, cut where a word begins anyway, so that every core has its share and what the
library needs beside its input stays bounded. Characters that do not count in the loss are encoded apart from
those that do: no token is of both.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from .records import Document
from .tokenizer import Tokenizer

BORDER = re.compile(r"(?<=\S)[ \n]")  # a word of GPT-2's pattern always begins here (not at \x1c!)
BLANK = re.compile(r"(?<=\S) ")  # of other patterns: they let line ends belong to the sign before
PIECE = 1 << 12  # characters encoded at a time
TOKENIZER_SEES = 50_000_000  # characters to learn merges from: seven seconds of counting (two cores), and plenty
BATCH = 1 << 20  # characters handed to the library at once: 18.5M at once took it 3.0 GB
Piece = tuple[str, bool, bool]  # text, whether it begins a document, and whether it counts


@dataclass(frozen=True)
class Tokens:
    """Token ids (n,), and which of them count as targets: bool (n,), None for all."""

    ids: np.ndarray
    counted: np.ndarray | None
    characters: int  # of the text they stand for


def encode(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[Tokens]:
    """The tokens of all documents, a batch at a time, in order: uint16, or uint32 for large vocabularies.

    EOT counts, for it ends the document before it; so does the text of a document that names no part of it.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    waiting: deque[Future[Tokens]] = deque()
    # The library encodes a batch on all cores, but its way in and out takes one: so the next is already begun.
    with ThreadPoolExecutor(2) as pool:
        for batch in _batches(documents, BORDER if tokenizer.splits_as_gpt2 else BLANK):
            waiting.append(pool.submit(_tokens, tokenizer, batch, dtype))
            if len(waiting) > 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def pieces(text: str, border: re.Pattern[str] = BORDER) -> Iterator[str]:
    """`text` in portions of about PIECE characters, cut only where a word begins."""
    start = 0
    while len(text) - start > PIECE and (cut := border.search(text, start + PIECE)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _batches(documents: Iterable[Document], border: re.Pattern[str]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for document in documents:
        begins = True
        for text, counts in _segments(document):
            for piece in pieces(text, border):
                batch.append((piece, begins, counts))
                characters += len(piece)
                begins = False
                if characters >= BATCH:
                    yield batch
                    batch, characters = [], 0
    if batch:
        yield batch


def _segments(document: Document) -> Iterator[tuple[str, bool]]:
    """The stretches of a document that count, and those that do not."""
    if document.counted is None:
        yield document.text, True
        return
    at = 0
    for start, stop in document.counted:
        if at < start:
            yield document.text[at:start], False
        yield document.text[start:stop], True
        at = stop
    if at < len(document.text):
        yield document.text[at:], False


def _tokens(tokenizer: Tokenizer, batch: list[Piece], dtype: np.dtype) -> Tokens:
    texts, begins, counts = zip(*batch, strict=True)
    rows = tokenizer.encode_batch(texts)
    ids = np.empty(sum(map(len, rows)) + sum(begins), dtype)
    counted = None if all(counts) else np.ones(len(ids), bool)
    at = 0
    for row, first, counting in zip(rows, begins, counts, strict=True):
        if first:
            ids[at] = tokenizer.eot
            at += 1
        ids[at : at + len(row)] = row
        if counted is not None:
            counted[at : at + len(row)] = counting
        at += len(row)
    return Tokens(ids, counted, sum(map(len, texts)))
