"""Documents → token ids: EOT, then the text, for each document.

Long texts are split at word boundaries, which changes no token: this spreads the work over all cores and bounds the
library's memory. Only in LONGEST characters without a boundary a word is cut, where a token may differ. Counted and
uncounted characters are encoded separately, so no token contains both.
"""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..system.workers import few
from .records import Document
from .tokenizer import Tokenizer

BORDER = re.compile(r"(?<=\S)[ \n]")  # GPT-2's pattern always starts a word here (not at \x1c!)
BLANK = re.compile(r"(?<=\S) ")  # for other patterns, which may join line ends to the preceding sign
NEVER = re.compile(r"(?!)")
PIECE = 1 << 12  # characters encoded at a time
LONGEST = 1 << 16  # at most, then a word is cut: one of 2 MB took 3.5 GB
TOKENIZER_SEES = 50_000_000  # characters to learn merges from: plenty, and 7 s of counting on two cores
BATCH = 1 << 18  # bytes per call of the library: 18.5M took 3.0 GB, and Ctrl-C waits for two
Piece = tuple[str, bool, bool]  # text, whether it starts a document, whether it counts


@dataclass(frozen=True)
class Tokens:
    """Token ids (n,), and which count as targets: bool (n,), None for all."""

    ids: np.ndarray
    counted: np.ndarray | None
    characters: int  # of text encoded


def encode(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[Tokens]:
    """Yield the tokens of all documents in order, in batches: uint16, or uint32 for large vocabularies.

    EOT counts as a target, since it ends the previous document. In literal documents special tokens are text.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    jobs = _jobs(tokenizer, documents)
    if few():
        yield from (_tokens(encoder, batch, dtype) for encoder, batch in jobs)
        return
    waiting: deque[Future[Tokens]] = deque()
    # Two batches overlap: the library encodes on all cores, but converts its input and output on one.
    pool = ThreadPoolExecutor(2)
    try:
        for encoder, batch in jobs:
            waiting.append(pool.submit(_tokens, encoder, batch, dtype))
            if len(waiting) > 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _jobs(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[tuple[Tokenizer, list[Piece]]]:
    """Yield batches, each with its tokenizer: in literal documents special tokens are text."""
    for literal, group in itertools.groupby(documents, lambda document: document.literal):
        encoder = tokenizer.ordinary() if literal else tokenizer
        border = BORDER if encoder.splits_as_gpt2 else BLANK
        for batch in _batches(group, border if encoder.starts_words(border) else NEVER):
            yield encoder, batch


def pieces(text: str, border: re.Pattern[str] = BORDER) -> Iterator[str]:
    """Split `text` at word boundaries into pieces of about PIECE characters, else at line ends, of LONGEST at most."""
    start = 0
    while len(text) - start > PIECE:
        end = start + LONGEST
        cut = border.search(text, start + PIECE, end)
        if not cut and end >= len(text):
            break
        stop = cut.start() if cut else text.rfind("\n", start + PIECE, end) + 1 or end
        yield text[start:stop]
        start = stop
    yield text[start:]


def _batches(documents: Iterable[Document], border: re.Pattern[str]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for document in documents:
        first = True
        for text, counts in _segments(document):
            for piece in pieces(text, border):
                batch.append((piece, first, counts))
                size += len(piece.encode("utf-8", "replace"))
                first = False
                if size >= BATCH:
                    yield batch
                    batch, size = [], 0
    if batch:
        yield batch


def _segments(document: Document) -> Iterator[tuple[str, bool]]:
    """Yield the consecutive segments of a document, and whether each counts."""
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
    texts, starts, counts = zip(*batch, strict=True)
    rows = tokenizer.encode_batch(texts)
    ids = np.empty(sum(map(len, rows)) + sum(starts), dtype)
    counted = None if all(counts) else np.ones(len(ids), bool)
    at = 0
    for row, first, counting in zip(rows, starts, counts, strict=True):
        if first:
            ids[at] = tokenizer.eot
            at += 1
        ids[at : at + len(row)] = row
        if counted is not None:
            counted[at : at + len(row)] = counting
        at += len(row)
    return Tokens(ids, counted, sum(map(len, texts)))
