"""The user's text: files, folders and patterns → documents.

Records (jsonl, jsonl.gz, parquet) are one document each (records.py). All other files are plain text: UTF-8 with or
without a byte-order mark, or UTF-16 with one. Other encodings are not guessed: a wrong guess would train on garbage for
hours. `\\r\\n` becomes `\\n`. A file is one document, or several separated by `<|endoftext|>`.
"""

from __future__ import annotations

import codecs
import glob
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import LlmpyError, unreadable
from ..options.data import DATA_NAMES
from ..system.words import count_of, did_you_mean
from .magic import lfs_pointer
from .rank_tables import EOT
from .records import Document, NotText, Tally, kind_of, read_records

LEAST_CHARACTERS = 1000
Skip = Callable[[Path], bool] | None  # returns whether a folder is not searched
TEXT_SUFFIXES = {".txt", ".md"}  # must be readable text; other files in a folder are skipped if not text
MARKS = {codecs.BOM_UTF8: "UTF-8", codecs.BOM_UTF16_LE: "UTF-16-LE", codecs.BOM_UTF16_BE: "UTF-16-BE"}
ARCHIVES = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip (or docx, odt, epub)", b"\x28\xb5\x2f\xfd": "zstd", b"%PDF": "PDF"}


@dataclass(frozen=True)
class Found:
    """A file to read; `named` if the user gave it or a pattern for it, rather than its folder."""

    path: Path
    named: bool


def find_files(paths: Sequence[Path], skip: Skip = None) -> list[Found]:
    """Return the files of `paths`: files, folders (recursive, sorted, not hidden) and patterns (`*`, `?`, `[`).

    Files found twice count once. Subfolders for which `skip` returns true are not searched.
    Raises LlmpyError for missing paths, pipes and devices: data are read more than once.
    """
    found: dict[Path, Found] = {}
    try:
        for real in itertools.chain.from_iterable(map(_expand, paths)):
            if real.is_dir():
                for file in _walk(real, skip):
                    found.setdefault(file.resolve(), Found(file, named=False))
            elif real.is_file():
                found[real.resolve()] = Found(real, named=True)
            else:  # a pipe cannot be read twice, and a device may never end
                message = f"{real} is neither a file nor a folder"
                raise LlmpyError("file.not-regular", message, "Save its content to a file and give that")
    except OSError as error:  # name too long, no permission
        raise unreadable(Path(error.filename), error) from error
    return list(found.values())


def stream_files(files: Sequence[Found], log: Callable[[str], None] = print) -> Iterator[Document]:
    """Yield the documents of `files` in order, reading one text file or record at a time; log a summary at the end.

    Raises LlmpyError if a named file, .txt or .md is not text, and for less than 1,000 characters in all.
    """
    kinds: Counter[str] = Counter()
    skipped: list[Path] = []
    characters = documents = 0
    tally = Tally()
    for found in files:
        try:
            kind, parts = _open(found.path, tally)
            first = next(parts, None)
        except NotText:
            if found.named or found.path.suffix.lower() in TEXT_SUFFIXES:
                raise
            skipped.append(found.path)
            continue
        kinds[kind] += 1
        for document in itertools.chain([first] if first else [], parts):
            characters += len(document.text)
            documents += 1
            yield document
    if skipped:
        names = ", ".join(path.name for path in skipped[:3]) + (", …" if len(skipped) > 3 else "")
        log(f"skipped {count_of(len(skipped), 'file that is', 'files that are')} not text: {names}")
    for line in tally.lines():
        log(line)
    read = sum(kinds.values())
    if characters < LEAST_CHARACTERS:
        amount = f"{count_of(read, 'file')} with {count_of(characters, 'character')} of text"
        hint = "Give more text, or no path to train on Python's documentation"
        raise LlmpyError("data.too-short", f"{amount}; training needs at least {LEAST_CHARACTERS:,}", hint)
    line = f"{count_of(read, 'file')}, {characters:,} characters, {', '.join(sorted(kinds))}"
    log(line + (f", {documents:,} documents" if documents != read else ""))


def read_text(path: Path) -> str:
    """Return the text of a file. Raises LlmpyError if it is not text."""
    return _decode(path, _read(path))[0]


def _open(path: Path, tally: Tally) -> tuple[str, Iterator[Document]]:
    """Return the format or encoding of a file, and its documents."""
    if kind := kind_of(path, _read(path, 16)):
        return kind, read_records(path, kind, tally)
    text, encoding = _decode(path, _read(path))
    return encoding, (Document(str(path), part) for part in text.split(EOT) if part.strip())


def _expand(path: Path) -> list[Path]:
    """Return the path if it exists, else its matches as a pattern (which shells leave alone in quotes)."""
    if path.exists():
        return [path]
    if glob.has_magic(str(path)):
        if matches := sorted(glob.glob(str(path), recursive=True)):
            return [Path(match) for match in matches]
        raise LlmpyError("file.missing", f"nothing matches {path}", "Check the folder and the pattern")
    neighbours = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, [*neighbours, *(DATA_NAMES if path.parent == Path() else ())])
    raise LlmpyError("file.missing", f"no file or folder {path}", hint or "Check the path")


def _walk(folder: Path, skip: Skip) -> list[Path]:
    """Return all regular, non-hidden files below `folder`, sorted by path."""
    files: list[Path] = []
    for where, folders, names in os.walk(folder, onerror=_raise):
        if skip and Path(where) != folder and skip(Path(where)):
            folders.clear()
            continue
        folders[:] = (name for name in folders if not name.startswith("."))
        files += (Path(where, name) for name in names if not name.startswith("."))
    return sorted(filter(Path.is_file, files))


def _raise(error: OSError) -> None:
    raise error


def _read(path: Path, most: int = -1) -> bytes:
    """Return the first `most` bytes of a file, or all."""
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise unreadable(path, error) from error


def _decode(path: Path, data: bytes) -> tuple[str, str]:
    """Return the text of a file and its encoding. Raises NotText, naming file and byte, if it is not text."""
    if archive := next((name for magic, name in ARCHIVES.items() if data.startswith(magic)), None):
        raise NotText("data.not-text", f"{path} is {archive}, not text", "Unpack it, or save it as plain text")
    if pointer := lfs_pointer(data):
        raise NotText("file.lfs-pointer", f"{path} {pointer[0]}", pointer[1])
    mark = next((m for m in MARKS if data.startswith(m)), b"")
    encoding = MARKS.get(mark, "UTF-8")
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        offset = len(mark) + error.start
        raise NotText(
            "data.not-utf8",
            f"{path} is not {encoding}: byte 0x{data[offset]:02x} at offset {offset:,} ({error.reason})",
            f"Convert it: iconv -f WINDOWS-1252 -t UTF-8 {path} > new.txt (or from its actual encoding)",
        ) from error
    if "\0" in text:
        raise NotText(
            "data.not-text",
            f"{path} is binary, not text: character {text.index(chr(0)):,} is NUL",
            "Give plain UTF-8 text. If it is UTF-16 without a byte-order mark: iconv -f UTF-16LE -t UTF-8",
        )
    return text.replace("\r\n", "\n"), encoding.removesuffix("-LE").removesuffix("-BE")
