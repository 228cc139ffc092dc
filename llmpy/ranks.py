"""Rank tables: tokens as bytes, in the order in which byte-level BPE learnt them.

    .tiktoken          a line for each token: base64 of its bytes, blank, rank; EOT comes after the last
    llm.c's .bin       256 uint32: 20240328, version, number of tokens n, EOT's id (version 2); then n times a
                       length (uint8, 1 … 255) and as many bytes. Version 1 is GPT-2's: n 50257, EOT 50256

Neither holds merges, but a token's rank is its merge's: the pair that made it is what the merges of lower rank
leave of its bytes. So they give an encoder too, with GPT-2's pattern for words.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .config import GPT2_VOCAB
from .data.shards import HEADER_BYTES
from .durable import write_whole
from .errors import LlmpyError

MAGIC = 20240328
LLMC_FILE = "gpt2_tokenizer.bin"  # what llm.c calls its own
EOT = "<|endoftext|>"
TOKENS_AT_MOST = 1 << 16  # what a uint16 shard can hold; it also bounds the memory that a damaged file can ask for
LONGEST = 255  # bytes of a token
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]{2,}={0,2} \d{1,7}\r?\n")
OTHER_PATTERNS = {100256: "cl100k_base", 128000: "Llama 3", 199998: "o200k_base"}  # by their number of ranks


@dataclass(frozen=True)
class Ranks:
    """The bytes of each token by id, and which id is EOT (whose bytes are its name)."""

    tokens: tuple[bytes, ...]
    eot: int

    def merges(self) -> list[tuple[bytes, bytes]]:
        """The pair that makes each token of more than one byte, in order of rank.

        Raises LlmpyError if one cannot be made of tokens before it.
        """
        rank = {token: i for i, token in enumerate(self.tokens) if i != self.eot}
        merges = []
        for i, token in enumerate(self.tokens):
            if len(token) > 1 and i != self.eot:
                parts = _parts(token, i, rank)
                if len(parts) != 2:
                    raise LlmpyError(
                        f"token {i} ({token!r}) is not made of two tokens before it", "its order is no order of merges"
                    )
                merges.append((parts[0], parts[1]))
        return merges


def _parts(token: bytes, limit: int, rank: dict[bytes, int]) -> list[bytes]:
    """What the merges of rank below `limit` leave of a token's bytes."""
    parts = [token[j : j + 1] for j in range(len(token))]
    while len(parts) > 2:
        best, at = min((rank.get(parts[j] + parts[j + 1], limit), j) for j in range(len(parts) - 1))
        if best >= limit:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def is_tiktoken(start: bytes) -> bool:
    """Whether a file that begins so is a .tiktoken table."""
    return TIKTOKEN_LINE.match(start) is not None


def is_llmc(start: bytes) -> bool:
    """Whether a file that begins so is a tokenizer of llm.c."""
    return int.from_bytes(start[:4], "little") == MAGIC


def parse_tiktoken(data: bytes) -> Ranks:
    """A .tiktoken file. Raises LlmpyError (without its name) for damage, and for patterns other than GPT-2's."""
    count = data.count(b"\n")
    if count in OTHER_PATTERNS:
        raise LlmpyError(
            f"these are the ranks of {OTHER_PATTERNS[count]}, which splits words unlike GPT-2",
            "give its tokenizer.json instead",
        )
    if not 256 <= count < TOKENS_AT_MOST:
        raise LlmpyError(f"{count:,} ranks, where 256 to {TOKENS_AT_MOST - 1:,} can be", "download it again")
    tokens: list[bytes] = []
    for number, line in enumerate(data.splitlines(keepends=True)):
        if not TIKTOKEN_LINE.fullmatch(line):
            raise LlmpyError(f"line {number + 1} is not base64 and a rank: {line[:40]!r}", "download it again")
        text, _, rank = line.partition(b" ")
        try:
            tokens.append(base64.b64decode(text, validate=True))
        except ValueError as fault:
            raise LlmpyError(f"line {number + 1} is not base64: {text[:40]!r}", "download it again") from fault
        if int(rank) != number:
            raise LlmpyError(f"line {number + 1} has rank {int(rank)}, not {number}", "download it again")
    return _checked([*tokens, EOT.encode()], len(tokens))


def parse_llmc(data: bytes) -> Ranks:
    """llm.c's tokenizer .bin, version 1 or 2. Raises LlmpyError (without its name) for damage."""
    if len(data) < HEADER_BYTES:
        raise LlmpyError(f"cut off in its header: {len(data):,} bytes", "download it again")
    _, version, count, eot = (int(word) for word in np.frombuffer(data, "<u4", 4))
    if version not in (1, 2):
        raise LlmpyError(f"version {version} of llm.c's tokenizer, not 1 or 2", "write it again with a current llm.c")
    if version == 1:
        eot = GPT2_VOCAB - 1
        if count != GPT2_VOCAB:
            raise LlmpyError(f"version 1 has {GPT2_VOCAB:,} tokens, not {count:,}", "download it again")
    if not 257 <= count <= TOKENS_AT_MOST or eot >= count:
        raise LlmpyError(
            f"{count:,} tokens with EOT {eot:,}, where 257 to {TOKENS_AT_MOST:,} can be", "download it again"
        )
    tokens, at = [], HEADER_BYTES
    for i in range(count):
        length = data[at] if at < len(data) else 0
        token = data[at + 1 : at + 1 + length]
        if not length or len(token) < length:
            raise LlmpyError(f"cut off or empty at token {i:,} of {count:,}", "download it again")
        tokens.append(token)
        at += 1 + length
    if at != len(data):
        raise LlmpyError(f"{len(data) - at:,} bytes after the last token", "download it again")
    return _checked(tokens, eot)


def write_llmc(path: Path, ranks: Ranks) -> None:
    """Write llm.c's tokenizer .bin, version 2, whole or not at all.

    Raises LlmpyError for a token of more than 255 bytes (or none), and if the disk refuses.
    """
    wrong = next((i for i, token in enumerate(ranks.tokens) if not 0 < len(token) <= LONGEST), None)
    if wrong is not None:
        raise LlmpyError(
            f"token {wrong} has {len(ranks.tokens[wrong])} bytes: llm.c's tokenizer file holds 1 to {LONGEST}",
            "use another tokenizer",
        )
    header = np.zeros(HEADER_BYTES // 4, "<u4")
    header[:4] = MAGIC, 2, len(ranks.tokens), ranks.eot
    content = header.tobytes() + b"".join(bytes([len(token)]) + token for token in ranks.tokens)
    write_whole(path, lambda temporary: temporary.write_bytes(content))


def _checked(tokens: Sequence[bytes], eot: int) -> Ranks:
    """Every byte a token, no token twice or too long."""
    ranks = Ranks(tuple(tokens), eot)
    others = set(tokens[:eot]) | set(tokens[eot + 1 :])
    missing = sum(bytes([byte]) not in others for byte in range(256))
    if missing:
        raise LlmpyError(f"{missing} of the 256 bytes are no tokens", "download it again")
    if len(others) != len(tokens) - 1:
        raise LlmpyError(f"{len(tokens) - 1 - len(others)} tokens stand in it twice", "download it again")
    longest = max(map(len, others))
    if longest > LONGEST:
        raise LlmpyError(f"a token of {longest:,} bytes, where {LONGEST} can be", "download it again")
    return ranks
