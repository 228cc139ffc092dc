"""The user's text: files, folders and patterns → documents. file_roles.py decides which files to use.

Records (jsonl, jsonl.gz, parquet) are one document each (records.py). All other files are plain text: UTF-8 with or
without a byte-order mark, or UTF-16 with one. Other encodings are not guessed: a wrong guess would train on garbage for
hours. `\\r\\n` becomes `\\n`. A file is one document, or several separated by `<|endoftext|>`.
"""

from __future__ import annotations

import codecs
import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import LlmpyError, unreadable
from ..options.data import DATA_NAMES
from ..system.words import count_of, did_you_mean
from .chat_template import ChatTemplate
from .magic import HEADER_BYTES, SEALED, lfs_pointer
from .rank_tables import EOT
from .records import Document, Tally, kind_of, read_records

LEAST_CHARACTERS = 1000
Skip = Callable[[Path], bool] | None  # returns whether a folder is not searched
MARKS = {codecs.BOM_UTF8: "UTF-8", codecs.BOM_UTF16_LE: "UTF-16-LE", codecs.BOM_UTF16_BE: "UTF-16-BE"}
SHOWN = 5  # names and errors listed before a count


@dataclass(frozen=True)
class Found:
    """A file to read; `named` if the user gave it or a pattern for it, rather than its folder."""

    path: Path
    named: bool
    real: Path  # without links
    names: tuple[tuple[str, ...], ...]  # of the folders below the given path and the file, for every way to it


def find_files(paths: Sequence[Path], skip: Skip = None) -> list[Found]:
    """Return the files of `paths`: files, folders (recursive, sorted, not hidden) and patterns (`*`, `?`, `[`).

    Links are followed. Files and folders found twice count once. Subfolders for which `skip` returns true are not
    searched. Raises LlmpyError for missing paths.
    """
    found: dict[Path, Found] = {}
    seen = set[Path]()
    try:
        for path, base in itertools.chain.from_iterable(_expand(path, len(paths) == 1) for path in paths):
            for file in _walk(path, skip, seen) if path.is_dir() else [path]:
                one = Found(file, file is path, Path(os.path.realpath(file)), (file.relative_to(base).parts,))
                old = found.get(one.real, one)
                kept = one if one.named else old
                found[one.real] = replace(kept, names=tuple(dict.fromkeys(old.names + one.names)))
    except OSError as error:  # name too long, no permission
        raise unreadable(Path(error.filename), error) from error
    return list(found.values())


def first_bytes(path: Path) -> bytes:
    """Return the start of a file. Raises LlmpyError if it cannot be read, or is a link to nothing or a pipe."""
    if path.is_symlink() and not path.exists():
        what = f"{path} is a link to {os.readlink(path)}, which does not exist"
        raise LlmpyError("file.dangling-link", what, "Restore the target, or remove the link")
    if not path.is_file():  # a pipe cannot be read twice, and a device may never end
        what = f"{path} is neither a file nor a folder"
        raise LlmpyError("file.not-regular", what, "Save its content to a file and give that")
    return _read(path, HEADER_BYTES)


def refuse_sealed(path: Path, start: bytes) -> None:
    """Raise LlmpyError if a file that starts with `start` cannot be text: a git-lfs pointer, an archive, a pickle …"""
    if pointer := lfs_pointer(start):
        raise LlmpyError("file.lfs-pointer", f"{path} {pointer[0]}", pointer[1])
    for pattern, what, fix in SEALED:
        if re.match(pattern, start, re.DOTALL):
            raise LlmpyError("data.not-text", f"{path} is {what}, not text", fix)


def shown(files: Sequence[Found]) -> str:
    """Return the names of the first files, and the number of others."""
    rest = f" and {len(files) - SHOWN:,} more" if len(files) > SHOWN else ""
    return ", ".join("/".join(file.names[0]) for file in files[:SHOWN]) + rest


def refuse_all(problems: Sequence[LlmpyError]) -> None:
    """Raise the only problem, or an error that lists the first ones."""
    if problems:
        if len(problems) == 1:
            raise problems[0]
        listed = "; ".join(f"({n}) {error} [{error.code}]" for n, error in enumerate(problems[:SHOWN], 1))
        rest = f"; and {len(problems) - SHOWN:,} more" if len(problems) > SHOWN else ""
        raise LlmpyError("data.unusable", f"{len(problems):,} files cannot be used: {listed}{rest}")


