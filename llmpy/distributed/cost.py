"""What a step of several ranks costs on paper: bytes, seconds, and how many of them training waits for.

n parameters, of which M are of matrices, N ranks, R of them on a host whose line carries W bytes a second each way

reduce   4·n·(N−1)/N bytes out of and into every rank            float32 gradients
gather   (2·M + 4·(n−M))·(N−1)/N, without bfloat16 4·n·(N−1)/N   new weights
seconds  bytes that leave the host / (EFFICIENCY·W), and for each bucket a latency and OVERHEAD for each message
exposed  the embeddings' share of both: their gradients are done last, their weights needed first; of the other
         gradients what backward is too short for, of the other weights what forward is too short for

EFFICIENCY was measured (docs/distributed.md), OVERHEAD is an assumption that counts from some hundred ranks on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import ModelConfig
from ..gpt2 import PARAMS
from .zero import END, buckets

EFFICIENCY = 0.9  # of a line's rate that arrives as payload
OVERHEAD = 20e-6  # seconds of a message at its two ends
AGREEMENTS = 6  # times a step that all ranks exchange a few numbers
FORWARD = 1 / 3  # of a step's time, backward the rest


@dataclass(frozen=True)
class Line:
    """What joins the hosts: bytes a second of a host's line, each way, and seconds of latency one way."""

    rate: float
    latency: float


@dataclass(frozen=True)
class Communication:
    """Of one rank and one step: bytes out (as many come in), seconds."""

    reduce_bytes: float
    gather_bytes: float
    reduce_seconds: float
    gather_seconds: float
    exposed_seconds: float

    def efficiency(self, compute: float) -> float:
        """The share of its time that a rank computes, where a step takes `compute` seconds of that."""
        return compute / (compute + self.exposed_seconds)


def communication(
    config: ModelConfig, ranks: int, line: Line, compute: float, mixed: bool = True, per_host: int = 1
) -> Communication:
    """The costs of a step whose last forward and backward, beside which messages travel, take `compute` seconds.

    `mixed`: weights travel as bfloat16. `per_host`: ranks that share a line; among themselves they need none.
    """
    if ranks == 1:
        return Communication(0.0, 0.0, 0.0, 0.0, 0.0)
    edge = sum(t.size for t in PARAMS(config) if t.decay)
    rate = EFFICIENCY * line.rate / per_host
    leaving = max(0, ranks - per_host) / ranks
    sent = {"reduce": 0.0, "gather": 0.0}  # bytes
    early, late = dict(sent), dict(sent)  # seconds: of what something can hide, and of the embeddings
    for bucket in buckets(PARAMS(config), config.layers):
        matrices = sum(max(0, min(stop, edge) - start) for start, stop in bucket.ranges)
        wide = 4 * bucket.size
        for what, size in (("reduce", wide), ("gather", wide - 2 * matrices if mixed else wide)):
            sent[what] += size * (ranks - 1) / ranks
            seconds = size * leaving / rate + line.latency + OVERHEAD * (ranks - 1)
            (late if bucket.first == END else early)[what] += seconds
    exposed = late["reduce"] + late["gather"] + AGREEMENTS * 2 * math.ceil(math.log2(ranks)) * line.latency
    exposed += max(0.0, early["reduce"] - (1 - FORWARD) * compute) + max(0.0, early["gather"] - FORWARD * compute)
    total = {what: early[what] + late[what] for what in sent}
    return Communication(sent["reduce"], sent["gather"], total["reduce"], total["gather"], exposed)
