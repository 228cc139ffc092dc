"""The one way from documents to token files, of `llmpy train --data` and of `llmpy data`.

    documents → held out or not → tokenizer → token ids and mask → shards

Of the user's own text the end is held out (`divided`), of a dataset known by name what llm.c holds out. Where no
tokenizer is asked for, a byte-level BPE is trained on what is not held out. Tokens go to a temporary file first: how
many there are decides how they are divided among files. Text is read several times instead of being kept in memory.
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
from .datasets import SHARD_TOKENS, Layout, Log
from .encode import TOKENIZER_SEES, encode, pieces
from .magic import SPOOL
from .rank_tables import LLMC_FILE, write_llmc
from .records import Document
from .shards import CHUNK, FORMS, HEADER_BYTES, form_for, write_shard
from .tokenizer import Tokenizer

HELD_OUT = 0.1  # share of a text that is held out for validation
HELD_OUT_AT_MOST = 400_000_000  # characters: about 10⁸ tokens, as of llm.c's largest datasets
CHARACTERS_PER_TOKEN = 300  # of training text for each token of the vocabulary: each is then seen ~100 times
VOCAB_AT_LEAST, VOCAB_AT_MOST = 512, 8192
SEEKABLE = 2**31 - 1  # bytes of a file that llm.c, which seeks by an int, can read to its end
OWN = Layout(None, one_file=True)  # of the user's own text


@dataclass(frozen=True)
class Corpus:
    """Documents to read, again and again if need be, and which of them are held out."""

    read: Callable[[], Iterator[tuple[bool, Document]]]  # held out?, document; those held out follow one another
    characters: int | None = None  # of those to train on; None: not counted


def divided(read: Callable[[Log], Iterable[Document]], log: Log) -> Corpus:
    """Hold out the last tenth of the characters (10 or more of them).

    The cut is the border of documents nearest to it, unless that would make the part smaller or larger by half; then a
    document is cut after a line, or at the very character if no line ends near. `read` is told whom to `say` what it
    understood: that is the user once.
    """

    def quietly() -> Iterable[Document]:
        return read(lambda _: None)

    lengths = np.fromiter((len(d.text) for d in read(log)), np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    held = min(HELD_OUT * total, HELD_OUT_AT_MOST)
    cut, slack = total - int(held), held / 2
    whole = 1 + int(np.argmin(np.abs(ends - cut)))  # documents to train on, and `border` characters of the next one
    border = 0
    if whole == len(ends) or abs(int(ends[whole - 1]) - cut) > slack:
        whole = int(np.searchsorted(ends, cut, side="right"))
        border = cut - int(ends[whole] - lengths[whole])
        line = next(itertools.islice(quietly(), whole, None)).text.rfind("\n", 0, border) + 1
        border = line if line and border - line <= slack else border

    def parts() -> Iterator[tuple[bool, Document]]:
        for i, document in enumerate(quietly()):
            if i == whole and border:
                yield False, document.part(0, border)
                document = document.part(border, len(document.text))
            yield i >= whole, document

    return Corpus(parts, int(ends[whole] - lengths[whole]) + border)


def choose_vocab_size(characters: int) -> int:
    """Return a power of two that the text fills: 1024 from 307k characters on, 2048 from 614k, 8192 from 2.5M."""
    fits = 2 ** int(math.log2(max(1, characters / CHARACTERS_PER_TOKEN)))
    return min(max(fits, VOCAB_AT_LEAST), VOCAB_AT_MOST)


def choose_tokenizer(name: str | None, corpus: Corpus, log: Log) -> tuple[Tokenizer, str]:
    """Return the tokenizer of `--tokenizer`, and what to call it: gpt2, bytes, bpe:N (trained on the text), or a file.

    None: bpe of `choose_vocab_size`.
    """
    if name == "gpt2":
        return Tokenizer.gpt2(log), "GPT-2's"
    if name == "bytes":
        return Tokenizer.bytes(), "bytes"
    if name is not None and not name.startswith("bpe:"):
        return Tokenizer.load(Path(name)), name
    characters = corpus.characters or 0
    size = int(name.removeprefix("bpe:")) if name else choose_vocab_size(characters)
    every = math.ceil(characters / TOKENIZER_SEES) or 1
    seen = (piece for held, document in corpus.read() if not held for piece in pieces(document.text))
    texts = _first(itertools.islice(seen, 0, None, every), TOKENIZER_SEES)
    return Tokenizer.train(texts, size), "byte-level BPE trained on this text"


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Yield texts until there are so many characters."""
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def write_tokens(
    corpus: Corpus,
    tokenizer: Tokenizer,
    whose: str,
    folder: Path,
    log: Log,
    layout: Layout = OWN,
    limit: int = 0,
    form: str = "auto",
) -> dict[str, int]:
    """Write the token files of `layout`, with masks where not everything counts, and tokenizer.json, into `folder`.

    `limit`: encode the first so many tokens only, 0: all. `form`: a key of FORMS, or auto; with int32 goes llm.c's
    tokenizer file, which the programs that read it read. Returns the number of tokens by file name. Raises LlmpyError
    for a form that cannot hold the tokens, for text in which nothing counts, and if a file cannot be written.
    """
    form = form_for(tokenizer.vocab_size) if form == "auto" else form
    if tokenizer.vocab_size - 1 > np.iinfo(FORMS[form].dtype).max:
        raise LlmpyError("data.x", f"--format {form} cannot hold {tokenizer.vocab_size:,} tokens", "Leave --format out")
    table = tokenizer.ranks() if form == "int32" else None
    # As in llm.c, whose datasets are cut into documents already. In the user's own text EOT separates documents.
    encoder = tokenizer if layout is OWN else tokenizer.ordinary()
    files: dict[str, int] = {}
    try:
        with tempfile.TemporaryDirectory(prefix=SPOOL, dir=folder) as work:
            spool = _spool(corpus, encoder, Path(work), limit)
            n, held = len(spool.ids), _held_out(spool, layout, limit)
            if spool.counted is not None and layout is OWN:
                _check_counted(spool.ids[: n - held], spool.counted[: n - held], tokenizer.eot)
            for name, start, stop in _cuts(n, held, layout, FORMS[form].dtype.itemsize):
                counted = None if spool.counted is None or form == "int32" else spool.counted[start:stop]
                write_shard(folder / name, spool.ids[start:stop], form, counted)
                files[name] = stop - start
            learnt = n if spool.counted is None else np.count_nonzero(spool.counted)
            rate = spool.rate
            del spool, counted  # Windows removes no file that is mapped
    except OSError as error:
        raise LlmpyError(
            "data.x",
            f"cannot write to {folder}: {error.strerror or error}",
            "Free some space or choose another folder (--out)",
        ) from error
    tokenizer.save(folder / "tokenizer.json")
    if table:
        write_llmc(folder / LLMC_FILE, table)
    log(f"tokenizer: {whose}, {tokenizer.vocab_size:,} tokens, {rate:.2f} characters per token")
    if learnt < n:
        log(f"the loss counts {learnt:,} of {n:,} tokens: completions and what the assistant says")
        if form == "int32":
            log("note: a stream of int32 has no mask: prompts count in the loss like all else")
    return files


