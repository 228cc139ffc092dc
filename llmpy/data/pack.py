"""`llmpy data`: documents → token files in a folder of their own, with the tokenizer that reads them.

FOLDER/train.bin   val.bin   tokenizer.json   dataset.json

The folder appears under its name when everything in it is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import LlmpyError, unreadable
from ..options.data import DATA_NAMES, DataOptions
from ..system.cache import data_cache
from ..system.command import command
from ..system.durable import made
from ..system.lock import Lock
from .datasets import SOURCES, hellaswag_lines
from .hellaswag import encode_examples, write_examples
from .pipeline import OWN, Corpus, Log, choose_tokenizer, divided, write_tokens
from .shards import open_shard
from .text import Skip, find_files, stream_files
from .tokenizer import Tokenizer

RECORD = "dataset.json"
SAMPLE_TOKENS = 24


def data(options: DataOptions, log: Log = print, skip: Skip = None) -> Path:
    """Make the token files of a dataset or of the user's text; returns their folder.

    Raises LlmpyError for whatever cannot be read, downloaded or written, and for a folder with anything in it.
    """
    if not all(options.what) or not options.what:
        raise LlmpyError(
            "data.x", "nothing to prepare is named", f"Name files or folders of text, or {', '.join(DATA_NAMES)}"
        )
    name = next(filter(is_dataset, options.what), None)
    if name is not None and len(options.what) > 1:
        raise LlmpyError("data.x", f"{name} is a data set of its own", "Prepare one at a time")
    if options.source and name is None:
        raise LlmpyError("data.x", "--source goes with the name of a data set", f"Name one of {', '.join(DATA_NAMES)}")
    if options.source and not options.source.exists():
        raise LlmpyError("data.x", f"no file or folder {options.source}", "Check --source")
    if name is not None and options.tokenizer is None:
        options = replace(options, tokenizer="gpt2")
    request = _request(options)
    folder = options.out or _folder(name, options, request)
    if folder.absolute() == Path.cwd():  # it is to be replaced
        raise LlmpyError("data.x", f"--out {folder} is a folder that is in use", "Name a new one in it")
    source = None if options.source is None else os.path.abspath(options.source)

    def is_there() -> bool:
        there = _record(folder)
        if there is None or any(there.get(key) != value for key, value in request.items()):
            return False
        other = f", made from {there.get('source')}: remove the folder to make it from another source"
        log(f"{options.what[0]} is already in {folder}" + other * (there.get("source") != source))
        return True

    if name is not None and is_there():
        return folder
    _check_empty(folder)
    with _workplace(folder.absolute(), log) as work:
        if is_there():  # another process has made it meanwhile
            return folder
        _check_empty(folder)
        record = _hellaswag(options, work, log) if name == "hellaswag" else _tokens(options, name, work, log, skip)
        record = request | {"source": source} | record
        (work / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        if folder.exists():
            folder.rmdir()
        work.rename(folder.absolute())
    word = name if name and folder == data_cache() / name / "gpt2" else folder
    log(f"ready in {folder}" + ("" if name == "hellaswag" else f"; train on it:  {command('train', '--data', word)}"))
    return folder


def is_dataset(what: str | Path) -> bool:
    """Whether it is the name of a dataset, and of no file or folder here."""
    return str(what) in DATA_NAMES and not Path(what).exists()


def find_dataset(name: str, log: Log, tokenizer: str = "gpt2") -> Path:
    """Return the folder of a named dataset's tokens, made now if it is missing; of a huge one a portion will do.

    Raises LlmpyError for one not to train on, for one that is there in several portions, and as `data` does.
    """
    if name not in SOURCES:
        raise LlmpyError(
            "data.x", f"{name} is there to evaluate on", f"Train on one of {', '.join(SOURCES)}, or on your own text"
        )
    whole = DataOptions(what=(name,), tokenizer=tokenizer)
    portion = replace(whole, tokens=SOURCES[name].portion)
    there = sorted(record.parent for record in (data_cache() / name).glob(f"[!.]*/{RECORD}"))
    for options in (whole, portion):
        if _folder(name, options, _request(options)) in there:
            return data(options, log)
    if there and tokenizer == "gpt2":  # other tokens of it, which the user has made
        if len(there) > 1:
            raise LlmpyError("data.x", f"{name} is there more than once", f"Name one: {', '.join(map(str, there))}")
        return there[0]
    if portion.tokens:
        log(f"{name} is not here yet: making its first {portion.tokens:,} tokens (all of it: {command('data', name)})")
    return data(portion, log)


def _request(options: DataOptions) -> dict[str, Any]:
    """Return what was asked for, as dataset.json has it; a tokenizer of a file by its content, in whatever form."""
    tokenizer = options.tokenizer
    if tokenizer not in (None, "gpt2", "bytes") and not tokenizer.startswith("bpe:"):
        content = Tokenizer.load(Path(tokenizer)).to_json()
        tokenizer = "sha256:" + hashlib.sha256(content.encode()).hexdigest()[:12]
    return {
        "data": [what if is_dataset(what) else os.path.abspath(what) for what in options.what],
        "tokenizer": tokenizer,
        "format": options.format,
        "tokens_at_most": options.tokens,
    }


def _folder(name: str | None, options: DataOptions, request: dict[str, Any]) -> Path:
    """Where the tokens go without --out: the cache for a named dataset, below data/ for the user's own text."""
    if name is None:
        called = Path(os.path.abspath(options.what[0])).name.partition(".")[0]
        return Path("data", re.sub(r"[*?\[\]]", "", called) or "text")
    parts = [request["tokenizer"].replace(":", "-"), "" if options.format == "auto" else options.format]
    return data_cache() / name / "-".join(filter(None, [*parts, str(options.tokens or "")]))


