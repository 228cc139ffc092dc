"""Measure the network for `llmpy plan --nodes` with messages like those of training: --bandwidth and --latency.

mpiexec -n 2 -hosts a,b python bench/line.py        one rank per host; all send to all others at once

Bandwidth: the time of a bucket minus that of a small message. Latency: the time of a small message. `plan` expects the
nominal bandwidth and multiplies it by EFFICIENCY, so the measured one is divided by it here.
"""

from __future__ import annotations

import json
import statistics
import time

import numpy as np
from mpi4py import MPI

from llmpy.distributed.cost import EFFICIENCY, OVERHEAD
from llmpy.distributed.world import World
from llmpy.model.partition import BUCKET, LINE

REPEATS = {LINE: 300, BUCKET: 15}  # elements of a bucket → how often it is exchanged


def seconds(world: World, elements: int, repeats: int) -> float:
    """Return the median time to exchange a bucket of so many elements among all ranks."""
    part = -(-elements // world.size)
    outgoing, incoming = (np.zeros((world.size, part), np.float32) for _ in range(2))
    found = []
    for _ in range(repeats + 2):  # the first two open connections and touch pages
        world.gather(0)
        start = time.perf_counter()
        world.exchange(0, outgoing, incoming)
        found.append(time.perf_counter() - start)
    return statistics.median(found[2:])


def main() -> None:
    world = World(MPI, 0)
    small, large = (seconds(world, elements, repeats) for elements, repeats in REPEATS.items())
    payload = 4 * BUCKET * (world.size - 1) / world.size / (large - small)  # bytes/s
    latency = max(0.0, small - OVERHEAD * (world.size - 1))
    rows = world.gather(8 * payload / EFFICIENCY / 1e9, 1e6 * latency)
    if world.rank == 0:  # report the slowest rank
        bandwidths, latencies = zip(*rows, strict=True)
        print(json.dumps({"bandwidth": min(bandwidths), "latency": max(latencies)}))
    world.gather(0)


if __name__ == "__main__":
    main()