@dataclass(frozen=True)
class _Spool:
    """All tokens in temporary files, memory-mapped; `held` of them come from documents that are held out."""

    ids: np.ndarray
    counted: np.ndarray | None  # bool (n,); None: all count
    held: int
    rate: float  # characters per token


def _spool(corpus: Corpus, tokenizer: Tokenizer, work: Path, limit: int) -> _Spool:
    """Encode all documents, or as many as give `limit` tokens."""
    from tqdm import tqdm

    total = held = encoded = characters = 0
    dtype, masked = np.dtype(np.uint16), False
    bar = tqdm(unit="char", unit_scale=True, leave=False, disable=None)
    parts = itertools.groupby(corpus.read(), lambda pair: pair[0])
    blocks = ((is_held, block) for is_held, part in parts for block in encode(tokenizer, (d for _, d in part)))
    with (work / "ids").open("wb") as ids, (work / "mask").open("wb") as mask, bar:
        for is_held, block in blocks:
            n = min(len(block.ids), limit - total) if limit else len(block.ids)
            dtype = block.ids.dtype
            ids.write(block.ids[:n].tobytes())
            if block.counted is not None and not masked:
                masked = True
                mask.writelines(b"\1" * min(1 << 20, total - at) for at in range(0, total, 1 << 20))
            if masked:
                mask.write(b"\1" * n if block.counted is None else block.counted[:n].tobytes())
            total += n
            held += n * is_held
            encoded += len(block.ids)
            characters += block.characters
            bar.update(block.characters)
            if total == limit:
                break
    if total < 2:
        raise LlmpyError("data.x", "there is no text in it", "Give other data")
    counted = np.memmap(work / "mask", np.bool_, "r") if masked else None
    return _Spool(np.memmap(work / "ids", dtype, "r"), counted, held, characters / encoded)


def _check_counted(ids: np.ndarray, counted: np.ndarray, eot: int) -> None:
    """Raise LlmpyError if nothing but EOT counts."""
    starts = range(0, len(ids), CHUNK)
    if not any((counted[i : i + CHUNK] & (ids[i : i + CHUNK] != eot)).any() for i in starts):
        raise LlmpyError(
            "data.x",
            "nothing in the text to train on counts: no message of the assistant, no completion",
            'give records with {"role": "assistant", "content": …} among their messages',
        )


def _held_out(spool: _Spool, layout: Layout, limit: int) -> int:
    """Return how many tokens are held out; of a portion that `limit` cut off a tenth, so that both parts have some."""
    n = len(spool.ids)
    tenth = int(HELD_OUT * n)
    if layout is OWN:
        held = tenth if n == limit else spool.held
    elif isinstance(layout.val, int):
        held = layout.val if layout.val < n // 2 else min(layout.val, tenth)
    else:
        held = spool.held if spool.held < n else tenth
    if not 0 < held < n:
        raise LlmpyError(
            "data.x", f"of {n:,} tokens {held:,} would be held out", "Give more data, or a larger --tokens"
        )
    return held


def _cuts(n: int, held: int, layout: Layout, itemsize: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, start and end of each token file, of `itemsize` bytes a token."""
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
