"""The pipeline from documents to token files, for `llmpy train --data` and `llmpy data`.

    documents → held out or not → tokenizer → token ids and mask → rows, to fine-tune → shards

The end of the user's text is held out (`divided`), or llm.c's validation part of a named dataset. If no tokenizer is
given, a byte-level BPE is trained on the training part. Tokens go to a temporary file first, since their number
determines the files. Text is read several times rather than kept in memory.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import LlmpyError
from ..system.progress import progress
from ..system.stored import Stored
from .chat_template import ChatTemplate
from .datasets import SHARD_TOKENS, Layout, Log
from .document_rows import described, pack
from .encode import TOKENIZER_SEES, encode, pieces
from .file_roles import TRAINING, VALIDATION, Chosen
from .magic import SPOOL
from .rank_tables import LLMC_FILE, write_llmc
from .records import Document
from .shards import CHUNK, COUNTED, FORMS, HEADER_BYTES, form_for, write_shard
from .text import refuse_all, stream_files
from .tokenizer import Tokenizer

HELD_OUT = 0.1  # share of a text held out for validation
HELD_OUT_AT_MOST = 400_000_000  # characters: about 10⁸ tokens, as in llm.c's largest datasets
CHARACTERS_PER_TOKEN = 300  # of training text per token of the vocabulary: each then occurs ~100 times
VOCAB_AT_LEAST, VOCAB_AT_MOST = 512, 8192
SEEKABLE = 2**31 - 1  # bytes: llm.c seeks with an int, and cannot read larger files to the end
OWN = Layout(None, one_file=True)  # for the user's own text


@dataclass(frozen=True)
class Corpus:
    """Documents that can be read repeatedly, and which of them are held out."""

    read: Callable[[], Iterator[tuple[bool, Document]]]  # (held out, document); held-out documents are contiguous
    characters: int | None = None  # of the training part; None: unknown
    given: bool = False  # whether the user gave the held-out files


def split(chosen: Chosen, log: Log, template: ChatTemplate | None = None) -> Corpus:
    """Hold out the validation files, or else the end of the text; log what serves for what.

    `template`: of the model, for messages. Raises LlmpyError for files that cannot be read, too little text, and if
    more than a tenth of the validation text are documents that are also trained on (datasets repeat some: headings of
    wikitext, greetings in chats).
    """
    if not chosen.val:
        corpus = divided(lambda log: stream_files(chosen.train, log, template=template), log)
        log("validation  the last tenth of the training text")
        return corpus
    problems: list[LlmpyError] = []
    said: list[str] = []  # logged later: a line would break the bar
    held_out = stream_files(chosen.val, said.append, VALIDATION, problems, template)
    lengths = {hash(d.text): len(d.text) for d in _shown(held_out)}
    held, count = sum(lengths.values()), len(lengths)
    characters = 0
    for document in _shown(stream_files(chosen.train, said.append, TRAINING, problems, template)):
        characters += len(document.text)
        lengths.pop(hash(document.text), None)
    for line in said:
        log(line)
    refuse_all(problems)
    if len(lengths) < count:
        shared = f"{count - len(lengths):,} of {count:,} validation documents are also training documents"
        if held - sum(lengths.values()) > HELD_OUT * held:
            raise LlmpyError("split.overlap", shared, "Remove them from one of the two")
        log(f"caution     {shared}")

    def parts() -> Iterator[tuple[bool, Document]]:
        for part in (TRAINING, VALIDATION):
            files = chosen.val if part == VALIDATION else chosen.train
            yield from ((part == VALIDATION, d) for d in stream_files(files, lambda _: None, part, template=template))

    return Corpus(parts, characters, given=True)


def divided(read: Callable[[Log], Iterable[Document]], log: Log) -> Corpus:
    """Hold out the last tenth of the characters (of 10 or more).

    The cut moves to the nearest document boundary. If that would change the held-out part by more than half, a document
    is cut after a line, or exactly there if no line ends nearby. Only the first call of `read` gets the user's `log`.
    """

    def quietly() -> Iterable[Document]:
        return read(lambda _: None)

    said: list[str] = []  # logged later: a line would break the bar
    try:
        lengths = np.fromiter((len(d.text) for d in _shown(read(said.append))), np.int64)
    finally:
        for line in said:
            log(line)
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    held = min(HELD_OUT * total, HELD_OUT_AT_MOST)
    cut, slack = total - int(held), held / 2
    whole = 1 + int(np.argmin(np.abs(ends - cut)))  # training documents, plus `border` characters of the next
    border = 0
    if whole == len(ends) or abs(int(ends[whole - 1]) - cut) > slack:
        whole = int(np.searchsorted(ends, cut, side="right"))
        border = cut - int(ends[whole] - lengths[whole])
        start = next(itertools.islice(_shown(quietly()), whole, None)).text.rfind("\n", 0, border) + 1
        border = start if start and border - start <= slack else border

    def parts() -> Iterator[tuple[bool, Document]]:
        for i, document in enumerate(quietly()):
            if i == whole and border:
                yield False, document.part(0, border)
                document = document.part(border, len(document.text))
            yield i >= whole, document

    return Corpus(parts, int(ends[whole] - lengths[whole]) + border)


def _shown(documents: Iterable[Document]) -> Iterator[Document]:
    """Yield the documents, and show progress."""
    with progress("reading") as count:
        for document in documents:
            yield document
            count(len(document.text))


def choose_vocab_size(characters: int) -> int:
    """Return a power of two as the vocabulary size: 1024 from 307k characters, 2048 from 614k, 8192 from 2.5M."""
    fits = 2 ** int(math.log2(max(1, characters / CHARACTERS_PER_TOKEN)))
    return min(max(fits, VOCAB_AT_LEAST), VOCAB_AT_MOST)


def given_tokenizer(name: str | None, log: Log) -> tuple[Tokenizer, str] | None:
    """Return the tokenizer of that name (gpt2, bytes, a file) and its description, None for one to train."""
    if name == "gpt2":
        return Tokenizer.gpt2(log), "GPT-2's"
    if name == "bytes":
        return Tokenizer.bytes(), "bytes"
    return None if name is None or name.startswith("bpe:") else (Tokenizer.load(Path(name)), name)


def choose_tokenizer(name: str | None, corpus: Corpus, log: Log) -> tuple[Tokenizer, str]:
    """Return a tokenizer and its description. `name`: as `given_tokenizer`, or bpe:N (trained on the text).

    None: bpe with `choose_vocab_size` tokens.
    """
    if given := given_tokenizer(name, log):
        return given
    characters = corpus.characters or 0
    size = int(name.removeprefix("bpe:")) if name else choose_vocab_size(characters)
    every = math.ceil(characters / TOKENIZER_SEES) or 1
    with progress("training the tokenizer") as count:
        seen = (piece for held, document in corpus.read() if not held for piece in pieces(document.text))
        texts = _first(itertools.islice(seen, 0, None, every), TOKENIZER_SEES, count)
        return Tokenizer.train(texts, size), "byte-level BPE trained on this text"


def _first(texts: Iterable[str], characters: int, count: Callable[[int], object]) -> Iterator[str]:
    """Yield texts until they have this many characters, and count them."""
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        count(len(text))
        yield text


def write_tokens(
    corpus: Corpus, tokenizer: Tokenizer, label: str, folder: Path, log: Log, layout: Layout = OWN, limit: int = 0,
    form: str = "auto", row: int = 0,
) -> dict[str, int]:  # fmt: skip
    """Write the token files of `layout`, masks if not all tokens count, and tokenizer.json; return tokens by file name.

    `label`: the tokenizer's description for the log. `limit`: encode only the first N tokens (0: all). `form`: a key of
    FORMS, or auto; int32 also writes llm.c's tokenizer file for programs that read int32 streams. `row`: pack documents
    into rows of so many tokens (0: one stream). Raises LlmpyError if the form cannot hold the vocabulary, if no
    training token counts, and if a file cannot be written.
    """
    form = form_for(tokenizer.vocab_size) if form == "auto" else form
    if tokenizer.vocab_size - 1 > np.iinfo(FORMS[form].dtype).max:
        message = f"--format {form} cannot hold a vocabulary of {tokenizer.vocab_size:,} tokens"
        raise LlmpyError("shard.vocab-too-large", message, "Omit --format")
    table = tokenizer.ranks() if form == "int32" else None
    # In the user's text EOT separates documents. Named datasets are already split, and encode it as text (llm.c).
    encoder = tokenizer if layout is OWN else tokenizer.ordinary()
    files: dict[str, int] = {}
    lengths: list[np.ndarray] = []
    try:
        with tempfile.TemporaryDirectory(prefix=SPOOL, dir=folder) as work:
            spool = _spool(corpus, encoder, Path(work), limit)
            n, held = len(spool.ids), _held_out(spool, layout, 0 if corpus.given else limit)
            if spool.counted is not None and layout is OWN:
                for what, part in (("training", slice(0, n - held)), ("validation", slice(n - held, n))):
                    check_counted([(spool.ids[part], spool.counted[part])], tokenizer.eot, tokenizer, what)
            for name, start, stop in _cuts(n, held, layout, FORMS[form].dtype.itemsize):
                counted = None if spool.counted is None or form == "int32" else spool.counted[start:stop]
                ids = spool.ids[start:stop]
                if row:
                    starts = spool.starts[slice(*np.searchsorted(spool.starts, (start, stop)))] - start
                    ids, counted, documents = pack(ids, counted, starts, row, tokenizer.eot, Path(work, name))
                    lengths.append(documents)
                write_shard(folder / name, ids, form, counted)
                files[name] = len(ids)
            learned = n if spool.counted is None else np.count_nonzero(spool.counted)
            rate = spool.rate
            del spool, counted, ids  # Windows cannot remove a mapped file
    except OSError as error:
        message = f"cannot write to {folder}: {error.strerror or error}"
        raise LlmpyError("file.unwritable", message, "Free some space or choose another folder (--out)") from error
    tokenizer.save(folder / "tokenizer.json")
    if table:
        write_llmc(folder / LLMC_FILE, table)
    log(f"tokenizer: {label}, {tokenizer.vocab_size:,} tokens, {rate:.2f} characters per token")
    if learned < n:
        log(f"the loss counts {learned:,} of {n:,} tokens: completions and assistant messages")
        if form == "int32":
            log("note: int32 streams have no mask, so prompts also count in the loss")
    if row:
        log(described(np.concatenate(lengths), sum(size // row for size in files.values()), row))
    return files


@dataclass(frozen=True)
class _Spool:
    """All tokens, memory-mapped from temporary files; `held` of them are from held-out documents."""

    ids: np.ndarray
    counted: np.ndarray | None  # bool (n,); None: all count
    starts: np.ndarray  # int64, of documents
    held: int
    rate: float  # characters per token


def _spool(corpus: Corpus, tokenizer: Tokenizer, work: Path, limit: int) -> _Spool:
    """Encode all documents, or the first `limit` tokens; of given held-out files at most a tenth of these."""
    total = held = encoded = characters = 0
    dtype, masked = np.dtype(np.uint16), False
    parts = itertools.groupby(corpus.read(), lambda pair: pair[0])
    tenth = int(HELD_OUT * limit)
    with (
        (work / "ids").open("wb") as ids, (work / "mask").open("wb") as mask, (work / "starts").open("wb") as starts,
        progress("encoding") as count,
    ):  # fmt: skip
        for is_held, part in parts:
            most = limit if not corpus.given else total + tenth if is_held else limit - tenth
            for block in encode(tokenizer, (d for _, d in part)):
                n = min(len(block.ids), most - total) if limit else len(block.ids)
                dtype = block.ids.dtype
                ids.write(block.ids[:n].tobytes())
                starts.write((total + block.starts).tobytes())
                if block.counted is not None and not masked:
                    masked = True
                    mask.writelines(b"\1" * min(1 << 20, total - at) for at in range(0, total, 1 << 20))
                if masked:
                    mask.write(b"\1" * n if block.counted is None else block.counted[:n].tobytes())
                total += n
                held += n * is_held
                encoded += len(block.ids)
                characters += block.characters
                count(block.characters)
                if limit and total == most:
                    break
            if limit and total == limit:
                break
    if total < 2:
        raise LlmpyError("data.empty", "the data contain no text", "Give other data")
    counted = np.memmap(work / "mask", np.bool_, "r") if masked else None
    places = np.memmap(work / "starts", np.int64, "r")
    return _Spool(np.memmap(work / "ids", dtype, "r"), counted, places, held, characters / encoded)


def check_counted(
    parts: Iterable[tuple[Stored | np.ndarray, Stored | np.ndarray | None]], eot: int, tokenizer: Tokenizer | None,
    what: str,
) -> None:  # fmt: skip
    """Raise LlmpyError if no token of the parts (ids, mask) counts but EOT and white space."""
    for ids, counted in parts:
        if counted is None:
            return
        for i in range(0, len(ids), CHUNK):
            seen = np.flatnonzero(np.bincount(ids[i : i + CHUNK][counted[i : i + CHUNK] & COUNTED != 0]))
            seen = seen[seen != eot]
            if seen.size and (tokenizer is None or tokenizer.decode(seen).strip()):
                return
    raise LlmpyError(
        "data.nothing-counted",
        f"no {what} token counts in the loss: completions and assistant messages are missing, empty or masked",
        'Give messages with {"role": "assistant", "content": …}, or a completion with text',
    )


def _held_out(spool: _Spool, layout: Layout, limit: int) -> int:
    """Return the number of held-out tokens: a tenth if `limit` leaves too few for the usual split."""
    n = len(spool.ids)
    tenth = int(HELD_OUT * n)
    if layout is OWN:
        held = tenth if n == limit else spool.held
    elif isinstance(layout.val, int):
        held = layout.val if layout.val < n // 2 else min(layout.val, tenth)
    else:
        held = spool.held if spool.held < n else tenth
    if not 0 < held < n:
        message = f"cannot hold out {held:,} of {n:,} tokens for validation"
        raise LlmpyError("split.empty", message, "Give more data, or a larger --tokens")
    return held


def _cuts(n: int, held: int, layout: Layout, itemsize: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, start and stop of each token file; `itemsize`: bytes per token."""
    if layout is OWN:
        start, stop, val = 0, n - held, n - held
    else:
        start, stop, val = held, n, 0
    yield layout.val_name, val, val + held
    whole = layout.one_file and HEADER_BYTES + (stop - start) * itemsize <= SEEKABLE
    starts = range(start, stop, stop - start if whole else SHARD_TOKENS)
    name = layout.train_name
    if len(starts) > 1 and "{" not in name:
        name = name.replace(".bin", "_{:06d}.bin")
    for number, at in enumerate(starts, 1):
        yield name.format(number), at, min(at + starts.step, stop)
