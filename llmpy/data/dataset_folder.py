"""`llmpy data`: documents → a folder of token files with their tokenizer.

FOLDER/train.bin   val.bin   tokenizer.json   dataset.json

The folder gets its name only when it is complete.
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
from ..system.command import command, command_here
from ..system.durable import made
from ..system.lock import Lock
from .datasets import SOURCES, hellaswag_lines
from .file_roles import choose
from .hellaswag import encode_examples, write_examples
from .pipeline import OWN, Corpus, Log, choose_tokenizer, given_tokenizer, split, write_tokens
from .shards import open_shard
from .text import Skip
from .tokenizer import Tokenizer

RECORD = "dataset.json"
SAMPLE_TOKENS = 24


def data(options: DataOptions, log: Log = print, skip: Skip = None) -> Path:
    """Write the token files of a named dataset or the user's text; return their folder.

    Raises LlmpyError if something cannot be read, downloaded or written, and if the folder is not empty.
    """
    if not all(options.what) or not options.what:
        hint = f"Name files or folders of text, or one of {', '.join(DATA_NAMES)}"
        raise LlmpyError("data.none-given", "no data given", hint)
    name = next(filter(is_dataset, options.what), None)
    if name is not None and (len(options.what) > 1 or options.val):
        raise LlmpyError(
            "dataset.not-alone", f"{name} cannot be combined with other data or --val", "Prepare one at a time"
        )
    if options.source and name is None:
        raise LlmpyError(
            "dataset.source-unnamed", "--source requires a named dataset", f"Name one of {', '.join(DATA_NAMES)}"
        )
    if options.source and not options.source.exists():
        raise LlmpyError("file.missing", f"no file or folder {options.source}", "Check --source")
    if name is not None and options.tokenizer is None:
        options = replace(options, tokenizer="gpt2")
    request = _request(options)
    folder = options.out or _folder(name, options, request)
    if folder.absolute() == Path.cwd():  # which the new folder could not replace
        raise LlmpyError("folder.in-use", f"--out {folder} is the current folder", "Choose a new folder in it")
    source = None if options.source is None else os.path.abspath(options.source)

    def exists() -> bool:
        record = _record(folder)
        if record is None or any(record.get(key) != value for key, value in request.items()):
            return False
        other = f", made from {record.get('source')}. To use another source, remove the folder"
        log(f"{options.what[0]} is already in {folder}" + other * (record.get("source") != source))
        return True

    if name is not None and exists():
        return folder
    _check_empty(folder)
    with _workplace(folder.absolute(), log) as work:
        if exists():  # made by another process in the meantime
            return folder
        _check_empty(folder)
        record = _hellaswag(options, work, log) if name == "hellaswag" else _tokens(options, name, work, log, skip)
        record = request | {"source": source} | record
        (work / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        if folder.exists():
            folder.rmdir()
        work.rename(folder.absolute())
    word = name if name and folder == data_cache() / name / "gpt2" else folder
    log(f"wrote {folder}" + ("" if name == "hellaswag" else f". Train on it: {command_here('train', '--data', word)}"))
    return folder


def is_dataset(what: str | Path) -> bool:
    """Return whether `what` names a dataset and no existing file or folder."""
    return str(what) in DATA_NAMES and not Path(what).exists()


def find_dataset(name: str, log: Log, tokenizer: str = "gpt2") -> Path:
    """Return the folder with the tokens of a named dataset. If missing, write it (a portion of a huge dataset).

    Raises LlmpyError for an evaluation dataset, if several folders match, and as `data` does.
    """
    if name not in SOURCES:
        hint = f"Train on one of {', '.join(SOURCES)}, or on your own text"
        raise LlmpyError("dataset.evaluation-only", f"{name} is for evaluation only", hint)
    whole = DataOptions(what=(name,), tokenizer=tokenizer)
    portion = replace(whole, tokens=SOURCES[name].portion)
    existing = sorted(record.parent for record in (data_cache() / name).glob(f"[!.]*/{RECORD}"))
    for options in (whole, portion):
        if _folder(name, options, _request(options)) in existing:
            return data(options, log)
    if existing and tokenizer == "gpt2":  # other tokens of this dataset, made by the user
        if len(existing) > 1:
            hint = f"Name one: {', '.join(map(str, existing))}"
            raise LlmpyError("dataset.ambiguous", f"{len(existing)} folders hold tokens of {name}", hint)
        return existing[0]
    if portion.tokens:
        log(f"no tokens of {name} yet: encoding its first {portion.tokens:,} (for all: {command('data', name)})")
    return data(portion, log)


def _request(options: DataOptions) -> dict[str, Any]:
    """Return the request as dataset.json records it; a tokenizer file by a hash of its content in any format."""
    tokenizer = options.tokenizer
    if tokenizer not in (None, "gpt2", "bytes") and not tokenizer.startswith("bpe:"):
        content = Tokenizer.load(Path(tokenizer)).to_json()
        tokenizer = "sha256:" + hashlib.sha256(content.encode()).hexdigest()[:12]
    return {
        "data": [what if is_dataset(what) else os.path.abspath(what) for what in options.what],
        "val": options.val and [os.path.abspath(path) for path in options.val],
        "tokenizer": tokenizer,
        "format": options.format,
        "tokens_at_most": options.tokens,
    }


def _folder(name: str | None, options: DataOptions, request: dict[str, Any]) -> Path:
    """Return the default of --out: in the cache for a named dataset, in data/ for the user's text."""
    if name is None:
        called = Path(os.path.abspath(options.what[0])).name.partition(".")[0]
        return Path("data", re.sub(r"[*?\[\]]", "", called) or "text")
    parts = [request["tokenizer"].replace(":", "-"), "" if options.format == "auto" else options.format]
    return data_cache() / name / "-".join(filter(None, [*parts, str(options.tokens or "")]))


