"""llm.c's token files: a header of 256 int32, then tokens, little-endian; and its older stream without header.

    uint16    20240520, 1, number of tokens   GPT-2, and any vocabulary up to 65,536
    uint32    20240801, 7, number of tokens   Llama 3, and larger vocabularies
    int32     no header, only tokens          llm.c before May 2024, llm.rs, llm.mojo

The file ends with the last token. NAME.bin may have a mask NAME.mask of the same layout (20261122, 1, number of tokens,
then a byte for each): 1 if the token counts as a target in the loss, else 0. In version 2, bit 0 is that, and bit 1 is
set where a document starts.
All of a file is checked once, on opening: compiled kernels trust token ids.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import LlmpyError, unreadable
from ..model.config import GPT2_VOCAB
from ..system.durable import write_whole
from ..system.stored import Stored
from . import magic
from .magic import HEADER_BYTES, magic_of

TOKENS_AT_MOST = 2**31 - 1  # the limit of the header's int32
MARKS, MARK_TOKENS = 64, 2048  # number of stretches in a fingerprint, and their length
CHUNK = 1 << 22  # tokens checked or written at a time: 8 MiB


@dataclass(frozen=True)
class Form:
    """A layout of token files; `magic` 0: without header."""

    magic: int
    version: int
    dtype: np.dtype
    name: str


FORMS = {
    "uint16": Form(magic.TOKENS, 1, np.dtype("<u2"), "llm.c token shard"),
    "uint32": Form(magic.WIDE_TOKENS, 7, np.dtype("<u4"), "Llama-3 token shard (uint32)"),
    "int32": Form(0, 0, np.dtype("<i4"), "int32 token stream without header"),
}
MASK, PACKED_MASK = (Form(magic.MASK, version, np.dtype("u1"), "token mask") for version in (1, 2))
COUNTED, START = 1, 2  # the bits of a mask


@dataclass(frozen=True)
class Shard:
    """Tokens of a file or a part of it: (n,) of the form's dtype, read when they are sliced."""

    path: Path
    tokens: Stored | np.ndarray
    mask: Stored | np.ndarray | None = None  # uint8 (n,): COUNTED as target, START of a document; None: all count
    packed: bool = False  # the mask has starts

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, start: int, stop: int) -> Shard:
        """Return tokens [start, stop) without reading them."""
        tokens, mask = (
            x.part(start, stop) if isinstance(x, Stored) else x if x is None else x[start:stop]
            for x in (self.tokens, self.mask)
        )
        assert tokens is not None
        return Shard(self.path, tokens, mask, self.packed)


def write_shard(path: Path, tokens: np.ndarray, form: str = "uint16", counted: np.ndarray | None = None) -> None:
    """Write tokens, integers (n,), atomically; then their mask if `counted`, bool or bits of a mask (n,), is given.

    Raises LlmpyError if the tokens do not fit the form, and if writing fails.
    """
    most = int(np.iinfo(FORMS[form].dtype).max)
    if tokens.ndim != 1 or not 0 < tokens.size <= TOKENS_AT_MOST or not np.issubdtype(tokens.dtype, np.integer):
        hint = f"Give one row of 1 to {TOKENS_AT_MOST:,} integers"
        message = f"cannot write {tokens.size:,} values of type {tokens.dtype} to {path}"
        raise LlmpyError("shard.invalid-tokens", message, hint)
    if tokens.min() < 0 or tokens.max() > most:
        message = f"{path}: tokens from {tokens.min()} to {tokens.max()} do not fit {form}"
        hint = f"Use a vocabulary of at most {most + 1:,} tokens, or a wider form"
        raise LlmpyError("shard.vocab-too-large", message, hint)
    if counted is not None and not FORMS[form].magic:
        message = f"{path}: int32 streams cannot have a mask"
        raise LlmpyError("shard.mask-unsupported", message, "Write uint16 or uint32 shards")
    mask_path(path).unlink(missing_ok=True)  # of the file replaced
    _write(path, tokens, FORMS[form])
    if counted is not None:
        _write(mask_path(path), counted, PACKED_MASK if _largest(counted) >= START else MASK)


def open_shard(path: Path, vocab_size: int) -> Shard:
    """Open a token file and check header, length, mask, and that every token < vocab_size.

    Raises LlmpyError if it is not valid; if it has another known format, the error names that.
    """
    try:
        form = form_of(path)
        tokens = _values(path, form)
        mask, packed = None, False
        if form.magic and mask_path(path).exists():
            packed = _start(mask_path(path))[4:8] == b"\2\0\0\0"
            mask = _values(mask_path(path), PACKED_MASK if packed else MASK)
    except OSError as error:
        raise unreadable(path, error) from error
    _check_tokens(path, tokens, vocab_size)
    if mask is None:
        return Shard(path, tokens)
    if len(mask) != len(tokens):
        message = f"{mask_path(path)} is for {len(mask):,} tokens, but {path} has {len(tokens):,}"
        raise LlmpyError("shard.mask-mismatch", message, "Write both again, or remove the mask")
    if _largest(mask) > (COUNTED | START if packed else COUNTED):
        message = f"{mask_path(path)} is corrupt: it has bytes other than {'0 to 3' if packed else '0 and 1'}"
        raise LlmpyError("shard.corrupt", message, "Write both again")
    return Shard(path, tokens, mask, packed)