def stream_files(
    files: Sequence[Found], log: Callable[[str], None] = print, role: str = "training",
    problems: list[LlmpyError] | None = None, template: ChatTemplate | None = None,
) -> Iterator[Document]:  # fmt: skip
    """Yield the documents of `files` in order, reading one text file or record at a time; log a summary at the end.

    `template`: of the model, for messages.
    After the last file, raises LlmpyError for those that cannot be read (or adds the errors to `problems`), and for
    less than 1,000 characters of training text.
    """
    kinds: Counter[str] = Counter()
    found: list[LlmpyError] = []
    characters = documents = 0
    tally = Tally()
    for file in files:
        try:
            kind, parts = _open(file.path, tally, template)
            for document in parts:
                characters += len(document.text)
                documents += 1
                yield document
            kinds[kind] += 1
        except LlmpyError as error:
            found.append(error)
    if problems is None:
        refuse_all(found)
    else:
        problems += found
    for line in tally.lines():
        log(line)
    amount = f"{count_of(len(files), 'file')}, {characters:,} characters"
    least, hint = 1, "Give more text"
    if role == "training":
        least, hint = LEAST_CHARACTERS, "Give more text, or no path to train on Python's documentation"
    if not found and characters < least:
        raise LlmpyError("data.too-short", f"{amount} of {role} text; at least {least:,} are needed", hint)
    amount += f", {', '.join(sorted(kinds))}" + (f", {documents:,} documents" if documents != len(files) else "")
    log(f"{role:<11} {amount}: {shown(files)}")


def read_text(path: Path) -> str:
    """Return the text of a file. Raises LlmpyError if it is not text."""
    return _decode(path, _read(path))[0]


def _open(path: Path, tally: Tally, template: ChatTemplate | None) -> tuple[str, Iterator[Document]]:
    """Return the format or encoding of a file, and its documents."""
    if kind := kind_of(path, _read(path, HEADER_BYTES)):
        return kind, read_records(path, kind, tally, template)
    text, encoding = _decode(path, _read(path))
    return encoding, (Document(str(path), part) for part in text.split(EOT) if part.strip())


def _expand(path: Path, alone: bool) -> Iterator[tuple[Path, Path]]:
    """Yield the path if it exists, else its matches as a pattern (which shells leave alone in quotes).

    Each comes with the folder below which names count: if a folder is given `alone`, its own does not.
    """
    if path.exists():
        yield path, path if alone and path.is_dir() else path.parent
    elif glob.has_magic(str(path)):
        if not (matches := sorted(glob.glob(str(path), recursive=True))):
            raise LlmpyError("file.missing", f"nothing matches {path}", "Check the folder and the pattern")
        base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        yield from ((Path(match), base) for match in matches)
    else:
        if path.is_symlink():
            first_bytes(path)  # refuses it
        neighbours = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, [*neighbours, *(DATA_NAMES if path.parent == Path() else ())])
        raise LlmpyError("file.missing", f"no file or folder {path}", hint or "Check the path")


def _walk(folder: Path, skip: Skip, seen: set[Path]) -> list[Path]:
    """Return all non-hidden files below `folder`, sorted by path, without the folders `seen`, and note those.

    Real folders come before links to folders, so that a file is found by its own path if there is one.
    """
    files: list[Path] = []
    starts = [folder]
    for start in starts:
        for name, folders, names in os.walk(start, onerror=_raise):
            where, real = Path(name), Path(os.path.realpath(name))
            if real in seen or (skip and where != folder and skip(where)):
                folders.clear()
                continue
            seen.add(real)
            if {"blobs", "snapshots"} <= {*folders}:  # the hub's cache: blobs have no names, snapshots link to them
                folders[:] = ["snapshots"]
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            starts += (where / name for name in folders if (where / name).is_symlink())
            files += (where / name for name in names if not name.startswith("."))
    return sorted(files)


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
    """Return the text of a file and its encoding. Raises LlmpyError, naming file and byte, if it is not text."""
    refuse_sealed(path, data)
    mark = next((m for m in MARKS if data.startswith(m)), b"")
    encoding = MARKS.get(mark, "UTF-8")
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        offset = len(mark) + error.start
        raise LlmpyError(
            "data.not-utf8",
            f"{path} is not {encoding}: byte 0x{data[offset]:02x} at offset {offset:,} ({error.reason})",
            f"Convert it: iconv -f WINDOWS-1252 -t UTF-8 {path} > new.txt (or from its actual encoding)",
        ) from error
    if "\0" in text:
        raise LlmpyError(
            "data.not-text",
            f"{path} is binary, not text: character {text.index(chr(0)):,} is NUL",
            "Give plain UTF-8 text. If it is UTF-16 without a byte-order mark: iconv -f UTF-16LE -t UTF-8",
        )
    return text.replace("\r\n", "\n"), encoding.removesuffix("-LE").removesuffix("-BE")
