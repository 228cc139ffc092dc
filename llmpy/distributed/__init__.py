"""Training by several processes, the ranks, on one machine or many: the same program everywhere, over MPI.

launch.py  who starts the ranks, and what the scheduler says     zero.py    gradients and weights, bucket by bucket
world.py   what ranks tell each other                            shards.py  checkpoints that every rank writes a part of
watch.py   signs of life: who is dead or hangs, and its name     cost.py    bytes and seconds of a step, on paper
alone.py   the world of one process

Every rank runs the trainer on its own part of each batch. Whatever decides how the run goes on (a signal, the clock,
the loss and the norm) is agreed on, so that all ranks do the same at the same step.
"""
