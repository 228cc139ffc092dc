"""Documents → token ids: EOT and the tokenizer's prefix, then the text, for each document.

The rendering of a chat template has no tokens but its own, and is encoded whole. Other long texts are split at word
boundaries, which changes no token: this spreads the work over all cores and bounds the library's memory. Only in
LONGEST characters without a boundary a word is cut, where a token may differ.

Counted and uncounted characters are encoded separately, so no token contains both. Renderings, and texts of
SentencePiece, which puts blanks in front, are encoded whole: a token with a counted character counts.
"""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..system.thread_limit import few
from .chat_template import Spans
from .record_fields import ASSISTANT, plain
from .record_fields import messages as read_messages
from .records import Document
from .tokenizer import BORDER, Tokenizer

PIECE = 1 << 12  # characters encoded at a time
LONGEST = 1 << 16  # at most, then a word is cut: one of 2 MB took 3.5 GB
TOKENIZER_SEES = 50_000_000  # characters to learn merges from: plenty, and 7 s of counting on two cores
BATCH = 1 << 18  # bytes per call of the library: 18.5M took 3.0 GB, and Ctrl-C waits for two


class Piece(NamedTuple):
    """A text to encode."""

    text: str
    literal: bool  # special tokens in it are text
    first: bool  # it starts a document
    rendered: bool  # by a chat template: no token precedes it
    counted: bool | Spans  # all of it, or these characters


@dataclass(frozen=True)
class Tokens:
    """Token ids (n,), and which count as targets: bool (n,), None for all."""

    ids: np.ndarray
    counted: np.ndarray | None
    starts: np.ndarray  # where documents start: int64, increasing
    characters: int  # of text encoded


def encode(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[Tokens]:
    """Yield the tokens of all documents in order, in batches: uint16, or uint32 for large vocabularies.

    EOT counts as a target, since it ends the previous document.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    jobs = _batches(tokenizer, documents)
    if few():
        yield from (_tokens(tokenizer, batch, dtype) for batch in jobs)
        return
    waiting: deque[Future[Tokens]] = deque()
    # Two batches overlap: the library encodes on all cores, but converts its input and output on one.
    pool = ThreadPoolExecutor(2)
    try:
        for batch in jobs:
            waiting.append(pool.submit(_tokens, tokenizer, batch, dtype))
            if len(waiting) > 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def prompt_ids(where: str, messages: Any, tokenizer: Tokenizer, ignored: set[str] | None = None) -> list[int]:
    """Return the tokens of a conversation up to the assistant's next answer, as in training.

    Adds the names of message fields without a meaning to `ignored`. Raises LlmpyError, naming `where`.
    """
    read = read_messages(where, messages, set() if ignored is None else ignored, tokenizer.template)
    if tokenizer.template is None:
        text, counted = plain([*read, ({"role": ASSISTANT, "content": ""}, True)])
        document = Document(where, text, counted, literal=True).part(0, len(text) - 2)  # up to the answer
    else:
        rendering = tokenizer.template.prompt(where, [message for message, _ in read])
        document = Document(where, *rendering, rendered=True)
    return [int(i) for block in encode(tokenizer, [document]) for i in block.ids]


def pieces(text: str, border: re.Pattern[str] = BORDER, drop: bool = False) -> Iterator[str]:
    """Split `text` at word boundaries into pieces of about PIECE characters, else at line ends, of LONGEST at most.

    `drop`: leave out the boundaries.
    """
    start = 0
    while len(text) - start > PIECE:
        end = start + LONGEST
        cut = border.search(text, start + PIECE, end)
        if not cut and end >= len(text):
            break
        stop = cut.start() if cut else text.rfind("\n", start + PIECE, end) + 1 or end
        yield text[start:stop]
        start = cut.end() if cut and drop else stop
    yield text[start:]


def _batches(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[list[Piece]]:
    """Yield pieces that are all literal, or all not."""
    batch: list[Piece] = []
    size = 0
    for piece in itertools.chain.from_iterable(_pieces(tokenizer, document) for document in documents):
        if batch and (size >= BATCH or batch[0].literal != piece.literal):
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += len(piece.text.encode("utf-8", "replace"))
    if batch:
        yield batch


def _pieces(tokenizer: Tokenizer, document: Document) -> Iterator[Piece]:
    """Yield the consecutive pieces of a document."""
    literal, length = document.literal, len(document.text)
    if document.rendered or not (document.counted is None or tokenizer.byte_level):
        spans = ((0, length),) * literal if isinstance(literal, bool) else literal
        for i, (start, stop, literal) in enumerate(_stretches(spans, length)):
            part = document.part(start, stop)
            yield Piece(part.text, literal, not i, document.rendered, part.counted or ())
        return
    encoder = tokenizer.ordinary() if literal else tokenizer
    counted = ((0, length),) if document.counted is None else document.counted
    first = True
    for start, stop, counts in _stretches(counted, length):
        for text in pieces(document.text[start:stop], encoder.border, not encoder.byte_level):
            yield Piece(text, bool(literal), first, False, counts)
            first = False


def _stretches(spans: Spans, length: int) -> Iterator[tuple[int, int, bool]]:
    """Yield start and stop of the consecutive stretches of a text, and whether each is one of the spans."""
    at = 0
    for start, stop in spans:
        if at < start:
            yield at, start, False
        yield start, stop, True
        at = stop
    if at < length:
        yield at, length, False


def _tokens(tokenizer: Tokenizer, batch: list[Piece], dtype: np.dtype) -> Tokens:
    encoder, start = tokenizer.ordinary() if batch[0].literal else tokenizer, tokenizer.start
    texts, _, firsts, renders, counts = zip(*batch, strict=True)
    if all(isinstance(count, bool) for count in counts):
        rows = encoder.encode_batch(texts)
    else:
        spans = [((0, len(t)),) * c if isinstance(c, bool) else c for t, c in zip(texts, counts, strict=True)]
        rows, counts = zip(*encoder.encode_marked(texts, spans), strict=True)
    headed = [first and not rendered for first, rendered in zip(firsts, renders, strict=True)]
    ids = np.empty(sum(map(len, rows)) + len(start) * sum(headed), dtype)
    counted = None if all(map(np.all, counts)) else np.ones(len(ids), bool)
    starts, at = [], 0
    for row, first, head, counting in zip(rows, firsts, headed, counts, strict=True):
        if first:
            starts.append(at)
        if head:
            ids[at : at + len(start)] = start
            at += len(start)
        ids[at : at + len(row)] = row
        if counted is not None:
            counted[at : at + len(row)] = counting
        at += len(row)
    return Tokens(ids, counted, np.array(starts, np.int64), sum(map(len, texts)))
