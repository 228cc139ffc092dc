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

COLUMNS = 32  # dev/LOG.md#sampling-many-texts
FIRST = 256  # tokens that top p sorts; eight times as many if they are too few


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
        with np.errstate(over="ignore"):
            logits[seen] = np.where(old > 0, old / c.repetition_penalty, old * c.repetition_penalty)
        np.clip(logits, np.finfo(logits.dtype).min, np.finfo(logits.dtype).max, out=logits)
    if c.temperature == 0:
        return int(logits.argmax())
    # Candidates stay in id order and ties go to the lowest id: the same choice on every machine. Candidates are dropped
    # as soon as their probability is known to be 0, which changes no sum.
    ids = likeliest(logits, c.top_k) if 0 < c.top_k < len(logits) else None  # None: all
    p = (logits if ids is None else logits[ids]).astype(np.float64)
    p -= p.max()
    with np.errstate(over="ignore"):  # tiny temperature: −∞ for all but the likeliest
        if c.temperature != 1:
            p /= c.temperature
        np.exp(p, out=p)
    if c.top_p < 1:
        kept = nucleus(p, c.top_p)
        ids, p = kept if ids is None else ids[kept], p[kept]
    if c.min_p > 0:
        p[p < c.min_p] = 0  # the likeliest has p = 1 here
    total = np.cumsum(p)
    at = int(np.searchsorted(total, coin.uniform() * total[-1], side="right"))
    at = at if at < len(p) else int(np.flatnonzero(p)[-1])
    return at if ids is None else int(ids[at])


def likeliest(x: np.ndarray, k: int) -> np.ndarray:
    """Return the ascending ids of the k largest of x (V,), ties to the lowest id; all if k is 0."""
    if not 0 < k < len(x):
        return np.arange(len(x))
    ids = np.arange(len(x))
    if (rows := len(x) // COLUMNS) > k:  # the k-th largest maximum of columns is at most the k-th largest of x
        border = np.partition(x[: rows * COLUMNS].reshape(COLUMNS, rows).max(axis=0), -k)[-k]
        ids = np.flatnonzero(x >= border)
    some = x[ids]
    border = np.partition(some, -k)[-k]
    above = ids[some > border]
    return np.sort(np.append(above, ids[some == border][: k - len(above)]))


def nucleus(p: np.ndarray, share: float) -> np.ndarray:
    """Return the ascending ids of the fewest of p (V,) that sum to this share of all, ties to the lowest id."""
    limit, k = share * p.sum(), FIRST
    while True:  # sort only so many that their sum exceeds the limit, whatever its rounding
        some = likeliest(p, k if k < len(p) else 0)
        if len(some) == len(p) or p[some].sum() > (1 + 1e-9) * limit:
            break
        k *= 8
    order = some[np.argsort(-p[some], kind="stable")]
    before = np.cumsum(p[order]) - p[order]
    return np.sort(order[before < limit])


def logprobs(logits: np.ndarray, tokens: Sequence[int]) -> list[float]:
    """Return log softmax(logits) of each of these tokens, in nats."""
    shifted = logits - logits.max()
    whole = np.log(np.exp(shifted).sum(dtype=np.float64))
    return [float(shifted[token] - whole) for token in tokens]


def logprob(logits: np.ndarray, token: int) -> float:
    """Return log softmax(logits)[token], in nats."""
    return logprobs(logits, [token])[0]


def choice_of(options: object) -> Choice:
    """Return the Choice in SampleOptions or ChatOptions."""
    return Choice(**{f.name: getattr(options, f.name) for f in fields(Choice)})
