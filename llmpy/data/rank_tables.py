"""llm.c's tokenizer file: tokens as bytes, in the order in which byte-level BPE learnt them.

256 uint32: 20240328, version, number of tokens n, EOT's id (version 2); then n times a length (uint8, 1 … 255) and as
many bytes. Version 1 is GPT-2's: n 50257, EOT 50256.

It holds no merges, but a token's rank is its merge's: the pair that made it is what the merges of lower rank leave of
its bytes. Nor does it hold the pattern for words, which is GPT-2's. So it gives an encoder too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import LlmpyError
from ..model.config import GPT2_VOCAB
from ..system.durable import write_whole
from .magic import HEADER_BYTES, TOKENIZER

LLMC_FILE = "gpt2_tokenizer.bin"  # what llm.c calls its own
EOT = "<|endoftext|>"
LONGEST = 255  # bytes of a token


@dataclass(frozen=True)
class Ranks:
    """The bytes of each token by id, and which id is EOT (whose bytes are its name)."""

    tokens: tuple[bytes, ...]
    eot: int

    def merges(self) -> list[tuple[bytes, bytes]]:
        """Return the pair that makes each token of more than one byte, in order of rank.

        Raises LlmpyError if one cannot be made of tokens before it.
        """
        rank = {token: i for i, token in enumerate(self.tokens) if i != self.eot}
        merges = []
        for token, i in rank.items():
            if len(token) > 1:
                parts = _parts(token, i, rank)
                if len(parts) != 2:
                    raise LlmpyError(f"token {i} ({token!r}) is not made of two tokens before it")
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


def parse_llmc(data: bytes) -> Ranks:
    """Read llm.c's tokenizer .bin, version 1 or 2. Raises ValueError for damage."""
    _, version, count, eot = np.frombuffer(data[:16].ljust(16, b"\0"), "<u4").tolist()
    if version == 1:
        eot = GPT2_VOCAB - 1
    tokens, at = [], HEADER_BYTES
    while at < len(data):
        tokens.append(data[at + 1 : at + 1 + data[at]])
        at += 1 + data[at]
    others = {*tokens[:eot], *tokens[eot + 1 :]}
    if version not in (1, 2) or at != len(data) or not eot < len(tokens) == count:
        why = f"version {version}, {len(tokens):,} tokens where {count:,} should be, EOT {eot:,}"
    elif any(bytes([byte]) not in others for byte in range(256)) or len(others) != count - 1 or b"" in others:
        why = "not every byte is a token, or one stands in it twice"
    else:
        return Ranks(tuple(tokens), eot)
    raise ValueError(f"it is damaged: {why}")


def write_llmc(path: Path, ranks: Ranks) -> None:
    """Write llm.c's tokenizer .bin, version 2, whole or not at all.

    Raises LlmpyError for a token of more than 255 bytes, and if the disk refuses.
    """
    if (longest := max(map(len, ranks.tokens))) > LONGEST:
        raise LlmpyError(f"a token has {longest} bytes: llm.c's tokenizer file holds at most {LONGEST}")
    header = np.zeros(HEADER_BYTES // 4, "<u4")
    header[:4] = TOKENIZER, 2, len(ranks.tokens), ranks.eot
    content = header.tobytes() + b"".join(bytes([len(token)]) + token for token in ranks.tokens)
    write_whole(path, lambda temporary: temporary.write_bytes(content))
