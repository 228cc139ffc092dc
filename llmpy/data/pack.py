"""`llmpy data`: documents → token files in a folder of their own, with the tokenizer that reads them.

FOLDER/train.bin   val.bin   tokenizer.json   dataset.json

The tokens go to one long temporary file first: only when their number is known can a part be held out. The folder
appears under its name when everything in it is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LlmpyError
from ..options.data import DATA_NAMES, DataOptions
from ..system.cache import data_cache
from ..system.command import command
from ..system.durable import made
from ..system.lock import Lock
from ..system.words import did_you_mean
from .datasets import SHARD_TOKENS, SOURCES, Layout, hellaswag_lines
from .encode import TOKENIZER_SEES, encode, pieces
from .hellaswag import encode_examples, read_examples, write_examples
from .rank_tables import LLMC_FILE, Ranks, write_llmc
from .records import Document
from .shards import FORMS, HEADER_BYTES, form_for, write_shard
from .text import find_files, stream_files
from .tokenizer import Tokenizer

RECORD, MAKING = "dataset.json", ".making"
HELD_OUT = 0.1  # of a user's own text
SAMPLES, SAMPLE_TOKENS = 3, 32
SEEKABLE = 2**31 - 1  # bytes of a file that llm.c, which seeks by an int, can read to its end


def data(options: DataOptions, say: Callable[[str], None] = print) -> Path:
    """Make the token files of a data set or of the user's text; returns their folder.

    Raises LlmpyError for whatever cannot be read, downloaded or written, and for a folder with anything in it.
    """
    if not all(options.what) or not options.what:
        raise LlmpyError("nothing to prepare is named", f"name files or folders of text, or {', '.join(DATA_NAMES)}")
    names = [*filter(is_dataset, options.what)]
    if names and len(options.what) > 1:
        raise LlmpyError(f"{names[0]} is a data set of its own", "prepare one at a time")
    if options.source and not names:
        raise LlmpyError("--source goes with the name of a data set", f"name one of {', '.join(DATA_NAMES)}")
    if options.source and not options.source.exists():
        raise LlmpyError(f"no file or folder {options.source}", "check --source")
    request = _request(options)
    folder = options.out or _folder(names[0] if names else None, options, request)
    if folder.absolute() == Path.cwd() or folder.name == "..":  # it is to be replaced
        raise LlmpyError(f"--out {folder} is a folder that is in use", "name a new one in it")
    if names and (found := _found(folder, request)):
        say(_already(options, folder, found))
        return folder
    _check_empty(folder)
    with _alone(folder, say):
        if found := _found(folder, request):  # another process has made it meanwhile
            say(_already(options, folder, found))
            return folder
        _check_empty(folder)
        with _workplace(folder) as work:
            record = _hellaswag(options, work, say) if names == ["hellaswag"] else _tokens(options, names, work, say)
            record = request | {"source": _source(options)} | record
            (work / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    word = names[0] if names and folder == data_cache() / names[0] / "gpt2" else folder
    say(
        f"ready in {folder}" + ("" if names == ["hellaswag"] else f"; train on it:  {command('train', '--data', word)}")
    )
    return folder


def is_dataset(what: str | Path) -> bool:
    """Whether it is the name of a data set, and of no file or folder here."""
    return str(what) in DATA_NAMES and not Path(what).exists()


def find_dataset(name: str, say: Callable[[str], None], tokenizer: str = "gpt2") -> Path:
    """The folder of a named data set's tokens, made now if it is not there; of a huge one as many as training can use.

    Raises LlmpyError for one not to train on, for one that is there in several portions, and as `data` does.
    """
    if name not in SOURCES:
        raise LlmpyError(
            f"{name} is there to evaluate on", f"train on one of {', '.join(SOURCES)}, or on your own text"
        )
    whole = DataOptions(what=(name,), tokenizer=tokenizer)
    portion = replace(whole, tokens=SOURCES[name].portion)
    there = sorted(record.parent for record in (data_cache() / name).glob(f"[!.]*/{RECORD}"))
    for options in (whole, portion):
        if _folder(name, options, _request(options)) in there:
            return data(options, say)
    if len(there) == 1 and tokenizer == "gpt2":
        return there[0]
    if there and tokenizer == "gpt2":
        raise LlmpyError(f"{name} is there more than once", f"name one: {', '.join(map(str, there))}")
    if portion.tokens:
        say(f"{name} is not here yet: making its first {portion.tokens:,} tokens (all of it: {command('data', name)})")
    return data(portion, say)


def load_tokenizer(name: str, documents: Callable[[], Iterable[Document]], say: Callable[[str], None]) -> Tokenizer:
    """The tokenizer of `--tokenizer`: gpt2, bytes, bpe:N (trained on the documents), or a file."""
    if name == "gpt2":
        try:
            return Tokenizer.gpt2(say)
        except LlmpyError as fault:
            if documents is _no_documents:
                raise
            raise LlmpyError(f"{fault}: --tokenizer bpe:4096 learns one from the text, without the network") from fault
    if name == "bytes":
        return Tokenizer.bytes()
    if name.startswith("bpe:"):
        return Tokenizer.train(_first(documents(), TOKENIZER_SEES), int(name.removeprefix("bpe:")))
    return Tokenizer.load(Path(name))


def _first(documents: Iterable[Document], characters: int) -> Iterator[str]:
    """Pieces of the documents, until there are so many characters."""
    for document in documents:
        for piece in pieces(document.text):
            if characters <= 0:
                return
            characters -= len(piece)
            yield piece


def _request(options: DataOptions) -> dict[str, Any]:
    """What was asked for, as dataset.json has it; a tokenizer of a file by its content, in whatever form."""
    tokenizer = options.tokenizer
    if tokenizer not in ("gpt2", "bytes") and not tokenizer.startswith("bpe:"):
        if not Path(tokenizer).exists():
            raise LlmpyError(
                f"cannot read the tokenizer {tokenizer}: no such file",
                f"{did_you_mean(tokenizer, ('gpt2', 'bytes'))} use gpt2, bytes, bpe:N, or a file".lstrip(),
            )
        content = Tokenizer.load(Path(tokenizer)).to_json()
        tokenizer = "sha256:" + hashlib.sha256(content.encode()).hexdigest()[:12]
    return {
        "data": [what if is_dataset(what) else os.path.abspath(what) for what in options.what],
        "tokenizer": tokenizer,
        "format": options.format,
        "tokens_at_most": options.tokens,
    }


def _folder(name: str | None, options: DataOptions, request: dict[str, Any]) -> Path:
    """Where the tokens go without --out: the cache for a named data set, below data/ for the user's own text."""
    if name is None:
        called = Path(os.path.abspath(options.what[0])).name.partition(".")[0]
        return Path("data", re.sub(r"[*?\[\]]", "", called) or "text")
    tokenizer = request["tokenizer"].replace(":", "-")
    parts = [tokenizer, *([options.format] if options.format != "auto" else [])]
    return data_cache() / name / "-".join([*parts, *([str(options.tokens)] if options.tokens else [])])


