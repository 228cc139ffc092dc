"""Random numbers, equal to llm.c's: MT19937 (data order, initialisation) and xorshift64* (sampling).

MT19937 is the raw stream of `torch.manual_seed(seed)` on the CPU and of NumPy's legacy `RandomState(seed)`,
which computes it here; what is made of that stream (uniform, normal, permutation) follows llm.c's
`llmc/rand.h`. Sources: Matsumoto and Nishimura 1998; Box and Muller 1958; Vigna 2016, §3.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .errors import LlmpyError

FLOAT_BITS = 24  # of a float32's mantissa: uniform draws are multiples of 2⁻²⁴
BLOCK = 16  # values that one Box-Muller block makes: 8 radii, 8 angles
CHUNK = 1024 * BLOCK  # normal draws at a time: larger temporaries come from the system, page by page, each time


class MTState(NamedTuple):
    """Where an MT19937 stands: its 624 words (uint32) and how many of them are used up."""

    key: np.ndarray
    pos: int


class MT19937:
    """The Mersenne twister, seeded by a 32-bit integer."""

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 1 << 32:
            raise LlmpyError("rng.x", f"seed {seed} cannot start this generator", "Use a seed from 0 to 2^32 - 1")
        self._stream = np.random.RandomState(seed)

    @property
    def state(self) -> MTState:
        """A copy of the state; set it to continue from there. llm.c's `next_` is `pos`, `left_` 625 − `pos`."""
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
        """n numbers from N(mean, std²), float32 (n,)."""
        out = np.empty(n, np.float32)
        self.fill_normal(out, mean, std)
        return out

    def fill_normal(self, out: np.ndarray, mean: float = 0.0, std: float = 1.0) -> None:
        """out (n,) := n ≥ 16 numbers from N(mean, std²), computed in float32.

        Whole blocks are transformed at once, and a rest (n % 16) is covered by drawing the last 16 again, as
        PyTorch's vectorised CPU path does. Fewer than 16 would need another path there; no tensor has so few.
        """
        n = out.size
        for start in range(0, n, CHUNK):
            x = self.uniform(min(CHUNK, n - start))
            whole = x.size - x.size % BLOCK  # the rest is drawn all the same: llm.c fills before it transforms
            out[start : start + whole] = _box_muller(x[:whole], mean, std)
        if n % BLOCK:
            out[-BLOCK:] = _box_muller(self.uniform(BLOCK), mean, std)

    def permutation(self, a: np.ndarray) -> None:
        """Shuffle a (n,) in place with n − 1 words: for i = n−1 … 1 swap a[i] and a[word % (i + 1)].

        This is llm.c's `random_permutation`; `torch.randperm` walks the other way and differs.
        """
        if a.size < 2:
            return
        bounds = np.arange(a.size, 1, -1)
        order = a.tolist()  # swaps follow each other: a list is ten times faster at single elements
        for i, j in zip(range(a.size - 1, 0, -1), (self.uint32(a.size - 1) % bounds).tolist(), strict=True):
            order[i], order[j] = order[j], order[i]
        a[:] = order


def _unit_float(words: np.ndarray) -> np.ndarray:
    """The low 24 bits of each word as a float32 in [0, 1)."""
    return (words & np.uint32((1 << FLOAT_BITS) - 1)).astype(np.float32) * np.float32(2.0**-FLOAT_BITS)


def _box_muller(x: np.ndarray, mean: float, std: float) -> np.ndarray:
    """Uniform float32 (16·k,) → normal float32 (16·k,): half a block gives radii, the other half angles."""
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
    """llm.c's generator for sampling: one 64-bit word of state. From 0 every number would be 0."""

    def __init__(self, seed: int) -> None:
        if not 0 < seed < 1 << 64:
            raise LlmpyError("rng.x", f"seed {seed} cannot start this generator", "Use a seed from 1 to 2^64 - 1")
        self.state = seed

    def uint32(self) -> int:
        """The next word."""
        s = self.state
        s ^= s >> 12
        s ^= s << 25 & (1 << 64) - 1
        s ^= s >> 27
        self.state = s
        return (s * 0x2545F4914F6CDD1D >> 32) & 0xFFFFFFFF

    def uniform(self) -> float:
        """The next number in [0, 1), a multiple of 2⁻²⁴."""
        return (self.uint32() >> 32 - FLOAT_BITS) / (1 << FLOAT_BITS)
