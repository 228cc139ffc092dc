"""Rank tables: the bytes of each token, in the order in which byte-level BPE learned them.

    .tiktoken      one line per token: base64 of its bytes, space, rank; EOT follows the last
    llm.c's .bin   256 uint32: 20240328, version, number of tokens n, id of EOT (version 2); then n times a length
                   (uint8, 1 … 255) and the bytes. Version 1 is GPT-2's: n 50257, EOT 50256

Neither format stores merges, but a token has the rank of its merge: applying all merges of lower rank to its bytes
leaves the pair. Neither stores the word pattern. It is GPT-2's, except in KNOWN tables, identified by their size.

Source of the patterns: OpenAI's tiktoken, `openai_public.py`; Meta's llama3, `tokenizer.py`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import LlmpyError
from ..model.config import GPT2_VOCAB
from ..system.durable import write_whole
from .magic import HEADER_BYTES, TOKENIZER

LLMC_FILE = "gpt2_tokenizer.bin"  # llm.c's name
EOT = "<|endoftext|>"
LONGEST = 255  # bytes per token
TIKTOKEN_LINE = re.compile(rb"([A-Za-z0-9+/]{2,}={0,2}) (\d{1,7})\r?\n")
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_NUMBERS_ON = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{_NUMBERS_ON}[\r\n]*"
CL100K, LLAMA3 = rf"{_WORDS}|\s+\z|{_BLANKS}", f"{_WORDS}|{_BLANKS}"
O200K = "|".join(
    [rf"[^\r\n\p{{L}}\p{{N}}]?{letters}{_SUFFIX}?" for letters in (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*")]
    + [rf"{_NUMBERS_ON}[\r\n/]*", _BLANKS]
)


class Known(NamedTuple):
    """A published table: its name, id of EOT, and word pattern ("": GPT-2's)."""

    name: str
    eot: int
    pattern: str


KNOWN = {
    50_280: Known("p50k_base", 50_256, ""),
    100_256: Known("cl100k_base", 100_257, CL100K),
    128_000: Known("Llama 3", 128_000, LLAMA3),  # <|begin_of_text|>, which llm.c puts before each document
    199_998: Known("o200k_base", 199_999, O200K),
}


@dataclass(frozen=True)
class Ranks:
    """The bytes of each token by id (b"": unused id) and the id of EOT, which is stored by name.

    `pattern` splits text into words ("": as GPT-2). `whole`: a word that is a token is never split, so that tokens
    added after training need not be merges of others.
    """

    tokens: tuple[bytes, ...]
    eot: int
    pattern: str = ""
    whole: bool = False

    def merges(self) -> list[tuple[bytes, bytes]]:
        """Return the pair that makes each token of several bytes, in order of rank.

        If a token is not a merge of two of lower rank, raises LlmpyError; if `whole`, returns all pairs that make any
        token instead.
        """
        rank = {token: i for i, token in enumerate(self.tokens) if token and i != self.eot}
        merges = []
        for token, i in rank.items():
            if len(token) > 1:
                parts = _parts(token, i, rank)
                if len(parts) != 2 and self.whole:
                    return [pair for token in rank for pair in _pairs(token, rank)]
                if len(parts) != 2:
                    raise LlmpyError("tokenizer.not-bpe", f"token {i} ({token!r}) is not a merge of two earlier ones")
                merges.append((parts[0], parts[1]))
        return merges


def _parts(token: bytes, limit: int, rank: dict[bytes, int]) -> list[bytes]:
    """Apply the merges of rank below `limit` to the bytes of a token."""
    parts = [token[j : j + 1] for j in range(len(token))]
    while len(parts) > 2:
        best, at = min((rank.get(parts[j] + parts[j + 1], limit), j) for j in range(len(parts) - 1))
        if best >= limit:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _pairs(token: bytes, rank: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return all pairs of tokens that make `token`."""
    cuts = ((token[:j], token[j:]) for j in range(1, len(token)))
    return [(a, b) for a, b in cuts if a in rank and b in rank]


def parse_tiktoken(data: bytes) -> Ranks:
    """Parse a .tiktoken file. Raises ValueError if it is corrupt, or large and not KNOWN."""
    lines = data.splitlines(keepends=True)
    known = KNOWN.get(len(lines))
    if known is None and len(lines) >= 1 << 16:
        names = ", ".join(f"{k.name} ({n:,})" for n, k in KNOWN.items())
        raise ValueError(f"{len(lines):,} ranks fit no table with a known word pattern: GPT-2 (50,256), {names}")
    eot = known.eot if known else len(lines)
    tokens: list[bytes] = []
    for number, line in enumerate(lines):
        match = TIKTOKEN_LINE.fullmatch(line)
        if match is None or int(match[2]) != number + (number >= eot):
            raise ValueError(f"line {number + 1} is not base64 with the next rank: {line[:40]!r}")
        tokens.append(base64.b64decode(match[1], validate=True))
    unused = [b""] * (eot - len(lines))
    ranks = _checked([*tokens[:eot], *unused, EOT.encode(), *tokens[eot:]], eot)
    return replace(ranks, pattern=known.pattern, whole=True) if known else ranks


def parse_llmc(data: bytes) -> Ranks:
    """Parse llm.c's tokenizer .bin, version 1 or 2. Raises ValueError if it is corrupt."""
    _, version, count, eot = np.frombuffer(data[:16].ljust(16, b"\0"), "<u4").tolist()
    if version == 1:
        eot = GPT2_VOCAB - 1
    tokens, at = [], HEADER_BYTES
    while at < len(data):
        tokens.append(data[at + 1 : at + 1 + data[at]])
        at += 1 + data[at]
    if version not in (1, 2) or at != len(data) or not eot < len(tokens) == count or b"" in tokens:
        found = f"version {version}, {len(tokens):,} tokens instead of {count:,}, EOT {eot:,}"
        raise ValueError(found + ", an empty token" * (b"" in tokens))
    return _checked(tokens, eot)


def _checked(tokens: Sequence[bytes], eot: int) -> Ranks:
    """Return the table. Raises ValueError if a byte is not a token, or a token occurs twice."""
    others = [token for i, token in enumerate(tokens) if token and i != eot]
    if not {bytes([byte]) for byte in range(256)} <= set(others) or len(set(others)) < len(others):
        raise ValueError("a byte is missing, or a token occurs twice")
    return Ranks(tuple(tokens), eot)


def write_llmc(path: Path, ranks: Ranks) -> None:
    """Write llm.c's tokenizer .bin (version 2) atomically. Raises LlmpyError for tokens over 255 bytes."""
    if (longest := max(map(len, ranks.tokens))) > LONGEST:
        message = f"a token has {longest} bytes, llm.c's tokenizer format allows {LONGEST}"
        raise LlmpyError("tokenizer.token-too-long", message)
    header = np.zeros(HEADER_BYTES // 4, "<u4")
    header[:4] = TOKENIZER, 2, len(ranks.tokens), ranks.eot
    content = header.tobytes() + b"".join(bytes([len(token)]) + token for token in ranks.tokens)
    write_whole(path, lambda temporary: temporary.write_bytes(content))
