"""llm.c's random numbers: MT19937 (data order, initialisation) and xorshift64* (sampling).

NumPy's legacy `RandomState(seed)` computes MT19937, the stream of `torch.manual_seed(seed)` on the CPU. The
distributions (uniform, normal, permutation) follow llm.c's `llmc/rand.h`.
Sources: Matsumoto and Nishimura 1998; Box and Muller 1958; Vigna 2016, §3.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .errors import LlmpyError

FLOAT_BITS = 24  # of a float32's significand: uniform numbers are multiples of 2⁻²⁴
BLOCK = 16  # values of a Box-Muller block: from 8 radii and 8 angles
CHUNK = 1024 * BLOCK  # normal numbers at a time: larger temporaries cost page faults each time


class MTState(NamedTuple):
    """The state of an MT19937: its 624 words (uint32) and the number of words used."""

    key: np.ndarray
    pos: int


class MT19937:
    """The Mersenne Twister, seeded by a 32-bit integer."""

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 1 << 32:
            raise LlmpyError("option.out-of-range", f"seed {seed} is out of range", "Use a seed from 0 to 2^32 - 1")
        self._stream = np.random.RandomState(seed)

    @property
    def state(self) -> MTState:
        """A copy of the state, settable. llm.c's `next_` is `pos`, its `left_` 625 − `pos`."""
        state = self._stream.get_state(legacy=False)
        return MTState(state["state"]["key"].copy(), int(state["state"]["pos"]))

    @state.setter
    def state(self, state: MTState) -> None:
        self._stream.set_state({"bit_generator": "MT19937", "state": state._asdict()})

    def uint32(self, n: int) -> np.ndarray:
        """Return the next n words, uint32 (n,)."""
        return self._stream.randint(0, 2**32, size=n, dtype=np.uint32)

    def uniform(self, n: int) -> np.ndarray:
        """Return n numbers in [0, 1), float32 (n,), one word each."""
        return _unit_float(self.uint32(n))

    def normal(self, n: int, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
        """Return n numbers from N(mean, std²), float32 (n,)."""
        out = np.empty(n, np.float32)
        self.fill_normal(out, mean, std)
        return out

    def fill_normal(self, out: np.ndarray, mean: float = 0.0, std: float = 1.0) -> None:
        """out (n,) := n ≥ 16 numbers from N(mean, std²), computed in float32.

        Whole blocks are transformed at once. For a remainder (n % 16) the last 16 are drawn again, as in PyTorch's
        vectorised CPU path. Fewer than 16 need another path there; no tensor is that small.
        """
        n = out.size
        for start in range(0, n, CHUNK):
            x = self.uniform(min(CHUNK, n - start))
            whole = x.size - x.size % BLOCK  # the remainder is drawn too: llm.c fills before it transforms
            out[start : start + whole] = _box_muller(x[:whole], mean, std)
        if n % BLOCK:
            out[-BLOCK:] = _box_muller(self.uniform(BLOCK), mean, std)

    def permutation(self, a: np.ndarray) -> None:
        """Shuffle a (n,) in place as llm.c does: for i = n−1 … 1 draw a word and swap a[i] with a[word % (i + 1)]."""
        if a.size < 2:
            return
        bounds = np.arange(a.size, 1, -1)  # torch.randperm runs the other way
        order = a.tolist()  # a list is ten times faster than an array at single elements
        for i, j in zip(range(a.size - 1, 0, -1), (self.uint32(a.size - 1) % bounds).tolist(), strict=True):
            order[i], order[j] = order[j], order[i]
        a[:] = order


def _unit_float(words: np.ndarray) -> np.ndarray:
    """Return the low 24 bits of each word as a float32 in [0, 1)."""
    return (words & np.uint32((1 << FLOAT_BITS) - 1)).astype(np.float32) * np.float32(2.0**-FLOAT_BITS)


def _box_muller(x: np.ndarray, mean: float, std: float) -> np.ndarray:
    """Transform uniform float32 (16·k,) to normal: half of each block gives radii, half angles."""
    blocks = x.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - blocks[:, 0] + np.float32(1e-12)))
    theta = (2.0 * np.pi * blocks[:, 1].astype(np.float64)).astype(np.float32)
    out = np.empty_like(blocks)
    np.multiply(radius, np.cos(theta), out=out[:, 0])
    np.multiply(radius, np.sin(theta), out=out[:, 1])
    out *= np.float32(std)
    out += np.float32(mean)
    return out.reshape(-1)


class Xorshift64Star:
    """llm.c's generator for sampling, with one 64-bit word of state; seed 0 would yield only zeros."""

    def __init__(self, seed: int) -> None:
        if not 0 < seed < 1 << 64:
            raise LlmpyError("option.out-of-range", f"seed {seed} is out of range", "Use a seed from 1 to 2^64 - 1")
        self.state = seed

    def uint32(self) -> int:
        """Return the next word."""
        s = self.state
        s ^= s >> 12
        s ^= s << 25 & (1 << 64) - 1
        s ^= s >> 27
        self.state = s
        return (s * 0x2545F4914F6CDD1D >> 32) & 0xFFFFFFFF

    def uniform(self) -> float:
        """Return the next number in [0, 1), a multiple of 2⁻²⁴."""
        return (self.uint32() >> 32 - FLOAT_BITS) / (1 << FLOAT_BITS)
