"""`llmpy train`: the user's data, a named dataset or the built-in text → a dataset to train on.

Text goes through the pipeline into the run folder, Python's documentation if none is given. Shards are used unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LlmpyError
from ..model.config import GPT2_VOCAB
from ..system.command import command
from ..system.durable import made
from ..system.words import count_of
from . import builtin
from .dataset_folder import SAMPLE_TOKENS, find_dataset, is_dataset
from .file_roles import Chosen, choose
from .pipeline import HELD_OUT, Corpus, Log, choose_tokenizer, split, write_tokens
from .shards import Shard, fingerprint, is_shard, open_shard
from .text import Found, Skip, find_files, shown
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Dataset:
    """Training and validation tokens, with their vocabulary."""

    train: list[Shard]
    val: list[Shard]
    tokenizer: Tokenizer | None  # None: shards without one
    vocab_size: int


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of a pretrained model."""

    size: int
    tokenizer: Path | None  # the model's own file
    load: Callable[[], tuple[Tokenizer, str]]  # that or GPT-2's, and its description; raises LlmpyError


def prepare(
    paths: Sequence[Path] | None, folder: Path, vocab_size: int | None = None, log: Log = print,
    model: Vocabulary | None = None, skip: Skip = None, val: Sequence[Path] | None = None,
    before: Mapping[str, Any] | None = None, row: int = 0,
) -> Dataset:  # fmt: skip
    """Read `paths` (None: Python's documentation), and log their interpretation.

    A dataset name of `llmpy data` means its tokens, which are written first if missing.
    Text: writes tokenizer.json, train.bin and val.bin into `folder`, which is created after reading.
    Shards: writes nothing. Without validation files, a tenth of the text or of the last shard is held out.
    `model`: the pretrained model; its tokenizer encodes the text. `val`: validation data, whatever their names.
    `before`: the fingerprints of a run to resume, which keeps its split. `row`: pack documents of text into rows of so
    many tokens (0: one stream).
    Raises LlmpyError for data that cannot be read or used.
    """
    given = None
    if paths is None:
        if val:
            raise LlmpyError("option.missing", "--val needs --data", "Pass the training data with --data")
        corpus = _builtin(log)
    else:
        if len(paths) == 1 and is_dataset(paths[0]):
            own = None if model is None else model.tokenizer
            if model is not None and (own or model.size == GPT2_VOCAB):
                its = model.load()[0]
                own = None if its.vocab_size == GPT2_VOCAB and its.same_tokens(Tokenizer.gpt2(log)) else own
            paths = [find_dataset(str(paths[0]), log, str(own or "gpt2"))]
        if before is not None and (again := _resumed(paths, val, skip, before)):
            return _from_shards(again, vocab_size, model, log)
        chosen = choose(paths, val, skip, log)
        if chosen.shards:
            dataset = _from_shards(chosen, vocab_size, model, log)
            marks = {fingerprint(shard)["blake2b"] for shard in dataset.train}
            same = [str(shard.path) for shard in dataset.val if fingerprint(shard)["blake2b"] in marks]
            if val and same:
                what = f"training shards have the same tokens as {', '.join(same)}"
                raise LlmpyError("split.overlap", what, "Remove them from one of the two")
            return dataset
        given = model.load() if model is not None else None
        corpus = split(chosen, log, given[0].template if given else None)
    if model is None:
        tokenizer, label = choose_tokenizer(f"bpe:{vocab_size}" if vocab_size else None, corpus, log)
    else:
        tokenizer, label = given or model.load()
    size = tokenizer.vocab_size
    with made(folder):
        written = write_tokens(corpus, tokenizer, label, folder, log, row=row)
        if "train.bin" not in written:
            hint = f"Write token files first: {command('data', '…')}"
            raise LlmpyError("data.too-large", f"{sum(written.values()):,} tokens are too many for a run folder", hint)
        first, last = (open_shard(folder / name, size) for name in ("train.bin", "val.bin"))
        return _dataset([first], [last], tokenizer, size, log)


