"""Training by several processes, the ranks, on one machine or many: the same program everywhere, over MPI.

launch.py     who starts the ranks, and what the scheduler says     zero.py    gradients and weights, bucket by bucket
world.py      what ranks tell each other                            cost.py    bytes and seconds of a step, on paper
watchdog.py   who is dead or hangs, and its name

Every rank runs the trainer on its own part of each batch. Whatever decides how the run continues (a signal, the clock,
the loss and the norm) is agreed on, so that all ranks do the same at the same step.
"""
