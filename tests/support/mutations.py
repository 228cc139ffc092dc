"""Random mutations of a file's bytes, for test_fuzz.py and test_fuzz_data.py."""

from __future__ import annotations

import random

EXTREMES = (0, 1, 2, 255, 256, 2**15, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)
SIGNS = b'{}[]",:\\0123456789eE+-. \n\r\t\0\xff\x80=AaQg'


def mutated(data: bytes, source: random.Random) -> bytes:
    """Return `data` with one to four changes."""
    changed = bytearray(data)
    for _ in range(source.choice((1, 1, 1, 2, 4))):
        n = len(changed)
        at = source.choice(
            (source.randrange(n + 1), min(n, 4 * source.randrange(12)), max(0, n - source.randrange(1, 64)))
        )
        match source.randrange(9):
            case 0:
                del changed[at:]
            case 1:
                del changed[at : at + source.choice((1, 2, 4, 100))]
            case 2 if at < n:
                changed[at] ^= 1 << source.randrange(8)
            case 3:
                changed[at : at + 1] = bytes([source.randrange(256)])
            case 4:
                width = source.choice((1, 2, 4, 8))
                value = source.choice(EXTREMES) % (1 << 8 * width)
                changed[at : at + width] = value.to_bytes(width, "little")
            case 5:
                changed[at:at] = changed[at : at + source.choice((1, 7, 200))]
            case 6:
                changed[at : at + 1] = bytes([source.choice(SIGNS)])
            case 7:
                changed[at:at] = source.choice((b"9" * 30, b'"', b"[" * 3000, b"\xed\xa0\x80", b"\\ud800", b"\0" * 64))
            case _:
                other = source.randrange(n + 1)
                changed[at : at + 16] = changed[other : other + 16]
    return bytes(changed)