def form_for(vocab_size: int) -> str:
    """Return llm.c's form for a vocabulary of this size."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def is_shard(path: Path) -> bool:
    """Return whether a file starts like a token file; without header only a .bin does. LlmpyError if unreadable."""
    try:
        start = _start(path)
        return magic_of(start) in (magic.TOKENS, magic.WIDE_TOKENS) or path.suffix == ".bin" and _is_stream(path, start)
    except OSError as error:
        raise unreadable(path, error) from error


def mask_path(path: Path) -> Path:
    """Return the path of the mask of a token file."""
    return path.with_suffix(".mask")


def fingerprint(shard: Shard) -> dict[str, object]:
    """Return what identifies the data of a run: name, number of tokens, and a hash of samples of tokens and mask."""
    count = len(shard)
    digest = hashlib.blake2b(digest_size=16)
    for values in (shard.tokens,) if shard.mask is None else (shard.tokens, shard.mask):
        for start in range(0, count, max(1, count // MARKS)):
            digest.update(values[start : start + MARK_TOKENS].tobytes())
    return {"name": shard.path.name, "tokens": count, "blake2b": digest.hexdigest()}


def _largest(mask: Stored | np.ndarray) -> int:
    return max(int(mask[i : i + CHUNK].max()) for i in range(0, len(mask), CHUNK))


def _write(path: Path, values: np.ndarray, form: Form) -> None:
    header = np.zeros(HEADER_BYTES // 4 if form.magic else 3, "<i4")
    header[:3] = form.magic, form.version, values.size

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(header.tobytes() if form.magic else b"")
            for start in range(0, values.size, CHUNK):
                file.write(values[start : start + CHUNK].astype(form.dtype).tobytes())

    write_whole(path, write)


def form_of(path: Path) -> Form:
    """Return the form of a token file by its first bytes. Raises LlmpyError for other files."""
    start = _start(path)
    if _is_stream(path, start):
        return FORMS["int32"]
    form = next((form for form in FORMS.values() if form.magic and form.magic == magic_of(start)), None)
    if form is None:
        known = magic.WHAT.get(magic_of(start))
        raise LlmpyError(
            "shard.unrecognized",
            f"{path} is not a token shard of llm.c: it {f'is {known}' if known else f'starts with {start[:24]!r}'}",
            "If it is text, rename it. If it is nanoGPT's uint16 tokens, convert it with llmpy.data.shards.write_shard",
        )
    return form


def _is_stream(path: Path, start: bytes) -> bool:
    """Return whether a file may be an int32 stream: GPT-2's tokens, mostly not 0. Foreign headers are mostly zeros."""
    values = np.frombuffer(start[: len(start) // 4 * 4], "<i4")
    if path.stat().st_size % 4 or not values.size or values.min() < 0 or values.max() >= GPT2_VOCAB:
        return False
    return bool(2 * np.count_nonzero(values) > values.size)


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEADER_BYTES)


def _values(path: Path, form: Form) -> Stored:
    """Return the values of a file. Raises LlmpyError if header or length is wrong."""
    size = path.stat().st_size
    if not form.magic:
        return Stored(path, form.dtype, 0, size // form.dtype.itemsize)
    number, version, count = np.frombuffer(_start(path)[:12].ljust(12, b"\0"), "<i4").tolist()
    if (number, version) != (form.magic, form.version):
        message = f"{path} is not a {form.name} of version {form.version}: it starts with {number}, {version}"
        raise LlmpyError("shard.unrecognized", message, "Write it again")
    expected = HEADER_BYTES + form.dtype.itemsize * count
    if size != expected or count <= 0:
        message = f"{path} is corrupt: {count:,} tokens require {expected:,} bytes, it has {size:,}"
        raise LlmpyError("shard.corrupt", message, "Download or write it again")
    return Stored(path, form.dtype, HEADER_BYTES, count)


def _check_tokens(path: Path, tokens: Stored, vocab_size: int) -> None:
    """Raise LlmpyError unless 0 <= token < vocab_size. Only an invalid chunk is searched; the rest is a vector max."""
    for start in range(0, len(tokens), CHUNK):
        chunk = tokens[start : start + CHUNK]
        if chunk.max() >= vocab_size or chunk.min() < 0:
            position = int(np.argmax((chunk >= vocab_size) | (chunk < 0)))
            raise LlmpyError(
                "shard.outside-vocabulary",
                f"{path}: token {chunk[position]} at position {start + position:,} is outside the vocabulary of "
                f"{vocab_size:,} tokens",
                "Use the --vocab-size or the tokenizer.json with which the shard was written",
            )
