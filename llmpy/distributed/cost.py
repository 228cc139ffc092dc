"""Estimate the communication of a step.

n parameters, M of them in matrices; N ranks, each on a host with W bytes/s each way

gradients  4·n·(N−1)/N bytes out of and into every rank, while backward runs
weights    (2·M + 4·(n−M))·(N−1)/N, in float32 4·n·(N−1)/N, while the next forward runs
bucket     seconds = bytes / min(EFFICIENCY·W, COPYING) + latency + OVERHEAD·(N−1)
exposed    max(the buckets of the embeddings and the first layer, all buckets − backward or forward) + agreements:
           backward finishes those buckets last and forward needs them first

EFFICIENCY and COPYING were measured (docs/distributed.md). OVERHEAD is assumed; it matters above some hundred ranks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..model.config import ModelConfig
from ..model.families import trained_table
from ..model.partition import Bucket, buckets

EFFICIENCY = 0.9  # payload, as a share of the link rate
COPYING = 1e9  # bytes/s each way at which a thread packs, sums and unpacks messages while other threads compute
OVERHEAD = 20e-6  # seconds per message at its two ends
AGREEMENTS = 6  # exchanges of a few numbers per step


class Communication(NamedTuple):
    """Per rank and step: bytes sent (as many are received), seconds of communication, seconds not overlapped."""

    sent: float
    seconds: float
    exposed: float


def communication(
    config: ModelConfig, ranks: int, rate: float, latency: float, forward: float, backward: float, mixed: bool
) -> Communication:
    """Return the cost of a step over links of `rate` bytes/s and `latency` seconds.

    `forward` and `backward`: seconds of one batch. `mixed`: weights are sent as bfloat16.
    """
    if ranks == 1:
        return Communication(0, 0, 0)
    table, share = trained_table(config), (ranks - 1) / ranks
    matrices = sum(t.size for t in table if t.decay)

    def payload(bucket: Bucket, mixed: bool) -> float:
        narrowed = sum(max(0, min(stop, matrices) - start) for start, stop in bucket.ranges) if mixed else 0
        return share * (4 * bucket.size - 2 * narrowed)

    sent = seconds = 0.0
    exposed = AGREEMENTS * 2 * math.ceil(math.log2(ranks)) * latency
    for computing, narrow in ((backward, False), (forward, mixed)):
        sizes = [(bucket.first, payload(bucket, narrow)) for bucket in buckets(table, config.layers)]
        takes = [
            (first, size / min(EFFICIENCY * rate, COPYING) + latency + OVERHEAD * (ranks - 1)) for first, size in sizes
        ]
        total = sum(took for _, took in takes)
        sent += sum(size for _, size in sizes)
        seconds += total
        exposed += max(sum(took for first, took in takes if first <= 0), total - computing)
    return Communication(sent, seconds, exposed)
