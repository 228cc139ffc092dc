"""Token files of llm.c: 256 int32 of header, then tokens, little-endian; and the stream it began with.

    uint16    20240520, 1, number of tokens   GPT-2, and any vocabulary up to 65,536
    uint32    20240801, 7, number of tokens   Llama 3, and larger vocabularies
    int32     no header, tokens alone         llm.c before May 2024, llm.rs, llm.mojo

The file ends with the last token. Beside NAME.bin there may be NAME.mask of the same layout (20261122, 1, number of
tokens, then a byte for each): 1 where the token counts as a target in the loss, 0 where it does not.
Everything is checked when a file is opened, once: compiled kernels trust token ids.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import LlmpyError, unreadable
from ..model.config import GPT2_VOCAB
from ..system.durable import write_whole
from . import magic
from .magic import HEADER_BYTES, magic_of

TOKENS_AT_MOST = 2**31 - 1  # what the header's int32 can say
MARKS, MARK_TOKENS = 64, 2048  # stretches that make a fingerprint, and their length
CHUNK = 1 << 22  # tokens checked or written at a time: 8 MiB


@dataclass(frozen=True)
class Form:
    """One layout of a token file; `magic` 0: without header."""

    magic: int
    version: int
    dtype: np.dtype
    what: str


FORMS = {
    "uint16": Form(magic.TOKENS, 1, np.dtype("<u2"), "llm.c token shard"),
    "uint32": Form(magic.WIDE_TOKENS, 7, np.dtype("<u4"), "Llama-3 token shard (uint32)"),
    "int32": Form(0, 0, np.dtype("<i4"), "int32 token stream without header"),
}
MASK = Form(magic.MASK, 1, np.dtype("u1"), "token mask")


@dataclass(frozen=True)
class Shard:
    """Tokens of a file, or of a part of it: (n,) of the form's integers, memory-mapped, read-only."""

    path: Path
    tokens: np.ndarray
    counted: np.ndarray | None = None  # uint8 (n,), 1 where the token counts as a target; None: everywhere

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, start: int, stop: int) -> Shard:
        """Return tokens [start, stop) as a view."""
        counted = None if self.counted is None else self.counted[start:stop]
        return Shard(self.path, self.tokens[start:stop], counted)


def write_shard(path: Path, tokens: np.ndarray, form: str = "uint16", counted: np.ndarray | None = None) -> None:
    """Write tokens, integers (n,), whole or not at all; and, if `counted` (bool (n,)) is given, the mask beside.

    Raises LlmpyError if the tokens do not fit the form, and if the disk refuses.
    """
    most = int(np.iinfo(FORMS[form].dtype).max)
    if tokens.ndim != 1 or not 0 < tokens.size <= TOKENS_AT_MOST or not np.issubdtype(tokens.dtype, np.integer):
        fix = f"write 1 to {TOKENS_AT_MOST:,} integers to a file"
        raise LlmpyError("data.x", f"{path}: {tokens.size:,} values of type {tokens.dtype} do not make a shard", fix)
    if tokens.min() < 0 or tokens.max() > most:
        raise LlmpyError(
            "data.x",
            f"{path}: tokens from {tokens.min()} to {tokens.max()} do not fit {8 * FORMS[form].dtype.itemsize} bits",
            f"Use a vocabulary of at most {most + 1:,} tokens, or a wider form",
        )
    if counted is not None and not FORMS[form].magic:
        raise LlmpyError(
            "data.x", f"{path}: a stream of int32 tokens can have no mask", "Write uint16 or uint32 shards"
        )
    mask_path(path).unlink(missing_ok=True)  # of what was here before
    _write(path, tokens, FORMS[form])
    if counted is not None:
        _write(mask_path(path), counted, MASK)


def open_shard(path: Path, vocab_size: int) -> Shard:
    """Map a token file into memory and check all of it: header, length, every token < vocab_size, its mask.

    Raises LlmpyError, which says what the file seems to be if it holds no tokens.
    """
    try:
        form = _form(path)
        tokens = _map(path, form)
        counted = _map(mask_path(path), MASK) if form.magic and mask_path(path).exists() else None
    except OSError as error:
        raise unreadable(path, error) from error
    _check_tokens(path, tokens, vocab_size)
    if counted is not None and len(counted) != len(tokens):
        raise LlmpyError(
            "data.x",
            f"{mask_path(path)} is for {len(counted):,} tokens, {path} has {len(tokens):,}",
            "Write both again, or remove the mask",
        )
    if counted is not None and any(counted[i : i + CHUNK].max() > 1 for i in range(0, len(counted), CHUNK)):
        raise LlmpyError(
            "data.x", f"{mask_path(path)} is damaged: it holds other bytes than 0 and 1", "Write both again"
        )
    return Shard(path, tokens, counted)


