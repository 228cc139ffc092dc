"""Rank tables: tokens as bytes, in the order in which byte-level BPE learnt them.

    .tiktoken          a line for each token: base64 of its bytes, blank, rank; EOT comes after the last
    llm.c's .bin       256 uint32: 20240328, version, number of tokens n, EOT's id (version 2); then n times a
                       length (uint8, 1 … 255) and as many bytes. Version 1 is GPT-2's: n 50257, EOT 50256

Neither holds merges, but a token's rank is its merge's: the pair that made it is what the merges of lower rank
leave of its bytes. Nor do they hold the pattern for words, which is GPT-2's but for the tables of KNOWN, recognised by
their number of ranks. So they give an encoder too.

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
from .magic import HEADER_BYTES, TOKENIZER, magic_of

LLMC_FILE = "gpt2_tokenizer.bin"  # what llm.c calls its own
EOT = "<|endoftext|>"
TOKENS_AT_MOST = 1 << 16  # what a uint16 shard can hold; it also bounds the memory that a damaged file can ask for
LONGEST = 255  # bytes of a token
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]{2,}={0,2} \d{1,7}\r?\n")
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
    """A table by its number of ranks: where EOT is among them or after, and the pattern for words ("": GPT-2's)."""

    name: str
    eot: int
    pattern: str


KNOWN = {
    50_280: Known("p50k_base", 50_256, ""),
    100_256: Known("cl100k_base", 100_257, CL100K),
    128_000: Known("Llama 3", 128_000, LLAMA3),  # <|begin_of_text|>, which llm.c has before each document
    199_998: Known("o200k_base", 199_999, O200K),
}


@dataclass(frozen=True)
class Ranks:
    """The bytes of each token by id (none: there is no such token), and which id is EOT (whose bytes are its name).

    `pattern` splits text into words, "" as GPT-2 does. `whole`: a word that is a token is never taken apart; then not
    every token needs to be a merge of others, as in tables that were extended after they were learnt.
    """

    tokens: tuple[bytes, ...]
    eot: int
    pattern: str = ""
    whole: bool = False

    def merges(self) -> list[tuple[bytes, bytes]]:
        """The pair that makes each token of more than one byte, in order of rank.

        Raises LlmpyError if one cannot be made of tokens before it; but if tokens may be `whole`, these are all pairs
        that make any token.
        """
        rank = {token: i for i, token in enumerate(self.tokens) if token and i != self.eot}
        merges = []
        for token, i in rank.items():
            if len(token) > 1:
                parts = _parts(token, i, rank)
                if len(parts) != 2 and self.whole:
                    return [pair for token in rank for pair in _pairs(token, rank)]
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


def _pairs(token: bytes, rank: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every two tokens that make one."""
    cuts = ((token[:j], token[j:]) for j in range(1, len(token)))
    return [(a, b) for a, b in cuts if a in rank and b in rank]


def is_tiktoken(start: bytes) -> bool:
    """Whether a file that begins so is a .tiktoken table."""
    return TIKTOKEN_LINE.match(start) is not None


def is_llmc(start: bytes) -> bool:
    """Whether a file that begins so is a tokenizer of llm.c."""
    return magic_of(start) == TOKENIZER


def parse_tiktoken(data: bytes) -> Ranks:
    """A .tiktoken file. Raises LlmpyError (without its name) for damage, and for a large table that is not KNOWN."""
    count = data.count(b"\n")
    known = KNOWN.get(count)
    if count >= TOKENS_AT_MOST and known is None:
        names = ", ".join(f"{k.name} ({n:,})" for n, k in KNOWN.items())
        raise LlmpyError(
            f"{count:,} ranks are none of the tables whose words are known: GPT-2 (50,256), {names}, or up to "
            f"{TOKENS_AT_MOST - 1:,} with GPT-2's",
            "give its tokenizer.json, which says how it splits words",
        )
    if count < 256:
        raise LlmpyError(f"{count:,} ranks, where 256 must be", "download it again")
    eot, pattern = (known.eot, known.pattern) if known else (count, "")
    tokens: list[bytes] = []
    for number, line in enumerate(data.splitlines(keepends=True)):
        text, _, rank = line.partition(b" ")
        try:
            if not TIKTOKEN_LINE.fullmatch(line):
                raise ValueError
            tokens.append(base64.b64decode(text, validate=True))
        except ValueError:
            fix = "download it again"
            raise LlmpyError(f"line {number + 1} is not base64 and a rank: {line[:40]!r}", fix) from None
        expected = number + (number >= eot)
        if int(rank) != expected:
            raise LlmpyError(f"line {number + 1} has rank {int(rank)}, not {expected}", "download it again")
    unused = [b""] * (eot - count)
    ranks = _checked([*tokens[:eot], *unused, EOT.encode(), *tokens[eot:]], eot, len(unused))
    return replace(ranks, pattern=pattern, whole=known is not None)


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
    header[:4] = TOKENIZER, 2, len(ranks.tokens), ranks.eot
    content = header.tobytes() + b"".join(bytes([len(token)]) + token for token in ranks.tokens)
    write_whole(path, lambda temporary: temporary.write_bytes(content))


def _checked(tokens: Sequence[bytes], eot: int, unused: int = 0) -> Ranks:
    """Every byte a token, no token twice or too long; `unused` ids are none."""
    ranks = Ranks(tuple(tokens), eot)
    others = (set(tokens[:eot]) | set(tokens[eot + 1 :])) - ({b""} if unused else set())
    missing = sum(bytes([byte]) not in others for byte in range(256))
    if missing:
        raise LlmpyError(f"{missing} of the 256 bytes are no tokens", "download it again")
    if len(others) != len(tokens) - 1 - unused:
        raise LlmpyError(f"{len(tokens) - 1 - unused - len(others)} tokens stand in it twice", "download it again")
    longest = max(map(len, others))
    if longest > LONGEST:
        raise LlmpyError(f"a token of {longest:,} bytes, where {LONGEST} can be", "download it again")
    return ranks
