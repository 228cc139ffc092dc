"""What a step of several ranks costs on paper: bytes, seconds, and how many of them training waits for.

n parameters, of which M are of matrices; N ranks, each on a host of its own, whose line carries W bytes/s each way

reduce     4·n·(N−1)/N bytes out of and into every rank             float32 gradients
gather     (2·M + 4·(n−M))·(N−1)/N, in float32 4·n·(N−1)/N          new weights
bucket     seconds = bytes out / (EFFICIENCY·W) + latency + OVERHEAD·(N−1), or what it takes to copy them out and in
           + bytes that are packed and summed, or put into place, / copying
gradients  a bucket is sent when backward is done with its layers and the one before it has come; training waits for
           those that have not come when backward ends
weights    the embeddings' first, each when it is updated; forward waits for those of a layer when it comes to it
taken      seconds of computing that copying costs, for the thread that carries has no core of its own; for the same
           reason copies beside T computing threads take 1 + CROWD/T times as long: a message has two ends
slowest    UNEVEN of what a rank computes: the one that is behind is waited for

EFFICIENCY, CROWD and UNEVEN were measured (docs/distributed.md), OVERHEAD is an assumption that counts from some
hundred ranks on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..model.config import ModelConfig
from ..model.gpt2 import params_table
from ..model.partition import END, Bucket, buckets

EFFICIENCY = 0.9  # of a line's rate that arrives as payload
OVERHEAD = 20e-6  # seconds of a message at its two ends
CROWD = 2.0
UNEVEN = 0.007  # of a rank's computing
AGREEMENTS = 6  # times a step that all ranks exchange a few numbers
WIDE = 4  # bytes of a gradient


@dataclass(frozen=True)
class Line:
    """What joins the hosts: bytes a second of a host's line, each way, and seconds of latency one way."""

    rate: float
    latency: float


@dataclass(frozen=True)
class Work:
    """What a rank does, in seconds; messages travel beside the layers of the last of an update's batches."""

    forward: float  # of all layers
    head: float
    backward: float
    update: float  # of the own part
    batches: int = 1
    threads: int = 1
    copying: float = 10e9  # bytes/s of one thread from here to there


@dataclass(frozen=True)
class Communication:
    """Of one rank and one step: bytes out (as many come in), seconds."""

    reduce_bytes: float = 0.0
    gather_bytes: float = 0.0
    reduce_seconds: float = 0.0
    gather_seconds: float = 0.0
    gradients_exposed: float = 0.0
    weights_exposed: float = 0.0
    agreements: float = 0.0
    slowest: float = 0.0
    taken: float = 0.0

    @property
    def seconds(self) -> float:
        """How long messages are on their way."""
        return self.reduce_seconds + self.gather_seconds

    @property
    def exposed_seconds(self) -> float:
        """How long training waits."""
        return self.gradients_exposed + self.weights_exposed + self.agreements + self.slowest


def chain(ready: Iterable[float], takes: Iterable[float]) -> list[float]:
    """When each of these jobs ends, none of which begins before it is `ready` or the one before it has ended."""
    ends, last = [], 0.0
    for at, seconds in zip(ready, takes, strict=True):
        last = max(last, at) + seconds
        ends.append(last)
    return ends


def communication(config: ModelConfig, ranks: int, line: Line, work: Work, mixed: bool) -> Communication:
    """The costs of a step in whose last forward and backward messages travel. `mixed`: weights are sent as bfloat16."""
    if ranks == 1:
        return Communication()
    table, L = params_table(config), config.layers
    total, edge = sum(t.size for t in table), sum(t.size for t in table if t.decay)
    sent = (ranks - 1) / ranks
    crowd = 1 + CROWD / work.threads

    def seconds(size: float, moved: float, beside: bool) -> float:
        copied = (crowd if beside else 1.0) / work.copying
        wire = max(sent * size / (EFFICIENCY * line.rate), 2 * sent * size * copied)
        return wire + line.latency + OVERHEAD * (ranks - 1) + moved * copied

    def stored(b: Bucket) -> int:
        return WIDE * b.size - (2 * sum(max(0, min(stop, edge) - start) for start, stop in b.ranges) if mixed else 0)

    first = buckets(table, L)
    moved = [WIDE * b.size * (sent + (len(b.ranges) > 1)) for b in first]
    ready = [work.backward * (1 - max(b.first, 0) / L) for b in first]
    reduce = [seconds(WIDE * b.size, m, at < work.backward) for b, m, at in zip(first, moved, ready, strict=True)]
    reduced = chain(ready, reduce)[-1]

    last = first[::-1]
    gather = [seconds(stored(b), stored(b), b.first != END) for b in last]
    arrived = chain(itertools.accumulate(work.update * b.size / total for b in last), gather)
    there = {layer: at for b, at in zip(last, arrived, strict=True) for layer in range(b.first, b.last + 1)}
    begun = [max(work.update, there[layer]) for layer in (END, *range(L))]
    ended = chain(begun, [0.0] + [work.forward / L] * L)[-1]

    out = sent * WIDE * total, sent * sum(map(stored, first))
    return Communication(
        reduce_bytes=out[0],
        gather_bytes=out[1],
        reduce_seconds=sum(reduce),
        gather_seconds=sum(gather),
        gradients_exposed=reduced - work.backward,
        weights_exposed=ended - work.update - work.forward,
        agreements=AGREEMENTS * 2 * math.ceil(math.log2(ranks)) * line.latency,
        slowest=UNEVEN * work.batches * (work.forward + work.head + work.backward),
        taken=(2 * sum(out) + sum(moved) + out[1] / sent) / work.copying / work.threads,
    )