def _record(folder: Path) -> dict[str, Any] | None:
    """What dataset.json says of a folder of ours."""
    try:
        there = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return there if isinstance(there, dict) and "files" in there else None


def _check_empty(folder: Path) -> None:
    """Raise LlmpyError if the folder holds anything, or is none."""
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise unreadable(folder, error) from error
    if taken:
        fix = "choose another folder with --out, or remove it"
        if _record(folder):
            fix = f"train on it: {command('train', '--data', folder)}; or {fix}"
        raise LlmpyError("data.x", f"{folder} is not empty", fix)


@contextlib.contextmanager
def _workplace(folder: Path, log: Log) -> Iterator[Path]:
    """Give a temporary folder beside `folder` to this process alone: another that makes `folder` is waited for."""
    work = folder.with_name(f".{folder.name}.tmp")
    try:
        with made(folder.parent), Lock(folder.with_name(f".{folder.name}.making")).waited(log, f"makes {folder}"):
            try:
                shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
                work.mkdir()
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise LlmpyError(
            "data.x", f"cannot make {folder}: {error.strerror or error}", "Choose another folder (--out)"
        ) from error


def _hellaswag(options: DataOptions, work: Path, log: Log) -> dict[str, Any]:
    if str(options.tokenizer).startswith("bpe:"):
        raise LlmpyError("data.x", "HellaSwag is no text to train a tokenizer on", "Use --tokenizer gpt2 or a file")
    raw = hellaswag_lines(options.source, log)
    tokenizer, _ = choose_tokenizer(options.tokenizer, Corpus(lambda: iter(())), log)
    examples = list(itertools.islice(encode_examples(raw, tokenizer), options.tokens))
    path = work / "hellaswag_val.bin"
    write_examples(path, examples)
    tokenizer.save(work / "tokenizer.json")
    log(f"HellaSwag: {len(examples):,} contexts with four endings, in llm.c's format")
    return {"files": {path.name: len(examples)}}


def _tokens(options: DataOptions, name: str | None, work: Path, log: Log, skip: Skip) -> dict[str, Any]:
    if name is None:
        files = find_files([Path(what) for what in options.what], skip)
        corpus, layout = divided(lambda log: stream_files(files, log), log), OWN
    else:
        source, layout = SOURCES[name], SOURCES[name].layout
        # Documents may be read twice, to train a tokenizer and to encode. Once is enough to say what they are.
        tells = itertools.chain([log], itertools.repeat(lambda _: None))
        corpus = Corpus(lambda: ((d.source == layout.val, d) for d in source.documents(options.source, next(tells))))
    tokenizer, whose = choose_tokenizer(options.tokenizer, corpus, log)
    counts = write_tokens(corpus, tokenizer, whose, work, log, layout, options.tokens or 0, options.format)
    listed = [f"{file}: {count:,} tokens" for file, count in counts.items()]
    log("  ".join(listed if len(listed) <= 4 else [*listed[:3], "…", listed[-1]]))
    train = open_shard(work / min(counts, key=lambda file: "val" in file), tokenizer.vocab_size)
    log(f"it begins: {tokenizer.decode(train.tokens[:SAMPLE_TOKENS])!r}")
    return {"vocab_size": tokenizer.vocab_size, "files": counts}
