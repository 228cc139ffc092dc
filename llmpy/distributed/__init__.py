"""Distributed training: the same program on every rank, on one machine or many, over MPI.

launch.py     start ranks, read the scheduler's variables     zero.py    gradients and weights, bucket by bucket
world.py      communication between ranks                     cost.py    estimated bytes and seconds of a step
watchdog.py   detect and name a dead or hanging rank

Every rank runs the trainer on its own part of each batch. The ranks agree on everything that changes the course of a
run (signals, clock, loss, norm), so that all of them do the same at the same step.
"""