def form_for(vocab_size: int) -> str:
    """The form of llm.c's that holds all tokens of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def is_shard(path: Path) -> bool:
    """Whether the file starts as a token file does; without a header only a .bin is one. LlmpyError if unreadable."""
    try:
        start = _start(path)
        return magic_of(start) in (magic.TOKENS, magic.WIDE_TOKENS) or path.suffix == ".bin" and _is_stream(path, start)
    except OSError as error:
        raise unreadable(path, error) from error


def mask_path(path: Path) -> Path:
    """Where the mask of a token file lies."""
    return path.with_suffix(".mask")


def fingerprint(shard: Shard) -> dict[str, object]:
    """By what a run knows its data again: name, number of tokens, and a hash of stretches of them and of the mask."""
    count = len(shard)
    digest = hashlib.blake2b(digest_size=16)
    for values in (shard.tokens,) if shard.counted is None else (shard.tokens, shard.counted):
        for start in range(0, count, max(1, count // MARKS)):
            digest.update(values[start : start + MARK_TOKENS].tobytes())
    return {"name": shard.path.name, "tokens": count, "blake2b": digest.hexdigest()}


def _write(path: Path, values: np.ndarray, form: Form) -> None:
    header = np.zeros(HEADER_BYTES // 4 if form.magic else 3, "<i4")
    header[:3] = form.magic, form.version, values.size

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(header.tobytes() if form.magic else b"")
            for start in range(0, values.size, CHUNK):
                file.write(values[start : start + CHUNK].astype(form.dtype).tobytes())

    write_whole(path, write)


def _form(path: Path) -> Form:
    """Return the form of a token file, by how it begins. Raises LlmpyError for anything else."""
    start = _start(path)
    if _is_stream(path, start):
        return FORMS["int32"]
    form = next((form for form in FORMS.values() if form.magic and form.magic == magic_of(start)), None)
    if form is None:
        what = f"is {magic.WHAT[magic_of(start)]}" if magic_of(start) in magic.WHAT else f"starts with {start[:24]!r}"
        raise LlmpyError(
            "data.x",
            f"{path} is not a token shard of llm.c: it {what}",
            "Give text another suffix; write uint16 tokens without a header (nanoGPT) again by "
            "llmpy.data.shards.write_shard",
        )
    return form


def _is_stream(path: Path, start: bytes) -> bool:
    """Whether it may be a stream of int32 tokens: GPT-2's, most of them not 0. Foreign headers are small and zeros."""
    values = np.frombuffer(start[: len(start) // 4 * 4], "<i4")
    if path.stat().st_size % 4 or not values.size or values.min() < 0 or values.max() >= GPT2_VOCAB:
        return False
    return bool(2 * np.count_nonzero(values) > values.size)


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEADER_BYTES)


def _map(path: Path, form: Form) -> np.ndarray:
    """Map the values of a file into memory, once its header is known to tell the truth about its length."""
    if not form.magic:
        return np.memmap(path, form.dtype, "r")
    size = path.stat().st_size
    number, version, count = np.frombuffer(_start(path)[:12].ljust(12, b"\0"), "<i4").tolist()
    if (number, version) != (form.magic, form.version):
        raise LlmpyError(
            "data.x",
            f"{path} is no {form.what} of version {form.version}: it begins with {number}, {version}",
            "Write it again",
        )
    promised = HEADER_BYTES + form.dtype.itemsize * count
    if size != promised or count <= 0:
        raise LlmpyError(
            "data.x",
            f"{path} is damaged: {count:,} tokens make {promised:,} bytes, it has {size:,}",
            "Download or write it again",
        )
    return np.memmap(path, form.dtype, "r", offset=HEADER_BYTES, shape=(count,))


def _check_tokens(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Every token < vocab_size, at the speed of a vector maximum; only a bad chunk is searched."""
    for start in range(0, len(tokens), CHUNK):
        chunk = tokens[start : start + CHUNK]
        if chunk.max() >= vocab_size or chunk.min() < 0:
            position = start + int(np.argmax((chunk >= vocab_size) | (chunk < 0)))
            raise LlmpyError(
                "data.x",
                f"{path}: token {tokens[position]} at position {position:,} is outside the vocabulary of "
                f"{vocab_size:,} tokens",
                "Use the vocabulary (--vocab-size) or the tokenizer.json that the shard was written with",
            )
