"""GPT-2 training in Python alone: every pass written by hand, compiled by Numba."""

__version__ = "0.1.0"
