"""Token shards in llm.c's format: 256 int32 of header, then uint16 tokens, little-endian.

header[0] = 20240520, header[1] = 1, header[2] = number of tokens; the file ends with the last token.
Everything is checked when a shard is opened, once: compiled kernels trust token ids.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import GPT2_VOCAB
from ..durable import write_whole
from ..errors import LlmpyError

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 1024
TOKEN = np.dtype("<u2")
TOKENS_AT_MOST = 2**31 - 1  # what the header's int32 can say
MARKS, MARK_TOKENS = 64, 2048  # stretches that make a fingerprint, and their length
CHUNK = 1 << 22  # tokens checked or written at a time: 8 MiB
OTHER_MAGICS = {
    20240326: "an llm.c model checkpoint",
    20240327: "an llm.c debug state",
    20240328: "an llm.c tokenizer",
    20240522: "an llm.c multiple-choice evaluation file",
    20240527: "an llm.c optimizer state",
    20240801: "a LLaMA-3 token shard (uint32)",
    20240803: "a LLaMA-3 model of llm.c",
}


@dataclass(frozen=True)
class Shard:
    """Tokens of a file, or of a part of it: uint16 (n,), memory-mapped, read-only."""

    path: Path
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, start: int, stop: int) -> Shard:
        """Tokens [start, stop) as a view. Raises LlmpyError if they are not all there."""
        if not 0 <= start <= stop <= len(self):
            raise LlmpyError(
                f"{self.path} has {len(self):,} tokens: no part from {start:,} to {stop:,}",
                "choose a part inside the shard",
            )
        return Shard(self.path, self.tokens[start:stop])


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write tokens, integers (n,) in 0 … 65535, whole or not at all. Raises LlmpyError if they do not fit."""
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise LlmpyError(f"{path}: tokens of shape {tokens.shape} and type {tokens.dtype}", "give one row of integers")
    if not 0 < tokens.size <= TOKENS_AT_MOST:
        raise LlmpyError(
            f"{path}: {tokens.size:,} tokens do not make a shard",
            f"write 1 to {TOKENS_AT_MOST:,} tokens to a file",
        )
    if tokens.min() < 0 or tokens.max() > 65535:
        raise LlmpyError(
            f"{path}: tokens from {tokens.min()} to {tokens.max()} do not fit 16 bits",
            "use a vocabulary of less than 65,536 tokens",
        )
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:3] = MAGIC, VERSION, tokens.size

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(header.tobytes())
            for start in range(0, tokens.size, CHUNK):
                file.write(tokens[start : start + CHUNK].astype(TOKEN).tobytes())

    write_whole(path, write)


def fingerprint(shard: Shard) -> dict[str, object]:
    """By what a run knows its data again: name, number of tokens, and a hash of stretches spread over them."""
    tokens, count = shard.tokens, len(shard)
    starts = range(0, count, max(1, count // MARKS))
    digest = hashlib.blake2b(digest_size=16)
    for start in starts:
        digest.update(tokens[start : start + MARK_TOKENS].tobytes())
    return {"name": shard.path.name, "tokens": count, "blake2b": digest.hexdigest()}


def open_shard(path: Path, vocab_size: int) -> Shard:
    """Map a shard into memory and check all of it: magic, version, length, every token < vocab_size.

    Raises LlmpyError, which says what the file seems to be if it is no shard.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(HEADER_BYTES)
        header = np.frombuffer(start[: len(start) // 4 * 4], "<i4")
        if header.size == 0 or header[0] != MAGIC:
            raise _not_a_shard(path, start, size)
        count = int(header[2]) if header.size > 2 else 0
        if header.size < HEADER_BYTES // 4:
            raise LlmpyError(
                f"{path} is cut off in its header: {size:,} bytes of at least {HEADER_BYTES:,}",
                "download it again",
            )
        if header[1] != VERSION:
            raise LlmpyError(
                f"{path} is a token shard of version {header[1]}, not {VERSION}",
                "write it again with a current llm.c or with llmpy",
            )
        if size != HEADER_BYTES + TOKEN.itemsize * count:
            promised = HEADER_BYTES + TOKEN.itemsize * count
            what = "is cut off" if size < promised else "is longer than it says"
            raise LlmpyError(
                f"{path} {what}: {count:,} tokens make {promised:,} bytes, it has {size:,}",
                "download or write it again",
            )
        if count == 0:
            raise LlmpyError(f"{path} holds 0 tokens", "leave it out, or write it again")
        tokens = np.memmap(path, TOKEN, "r", offset=HEADER_BYTES, shape=(count,))
    except OSError as fault:
        raise LlmpyError(f"cannot read {path}: {fault.strerror or fault}", "check the path") from fault
    _check_tokens(path, tokens, vocab_size)
    return Shard(path, tokens)


def is_shard(path: Path) -> bool:
    """Whether the file starts as a token shard does (also LLaMA-3's). Raises LlmpyError if unreadable."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as fault:
        raise LlmpyError(f"cannot read {path}: {fault.strerror}", "check the path") from fault
    return int.from_bytes(start, "little") in (MAGIC, 20240801)


def _check_tokens(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Every token < vocab_size, at the speed of a vector maximum; only a bad chunk is searched."""
    for start in range(0, len(tokens), CHUNK):
        chunk = tokens[start : start + CHUNK]
        if chunk.max() >= vocab_size:
            position = start + int(np.argmax(chunk >= vocab_size))
            raise LlmpyError(
                f"{path}: token {tokens[position]} at position {position:,} is outside the vocabulary of "
                f"{vocab_size:,} tokens",
                "use the vocabulary (--vocab-size) or the tokenizer.json that the shard was written with",
            )


def _not_a_shard(path: Path, start: bytes, size: int) -> LlmpyError:
    """What a file without the magic number seems to be, and what to do about it."""
    words = np.frombuffer(start[: len(start) // 4 * 4], "<i4")
    halves = np.frombuffer(start[: len(start) // 2 * 2], TOKEN)
    text = start.lstrip()[:64].lower()
    if size == 0:
        what, fix = "is empty", "download or write it again"
    elif words.size and int(words[0]) in OTHER_MAGICS:
        what, fix = f"is {OTHER_MAGICS[int(words[0])]}, not a GPT-2 token shard", "give GPT-2 shards (uint16)"
    elif text.startswith(b"version https://git-lfs"):
        what, fix = "is a git-lfs pointer, not the data", "fetch the data: git lfs pull"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml")):
        what, fix = "is a web page, not a token shard", "download the file itself, not its page"
    elif _is_text(start):
        what, fix = (
            "is plain text, not a token shard",
            "give it a name that ends in .txt to train on its text",
        )
    elif size % 4 == 0 and words.any() and words.min() >= 0 and words.max() < GPT2_VOCAB:
        what = "is a stream of int32 tokens without header (llm.c before May 2024, llm.rs, llm.mojo)"
        fix = "write it again with a current llm.c, or with llmpy.data.shards.write_shard"
    elif size % 2 == 0 and halves.any() and halves.max() < GPT2_VOCAB:
        what = "seems to be a stream of uint16 tokens without header (nanoGPT)"
        fix = "write it again with llmpy.data.shards.write_shard"
    else:
        what, fix = (
            f"is not a token shard: it starts with {start[:8].hex(' ')}",
            "give .bin files of llm.c, or text",
        )
    return LlmpyError(f"{path} {what}", fix)


def _is_text(start: bytes) -> bool:
    """UTF-8 with no NUL; the last character may be cut."""
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as fault:
        return fault.start >= len(start) - 3 and fault.start > 0 and b"\0" not in start
    return b"\0" not in start
