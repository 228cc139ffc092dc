"""Training by several processes, the ranks, on one machine or many: the same program everywhere, over MPI.

Every rank runs the trainer on its own part of each batch. Whatever decides how the run continues (a signal, the clock,
the loss and the norm) is agreed on, so that all ranks do the same at the same step.
"""