def _found(folder: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a folder that holds what is asked for."""
    there = _record(folder)
    return there if there and all(there.get(key) == value for key, value in request.items()) else None


def _record(folder: Path) -> dict[str, Any] | None:
    """What dataset.json says of a folder of ours."""
    try:
        there = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return there if isinstance(there, dict) and "files" in there else None


def _check_empty(folder: Path) -> None:
    """Raise LlmpyError if the folder holds anything."""
    with contextlib.suppress(OSError):
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return
    there = _record(folder)
    if there and there.get("data") != ["hellaswag"]:
        use = f"train on them: {command('train', '--data', folder)}; for others choose another with --out, or remove it"
        raise LlmpyError(f"{folder} has tokens already", use)
    raise LlmpyError(f"{folder} is not empty", "choose another folder with --out, or remove it")


def _already(options: DataOptions, folder: Path, found: dict[str, Any]) -> str:
    """That there is nothing to do, and where that may not be what the user thinks."""
    there, made_from = f"{options.what[0]} is already in {folder}", found.get("source")
    if made_from == _source(options):
        return there
    if options.source is None:
        return f"{there}, made from {made_from}"
    return f"{there}; {options.source} is not read: to make it from that, remove the folder or name another with --out"


def _source(options: DataOptions) -> str | None:
    """What --source names, as dataset.json has it."""
    return None if options.source is None else os.path.abspath(options.source)


@contextlib.contextmanager
def _alone(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Within, no other process makes `folder`: one that does is waited for.

    The lock beside it tells that its process lives; what killed ones left, whose locks are free, is removed.
    """
    folder = folder.absolute()
    with made(folder.parent):
        try:
            _remove_abandoned(folder.parent)
            with Lock(folder.with_name(f".{folder.name}{MAKING}")).waited(say, f"makes {folder}"):
                yield
        except OSError as fault:
            raise LlmpyError(
                f"cannot make {folder}: {fault.strerror or fault}", "choose another folder (--out)"
            ) from fault


@contextlib.contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, which takes its place if all goes well."""
    folder = folder.absolute()
    work = folder.with_name(f".{folder.name}.tmp")
    try:
        if work.exists():  # of a process that was killed
            shutil.rmtree(work)
        work.mkdir()
        yield work
        if folder.exists():
            folder.rmdir()
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    for path in parent.glob(f".*{MAKING}"):
        lock, work = Lock(path), path.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # somebody else's
            # One who has no work yet is about to take the lock, and would be told to wait.
            if work.exists() and lock.take():
                shutil.rmtree(work, ignore_errors=True)
                lock.drop()


def _hellaswag(options: DataOptions, work: Path, say: Callable[[str], None]) -> dict[str, Any]:
    raw = hellaswag_lines(options.source, say)
    tokenizer = load_tokenizer(options.tokenizer, _no_documents, say)
    examples = list(itertools.islice(encode_examples(raw, tokenizer), options.tokens))
    path = work / "hellaswag_val.bin"
    write_examples(path, examples)
    read_examples(path, tokenizer.vocab_size)
    tokenizer.save(work / "tokenizer.json")
    say(f"HellaSwag: {len(examples):,} contexts with four endings, in llm.c's format")
    for example in examples[:: max(1, len(examples) // SAMPLES)][:SAMPLES]:
        say(f"sample: {tokenizer.decode(example.context)!r} → {tokenizer.decode(example.endings[example.label])!r}")
    return {"files": {path.name: len(examples)}}


def _no_documents() -> Iterable[Document]:
    raise LlmpyError("HellaSwag is no text to train a tokenizer on", "use --tokenizer gpt2 or a file")


def _tokens(options: DataOptions, names: list[str], work: Path, say: Callable[[str], None]) -> dict[str, Any]:
    said: set[str] = set()

    def tell(line: str) -> None:  # once, though the documents may be read twice: to train a tokenizer, to encode
        if line not in said:
            said.add(line)
            say(line)

    layout = SOURCES[names[0]].layout if names else Layout(None)
    files = [] if names else find_files([Path(what) for what in options.what], tell)

    def documents() -> Iterable[Document]:
        return SOURCES[names[0]].documents(options.source, tell) if names else stream_files(files, tell)

    tokenizer = load_tokenizer(options.tokenizer, documents, tell)
    form = form_for(tokenizer.vocab_size) if options.format == "auto" else options.format
    table = _checked_form(form, tokenizer)
    # as llm.c does, whose data sets are cut into documents already; in the user's own text EOT may separate them
    encoder = tokenizer.ordinary() if names else tokenizer
    spool = _spool(documents(), encoder, work, layout.val, options.tokens, say)
    if spool.counted is not None and form == "int32":
        say("note: a stream of int32 has no mask: prompts count in the loss like all else")
    files_of = {}
    for name, start, stop in _cuts(spool, layout, tokenizer.eot, FORMS[form].dtype.itemsize):
        counted = None if spool.counted is None or form == "int32" else spool.counted[start:stop]
        write_shard(work / name, spool.ids[start:stop], form, counted)
        files_of[name] = stop - start
    tokenizer.save(work / "tokenizer.json")
    if table is not None:
        write_llmc(work / LLMC_FILE, table)
    say("  ".join(f"{name}: {count:,} tokens" for name, count in _shown(files_of)))
    if spool.counted is not None:
        share = np.count_nonzero(spool.counted)
        say(f"the loss counts {share:,} of {len(spool.ids):,} tokens: completions and what the assistant says")
    for text in _samples(spool.ids, tokenizer):
        say(f"sample: {text!r}")
    del spool  # Windows removes no file that is mapped
    for temporary in work.glob("*.tmp"):
        temporary.unlink()
    return {"vocab_size": tokenizer.vocab_size, "files": files_of}


def _checked_form(form: str, tokenizer: Tokenizer) -> Ranks | None:
    """The table that goes with the form, if one does: programs that read int32 read their tokenizer from llm.c's file.

    Raises LlmpyError, before anything is encoded, if they do not fit each other.
    """
    if tokenizer.vocab_size - 1 > np.iinfo(FORMS[form].dtype).max:
        raise LlmpyError(f"--format {form} cannot hold {tokenizer.vocab_size:,} tokens", "leave --format out")
    if form != "int32":
        return None
    try:
        return tokenizer.ranks()
    except LlmpyError as fault:
        why = str(fault).partition(" — ")[0]
        raise LlmpyError(f"--format int32 goes with llm.c's tokenizer file: {why}", "leave --format out") from fault


@dataclass(frozen=True)
class _Spool:
    """All tokens in one temporary file, memory-mapped; `held` of them come from the documents held out."""

    ids: np.ndarray
    counted: np.ndarray | None
    held: int


def _spool(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    work: Path,
    val: int | str | None,
    limit: int | None,
    say: Callable[[str], None],
) -> _Spool:
    """Encode all documents, or as many as give `limit` tokens."""
    from tqdm import tqdm

    total = held = characters = 0
    dtype, masked = np.dtype(np.uint16), False
    start = time.perf_counter()
    ids_path, mask_path = work / "ids.tmp", work / "mask.tmp"
    bar = tqdm(unit="char", unit_scale=True, leave=False, disable=None)
    with ids_path.open("wb") as ids, mask_path.open("wb") as mask, bar:
        for is_held, group in itertools.groupby(documents, lambda document: document.source == val):
            for block in encode(tokenizer, group):
                n = len(block.ids) if limit is None else min(len(block.ids), limit - total)
                dtype = block.ids.dtype
                ids.write(block.ids[:n].tobytes())
                if block.counted is not None and not masked:
                    masked = True
                    mask.writelines(b"\1" * min(1 << 20, total - at) for at in range(0, total, 1 << 20))
                if masked:
                    mask.write(b"\1" * n if block.counted is None else block.counted[:n].tobytes())
                total += n
                held += n * is_held
                characters += block.characters
                bar.update(block.characters)
                if total == limit:
                    break
            if total == limit:
                break
    seconds = time.perf_counter() - start
    if total < 2:
        raise LlmpyError("there is no text in it", "give other data")
    say(
        f"{total:,} tokens of {tokenizer.vocab_size:,} from {characters:,} characters in {seconds:.1f} s: "
        f"{characters / 1e6 / seconds:.1f} MB/s"
    )
    counted = np.memmap(mask_path, np.bool_, "r") if masked else None
    return _Spool(np.memmap(ids_path, dtype, "r"), counted, held)


def _cuts(spool: _Spool, layout: Layout, eot: int, itemsize: int) -> Iterator[tuple[str, int, int]]:
    """Name, start and end of each token file, of `itemsize` bytes a token."""
    n = len(spool.ids)
    if layout.val is None:
        cut = _border(spool.ids, n - min(int(HELD_OUT * n) or 1, SHARD_TOKENS), eot)
        yield layout.val_name, cut, n
        start, stop = 0, cut
    else:
        held, most = (layout.val, n // 2) if isinstance(layout.val, int) else (spool.held, n)
        if held >= most:  # of a part (--tokens) a tenth, so that something is left to train on
            held = min(held, int(HELD_OUT * n))
        if not 0 < held < n:
            raise LlmpyError(f"of {n:,} tokens {held:,} would be held out", "give more data, or a larger --tokens")
        yield layout.val_name, 0, held
        start, stop = held, n
    whole = layout.one_file and HEADER_BYTES + (stop - start) * itemsize <= SEEKABLE
    starts = range(start, stop, stop - start if whole else SHARD_TOKENS)
    name = layout.train_name
    if len(starts) > 1 and "{" not in name:
        name = name.replace(".bin", "_{:06d}.bin")
    for number, at in enumerate(starts, 1):
        yield name.format(number), at, min(at + starts.step, stop)


def _border(ids: np.ndarray, cut: int, eot: int) -> int:
    """The beginning of a document nearest to `cut`, if it is near; else `cut`."""
    reach = (len(ids) - cut) // 2
    first = max(1, cut - reach)
    borders = np.flatnonzero(ids[first : cut + reach] == eot) + first
    return int(borders[np.argmin(np.abs(borders - cut))]) if borders.size else cut


def _shown(files: dict[str, int]) -> Iterable[tuple[str, int]]:
    """The first few files, then the last."""
    listed = list(files.items())
    return listed if len(listed) <= 4 else [*listed[:3], listed[-1]]


def _samples(ids: np.ndarray, tokenizer: Tokenizer) -> Iterator[str]:
    """How documents begin, at three places of the data; in the middle of one where it is long."""
    for i in range(SAMPLES):
        start = i * len(ids) // SAMPLES
        near = np.flatnonzero(ids[start : start + (1 << 16)] == tokenizer.eot)
        start += int(near[0]) + 1 if near.size and start + near[0] + 1 < len(ids) else 0
        yield tokenizer.decode(ids[start : start + SAMPLE_TOKENS])
