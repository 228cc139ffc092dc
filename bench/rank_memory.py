"""Memory of the optimizer on each rank, as the system has it: pages of its arrays that are resident after two steps.

mpiexec -n 4 python bench/rank_memory.py --model d8 --dtype float32        MB of the rank that holds most
"""

from __future__ import annotations

import argparse
import json
import mmap

import numpy as np
import psutil
from mpi4py import MPI

from llmpy import backend
from llmpy.distributed.world import World
from llmpy.distributed.zero import Zero
from llmpy.model.config import ModelConfig
from llmpy.model.gpt2 import GPT2
from llmpy.model.initialise import initialise
from llmpy.options.train import TrainOptions
from llmpy.train.single_process import Alone

PRESENT = np.uint64(1 << 63)  # a page's word in /proc/self/pagemap: whether it is in memory


def resident(x: np.ndarray) -> int:
    """Bytes of the pages of x that are in memory. Linux."""
    first, last = x.ctypes.data // mmap.PAGESIZE, -(-(x.ctypes.data + x.nbytes) // mmap.PAGESIZE)
    with open("/proc/self/pagemap", "rb") as pages:
        pages.seek(8 * first)
        words = np.frombuffer(pages.read(8 * (last - first)), np.uint64)
    return int(np.count_nonzero(words & PRESENT)) * mmap.PAGESIZE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="d8")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("-B", type=int, default=1)
    parser.add_argument("-T", type=int, default=64)
    told = parser.parse_args()
    several = MPI.COMM_WORLD.Get_size() > 1
    world = World(MPI, 0) if several else Alone()
    model = GPT2(ModelConfig.from_dial(told.model), backend.load("cpu", threads=1, dtype=told.dtype))
    initialise(model.params, model.config)
    model.store_weights()
    model.reserve(told.B, told.T, training=True)
    optimizer = world.optimizer(model, TrainOptions())
    tokens = np.random.default_rng(world.rank).integers(0, model.config.vocab_size, (2, told.B, told.T), np.int32)
    for _ in range(2):
        optimizer.expect()
        model.loss_and_grads(*tokens, micro_steps=world.size)
        optimizer.update(1e-4, optimizer.norm())
    found = {"moments": resident(optimizer.m) + resident(optimizer.v)}
    if isinstance(optimizer, Zero):
        optimizer.settle()
        found |= {"master weights": resident(optimizer.master), "reduced gradients": resident(optimizer.grad)}
    found["process"] = psutil.Process().memory_info().rss
    rows = world.gather(*found.values())
    if world.rank == 0:
        most = (max(values) / 1e6 for values in zip(*rows, strict=True))
        print(json.dumps(dict(zip(found, most, strict=True))))
    world.gather(0)


if __name__ == "__main__":
    main()
