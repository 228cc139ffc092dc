"""From what the user gave to something to train on: text, token shards, or nothing at all.

Text is split into a training and a validation part, a tokenizer is trained on the former, and both are
written as shards beside it. Shards are taken as they are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import LlmpyError
from ..formats import tokenizer_of
from ..formats.source import Source
from ..model.config import GPT2_VOCAB
from ..system.command import command
from ..system.words import count_of
from . import builtin, shards
from .encode import TOKENIZER_SEES, pieces, tokenise
from .pack import RECORD, find_dataset, is_dataset
from .records import Document
from .shards import Shard, form_for, is_shard, open_shard, write_shard
from .text import LEAST_CHARACTERS, Found, find_files, read_files
from .tokenizer import Tokenizer

VALIDATION = 0.1  # share of the text that is held out
CHARACTERS_PER_TOKEN = 300  # of training text for each token of the vocabulary: each is then seen ~100 times
CHARACTERS_OF_A_TOKEN = 4  # of small texts, about
VOCAB_AT_LEAST, VOCAB_AT_MOST = 512, 8192
SAMPLE_TOKENS = 24


@dataclass(frozen=True)
class Dataset:
    """Training and validation tokens, and how to read them."""

    train: list[Shard]
    val: list[Shard]
    tokenizer: Tokenizer | None  # None: shards that came without one
    vocab_size: int
    description: list[str]  # what was understood, line by line
    bytes_per_token: float | None  # of the validation text; turns loss into bits per byte


def prepare(
    paths: Sequence[Path] | None,
    folder: Path,
    vocab_size: int | None = None,
    say: Callable[[str], None] = print,
    start: Source | None = None,
    wanted: str = "",
) -> Dataset:
    """Read `paths` (None: Python's own documentation) and `say` what they were understood to be.

    The name of a data set of `llmpy data` stands for its tokens, which are made first if need be.
    Text: writes tokenizer.json, train.bin and val.bin into `folder`, which is made when all else is done.
    Shards: writes nothing; files named *val* are validation, else a tenth of the last shard is held out.
    `start` is the model that training starts from, if there is one: text is encoded with its tokenizer.
    `wanted`: how much text there should be, for those who give too little.
    Raises LlmpyError, which names the fix, for whatever cannot be read or used.
    """
    description: list[str] = []

    def tell(line: str) -> None:
        description.append(line)
        say(line)

    if vocab_size is not None and vocab_size >= 1 << 16:
        raise LlmpyError(
            f"a vocabulary of {vocab_size:,} tokens does not fit 16 bits", "use --vocab-size 65535 or less"
        )
    if paths is None:
        documents = builtin.builtin_documents()
        tell(builtin.describe(documents))
        # the sections follow the alphabet: every tenth is a fair sample of all, the last tenth is not
        val = documents[5::10]
        train = [d for i, d in enumerate(documents) if i % 10 != 5]
        return _from_text(train, val, folder, vocab_size, start, description, tell)
    if len(paths) == 1 and is_dataset(paths[0]):
        own = start.tokenizer if start is not None and start.config.vocab_size != GPT2_VOCAB else None
        paths = [find_dataset(str(paths[0]), tell, str(own or "gpt2"))]
    files = find_files(paths, tell)
    found = [f for f in files if is_shard(f.path) or (f.named and f.path.suffix == ".bin")]
    if found:
        _refuse_mixture(found, [f for f in files if f not in found], tell)
        return _from_shards([f.path for f in found], vocab_size, start, description, tell)
    return _from_text(*split(read_files(files, tell, wanted)), folder, vocab_size, start, description, tell)


def text_for(B: int, T: int, overfit: bool) -> str:
    """About how much text fills a batch to train on, and a row of the part that is held out, or a batch of that."""
    batch, row = B * T + 1, T + 1
    tokens = batch / VALIDATION if overfit else max(batch / (1 - VALIDATION), row / VALIDATION)
    characters = CHARACTERS_OF_A_TOKEN * tokens
    return f"about {max(LEAST_CHARACTERS, math.ceil(characters / 100) * 100):,} with -B {B} -T {T}"


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Training and validation part: the last tenth of the characters (10 or more of them) is held out.

    The cut is the border of documents nearest to it, unless that would make the part smaller or larger by
    half; then a document is cut after a line.
    """
    ends = np.cumsum([len(d.text) for d in documents])
    total = int(ends[-1])
    cut = total - int(VALIDATION * total)
    slack = VALIDATION * total / 2
    nearest = int(np.argmin(np.abs(ends - cut)))
    if nearest + 1 < len(documents) and abs(int(ends[nearest]) - cut) <= slack:
        return list(documents[: nearest + 1]), list(documents[nearest + 1 :])
    i = int(np.searchsorted(ends, cut, side="right"))
    document = documents[i]
    at = cut - (int(ends[i]) - len(document.text))
    line = document.text.rfind("\n", 0, at) + 1
    if line > 0 and at - line <= slack:
        at = line
    head, tail = document.part(0, at), document.part(at, len(document.text))
    return [*documents[:i], head], [tail, *documents[i + 1 :]]


def choose_vocab_size(characters: int) -> int:
    """A power of two that the text can fill: 1024 from 307k characters on, 2048 from 614k, 8192 from 2.5M."""
    fits = 2 ** int(math.log2(max(1, characters / CHARACTERS_PER_TOKEN)))
    return min(max(fits, VOCAB_AT_LEAST), VOCAB_AT_MOST)


def _from_text(
    train: Sequence[Document],
    val: Sequence[Document],
    folder: Path,
    vocab_size: int | None,
    start: Source | None,
    description: list[str],
    tell: Callable[[str], None],
) -> Dataset:
    characters = sum(len(d.text) for d in train)
    if start is None:
        every = math.ceil(characters / TOKENIZER_SEES)
        seen = (piece for d in train for piece in pieces(d.text))
        tokenizer = Tokenizer.train(itertools.islice(seen, 0, None, every), vocab_size or choose_vocab_size(characters))
        whose = "byte-level BPE trained on this text"
    else:
        tokenizer, whose = tokenizer_of(start, tell)
    if all(document.counted == () for document in train):
        raise LlmpyError(
            f"{count_of(len(train), 'document')} to train on, and nothing in them that counts: no message of the "
            "assistant, no completion",
            'give records with {"role": "assistant", "content": …} among their messages',
        )
    tokens = {"train": tokenise(tokenizer, train), "val": tokenise(tokenizer, val)}
    ids = tokens["train"].ids
    tell(f"tokenizer: {whose}, {tokenizer.vocab_size:,} tokens, {characters / ids.size:.2f} characters per token")
    tell(f"{ids.size:,} training tokens, {tokens['val'].ids.size:,} validation tokens")
    if tokens["train"].counted is not None:
        tell(f"the loss counts {np.count_nonzero(tokens['train'].counted):,} of the training tokens: completions alone")
    tell(_sample(tokenizer, ids))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise LlmpyError(f"cannot make {folder}: {fault.strerror}", "choose another folder (--out)") from fault
    tokenizer.save(folder / "tokenizer.json")
    opened = {}
    for part, values in tokens.items():
        path = folder / f"{part}.bin"
        write_shard(path, values.ids, form_for(tokenizer.vocab_size), values.counted)
        opened[part] = [open_shard(path, tokenizer.vocab_size)]
    return Dataset(
        opened["train"],
        opened["val"],
        tokenizer,
        tokenizer.vocab_size,
        description,
        _bytes_per_token(tokenizer, opened["val"]),
    )


def _from_shards(
    paths: Sequence[Path],
    vocab_size: int | None,
    start: Source | None,
    description: list[str],
    tell: Callable[[str], None],
) -> Dataset:
    beside = paths[0].parent / "tokenizer.json"
    tokenizer = Tokenizer.load(beside) if beside.exists() else None
    if start is not None:
        vocab_size = vocab_size or start.config.vocab_size
        if start.tokenizer is not None:
            models = Tokenizer.load(start.tokenizer)
            if tokenizer and not tokenizer.same_tokens(models):
                raise LlmpyError(
                    f"{paths[0].parent} holds tokens of another tokenizer than that of the model, {start.tokenizer}",
                    f"make them again: {command('data', '…', '--tokenizer', start.tokenizer)}",
                )
            tokenizer, beside = models, start.tokenizer
    if tokenizer and vocab_size not in (None, tokenizer.vocab_size):
        raise LlmpyError(
            f"{beside} has {tokenizer.vocab_size:,} tokens, not the {vocab_size:,} that were asked for",
            "leave --vocab-size out, or move that file away",
        )
    size = tokenizer.vocab_size if tokenizer else vocab_size or GPT2_VOCAB
    opened = [open_shard(path, size) for path in paths]
    val = [s for s in opened if "val" in s.path.name.lower()]
    train = [s for s in opened if "val" not in s.path.name.lower()] or val
    what = opened[0].form.what
    if any(shard.form != opened[0].form for shard in opened):
        raise LlmpyError(f"token files of several forms beside each other: {what} …", "give one kind at a time")
    tell(f"{len(opened)} {what}{'s' * (len(opened) > 1)}, {sum(map(len, opened)):,} tokens")
    if train is val or not val:
        *whole, last = train
        cut = len(last) - int(VALIDATION * len(last))
        train, val = [*whole, last.part(0, cut)], [last.part(cut, len(last))]
        tell(f"no pair of training and validation shards: the last tenth of {last.path.name} is held out")
    if tokenizer:
        tell(f"tokenizer: {beside}, {size:,} tokens")
    else:
        whose = "GPT-2's" if size == GPT2_VOCAB else "as asked for"
        tell(f"no tokenizer.json beside them: vocabulary of {size:,} tokens ({whose}), samples show token ids")
    tell(f"{sum(map(len, train)):,} training tokens, {sum(map(len, val)):,} validation tokens")
    tell(_sample(tokenizer, train[0].tokens))
    rate = _bytes_per_token(tokenizer, val) if tokenizer else None
    return Dataset(train, val, tokenizer, size, description, rate)


def _refuse_mixture(found: Sequence[Found], others: Sequence[Found], tell: Callable[[str], None]) -> None:
    """Text beside shards is an error if the user named it or it is .txt; other files in folders are passed over."""
    text = next((f for f in others if f.named or f.path.suffix.lower() == ".txt"), None)
    if text:
        raise LlmpyError(
            f"both token shards ({found[0].path}) and text ({text.path}) were given", "give one kind at a time"
        )
    others = [f for f in others if f.path.name not in ("tokenizer.json", RECORD) and f.path.suffix != ".mask"]
    if others:
        tell(f"skipped {count_of(len(others), 'file')} beside the shards: {others[0].path.name} …")


def _sample(tokenizer: Tokenizer | None, tokens: np.ndarray) -> str:
    """How the training data begins, to be recognised by the person who gave it."""
    first = tokens[:SAMPLE_TOKENS].tolist()
    return f"it begins: {tokenizer.decode(first)!r}" if tokenizer else f"it begins: {first}"


def _bytes_per_token(tokenizer: Tokenizer, parts: Sequence[Shard]) -> float:
    """Of the tokens that count."""
    lengths = tokenizer.byte_lengths()
    total = tokens = 0
    for shard in parts:
        for start in range(0, len(shard), shards.CHUNK):
            ids = shard.tokens[start : start + shards.CHUNK]
            if shard.counted is not None:
                ids = ids[shard.counted[start : start + shards.CHUNK] != 0]
            total += int(lengths[ids].sum(dtype=np.int64))
            tokens += len(ids)
    return total / max(1, tokens)
