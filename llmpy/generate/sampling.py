"""Sample a token from its logits.

logits of the last token → repetition penalty → /temperature → top k → top p → min p → softmax
                         → inverse of the cumulative sum at a coin
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np

from ..errors import LlmpyError


class Coin(Protocol):
    """A random generator."""

    def uniform(self) -> float:
        """Return the next number in [0, 1)."""


@dataclass(frozen=True)
class Choice:
    """Sampling settings; the defaults sample from the model's own distribution.

    temperature 0 takes the likeliest token. Otherwise filters apply in turn: the `top_k` likeliest tokens (0: all); the
    fewest with total probability `top_p` (Holtzman et al. 2020); those with at least `min_p` times the highest
    probability (Nguyen et al. 2024). `repetition_penalty` r divides positive logits of tokens in the text by r and
    multiplies negative ones (Keskar et al. 2019).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def choose(logits: np.ndarray, coin: Coin, choice: Choice, text: Sequence[int] = ()) -> int:
    """Return a token id from logits (V,) and the text so far. Raises LlmpyError if a logit is not finite."""
    if not np.isfinite(logits).all():
        raise LlmpyError("model.not-finite", "the model's output is not finite", "Its training diverged: repeat it")
    c = choice
    if c.repetition_penalty != 1:
        seen = np.unique(np.asarray(text, np.int64))
        logits, old = logits.copy(), logits[seen]
        logits[seen] = np.where(old > 0, old / c.repetition_penalty, old * c.repetition_penalty)
    if c.temperature == 0:
        return int(logits.argmax())
    # Candidates stay in id order and ties go to the lowest id: the same choice on every machine.
    ids = likeliest(logits, c.top_k)
    scaled = logits[ids].astype(np.float64)
    with np.errstate(over="ignore"):  # tiny temperature: −∞ for all but the likeliest
        p = np.exp((scaled - scaled.max()) / c.temperature)
    if c.top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= c.top_p * p.sum()]] = 0
    p[p < c.min_p] = 0  # the likeliest has p = 1 here
    total = np.cumsum(p)
    return int(ids[min(int(np.searchsorted(total, coin.uniform() * total[-1], side="right")), np.flatnonzero(p)[-1])])


def likeliest(logits: np.ndarray, k: int) -> np.ndarray:
    """Return the ascending ids of the k largest logits (V,), ties to the lowest id; all if k is 0."""
    if not 0 < k < len(logits):
        return np.arange(len(logits))
    border = np.partition(logits, -k)[-k]
    above = np.flatnonzero(logits > border)
    return np.sort(np.append(above, np.flatnonzero(logits == border)[: k - len(above)]))


def logprob(logits: np.ndarray, token: int) -> float:
    """Return log softmax(logits)[token], in nats."""
    shifted = logits - logits.max()
    return float(shifted[token] - np.log(np.exp(shifted).sum(dtype=np.float64)))


def choice_of(options: object) -> Choice:
    """Return the Choice in SampleOptions or ChatOptions."""
    return Choice(**{f.name: getattr(options, f.name) for f in fields(Choice)})