def _record(folder: Path) -> dict[str, Any] | None:
    """Return the content of dataset.json, or None if the folder has no valid one."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and "files" in record else None


def _check_empty(folder: Path) -> None:
    """Raise LlmpyError if `folder` is not empty or not a folder."""
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise unreadable(folder, error) from error
    if taken:
        hint = "Choose another folder with --out, or remove it"
        if _record(folder):
            hint = f"Train on it: {command('train', '--data', folder)}. {hint}"
        raise LlmpyError("folder.not-empty", f"{folder} is not empty", hint)


@contextlib.contextmanager
def _workplace(folder: Path, log: Log) -> Iterator[Path]:
    """Yield a temporary folder next to `folder`; wait while another process makes `folder`."""
    work = folder.with_name(f".{folder.name}.tmp")
    try:
        with made(folder.parent), Lock(folder.with_name(f".{folder.name}.making")).waited(log, f"is writing {folder}"):
            try:
                shutil.rmtree(work, ignore_errors=True)  # left by a killed process
                work.mkdir()
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        message = f"cannot make {folder}: {error.strerror or error}"
        raise LlmpyError("file.unwritable", message, "Choose another folder (--out)") from error


def _hellaswag(options: DataOptions, work: Path, log: Log) -> dict[str, Any]:
    if str(options.tokenizer).startswith("bpe:"):
        message = f"--tokenizer {options.tokenizer} cannot be trained on HellaSwag"
        raise LlmpyError("option.conflict", message, "Use --tokenizer gpt2 or a file")
    raw = hellaswag_lines(options.source, log)
    tokenizer, _ = choose_tokenizer(options.tokenizer, Corpus(lambda: iter(())), log)
    examples = list(itertools.islice(encode_examples(raw, tokenizer), options.tokens))
    path = work / "hellaswag_val.bin"
    write_examples(path, examples)
    tokenizer.save(work / "tokenizer.json")
    log(f"HellaSwag: {len(examples):,} contexts with four endings, in llm.c's format")
    return {"files": {path.name: len(examples)}}


def _tokens(options: DataOptions, name: str | None, work: Path, log: Log, skip: Skip) -> dict[str, Any]:
    given = given_tokenizer(options.tokenizer, log)
    if name is None:
        chosen = choose([Path(what) for what in options.what], options.val, skip, log)
        if chosen.shards:
            hint = f"Train on it: {command('train', '--data', *options.what)}"
            raise LlmpyError("data.already-tokens", f"{chosen.train[0].path} holds tokens already", hint)
        corpus, layout = split(chosen, log, given[0].template if given else None), OWN
    else:
        source, layout = SOURCES[name], SOURCES[name].layout
        # Documents may be read twice, to train a tokenizer and to encode. Only the first time is logged.
        logs = itertools.chain([log], itertools.repeat(lambda _: None))
        corpus = Corpus(lambda: ((d.source == layout.val, d) for d in source.documents(options.source, next(logs))))
    tokenizer, label = given or choose_tokenizer(options.tokenizer, corpus, log)
    counts = write_tokens(corpus, tokenizer, label, work, log, layout, options.tokens or 0, options.format)
    listed = [f"{file}: {count:,} tokens" for file, count in counts.items()]
    log("  ".join(listed if len(listed) <= 4 else [*listed[:3], "…", listed[-1]]))
    train = open_shard(work / min(counts, key=lambda file: "val" in file), tokenizer.vocab_size)
    log(f"starts with: {tokenizer.decode(train.tokens[:SAMPLE_TOKENS])!r}")
    return {"vocab_size": tokenizer.vocab_size, "files": counts}