def _builtin(log: Log) -> Corpus:
    """Hold out every tenth section: they are sorted by name, so the last tenth would not be representative."""
    documents = builtin.builtin_documents()
    log(builtin.describe(documents))
    train = [d for i, d in enumerate(documents) if i % 10 != 5]
    parts = [*((False, d) for d in train), *((True, d) for d in documents[5::10])]
    return Corpus(lambda: iter(parts), sum(len(d.text) for d in train))


def _resumed(paths: Sequence[Path], val: Sequence[Path] | None, skip: Skip, before: Mapping[str, Any]) -> Chosen | None:
    """Return the shards of a run as it divided them, whatever their names; None if it had others."""
    marks = {part: [mark["blake2b"] for mark in before[part]] for part in ("train", "val")}
    parts: dict[str, list[Found]] = {"train": [], "val": []}
    for file in find_files([*paths, *(val or ())], skip):
        if file.path.is_file() and is_shard(file.path):
            mark = fingerprint(open_shard(file.path, 1 << 32))["blake2b"]
            if mark in marks["val"]:
                parts["val"].append(file)
            elif mark in marks["train"] or file.path.name == before["val"][0]["name"]:  # a tenth of it was held out
                parts["train"].append(file)
    train, held = parts["train"], parts["val"]
    same = len(train) == len(marks["train"]) and len(held) in (0, len(marks["val"]))
    return Chosen(train, held, shards=True) if train and same else None


def _from_shards(chosen: Chosen, vocab_size: int | None, model: Vocabulary | None, log: Log) -> Dataset:
    paths = [file.path for file in (*chosen.train, *chosen.val)]
    path = paths[0].parent / "tokenizer.json"
    tokenizer = Tokenizer.load(path) if path.exists() else None
    if model is not None:
        vocab_size = vocab_size or model.size
        if model.tokenizer is not None:
            own = Tokenizer.load(model.tokenizer)
            vocab_size = own.vocab_size  # a model may have more rows
            if tokenizer and not tokenizer.same_tokens(own):
                raise LlmpyError(
                    "tokenizer.mismatch",
                    f"{paths[0].parent} holds tokens of another tokenizer than the model's, {model.tokenizer}",
                    f"Encode the text again: {command('data', '…', '--tokenizer', model.tokenizer)}",
                )
            tokenizer, path = own, model.tokenizer
    if tokenizer and vocab_size not in (None, tokenizer.vocab_size):
        message = f"{path} has {tokenizer.vocab_size:,} tokens, but {vocab_size:,} are required"
        raise LlmpyError("tokenizer.vocab-mismatch", message, "Omit --vocab-size, or move that file away")
    size = tokenizer.vocab_size if tokenizer else vocab_size or GPT2_VOCAB
    opened = [open_shard(p, size) for p in paths]
    if any(shard.tokens.dtype != opened[0].tokens.dtype for shard in opened):
        kinds = ", ".join(sorted({str(shard.tokens.dtype) for shard in opened}))
        raise LlmpyError("shard.mixed-types", f"token shards of several types: {kinds}", "Give one type at a time")
    train, val = opened[: len(chosen.train)], opened[len(chosen.train) :]
    for role, part, files in (("training   ", train, chosen.train), ("validation ", val, chosen.val)):
        if part:
            log(f"{role} {count_of(len(part), 'token shard')}, {sum(map(len, part)):,} tokens: {shown(files)}")
    if not val:
        last = train[-1]
        cut = len(last) - int(HELD_OUT * len(last))
        train, val = [*train[:-1], last.part(0, cut)], [last.part(cut, len(last))]
        log(f"validation  the last tenth of {last.path.name}")
    if tokenizer:
        log(f"tokenizer: {path}, {size:,} tokens")
    else:
        log(f"no tokenizer.json next to the shards: vocabulary of {size:,} tokens, samples show token ids")
    return _dataset(train, val, tokenizer, size, log)


def _dataset(train: list[Shard], val: list[Shard], tokenizer: Tokenizer | None, size: int, log: Log) -> Dataset:
    """Log the number of tokens and the first few, so that users recognize their data."""
    log(f"{sum(map(len, train)):,} training tokens, {sum(map(len, val)):,} validation tokens")
    first = train[0].tokens[:SAMPLE_TOKENS].tolist()
    log(f"starts with: {tokenizer.decode(first) if tokenizer else first!r}")
    return Dataset(train, val, tokenizer, size)
