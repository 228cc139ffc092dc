"""Softmax and cross-entropy of a chunk of rows, in place.     V vocabulary, Vp ≥ V columns

    p    = softmax(logits[:V])                 loss := −log p[target] = log Σe^(x−max) + max − x[target]
    dlogits := scale·(p − onehot(target)),     0 in the padding columns

Three passes over a row (maximum; sum of exponentials; gradient), which stays in L2 between them. The exponential
is computed twice: cheaper than storing it, and never rounded to the dtype of the logits.
A target of −1 masks its row: loss 0, gradient 0.
"""

from __future__ import annotations

import math

import numpy as np

from .activation import exp
from .jit import fork, inline, kernel
from .simd import f32, from_rank, larger, to_operand, to_rank


@inline
def _row(worker, row, losses, logits, targets, vocab_size, scale, gradient):
    target = targets[row]
    if target < 0:
        losses[row] = 0
        if gradient:
            for c in range(logits.shape[1]):
                logits[row, c] = 0
        return
    rank = to_rank(f32(logits[row, 0]))
    for c in range(vocab_size):
        rank = larger(rank, to_rank(f32(logits[row, c])))
    top = from_rank(rank)
    hit = f32(logits[row, target])
    total = np.float32(0)
    for c in range(vocab_size):
        total += exp(f32(logits[row, c]) - top)
    losses[row] = np.float32(math.log(total)) + (top - hit)
    if gradient:
        factor = scale / total
        for c in range(vocab_size):
            logits[row, c] = to_operand(logits, exp(f32(logits[row, c]) - top) * factor)
        for c in range(vocab_size, logits.shape[1]):
            logits[row, c] = 0
        logits[row, target] = to_operand(logits, exp(hit - top) * factor - scale)


@kernel
def softmax_cross_entropy(
    threads,     # int
    losses,      # (rows,) f32 :=
    logits,      # (rows, Vp) logits; := their gradient if `gradient`
    targets,     # (rows,) i32 in [−1, V)
    vocab_size,  # V
    scale,       # f32
    gradient,    # bool
):  # fmt: skip
    fork(_row, threads, losses.shape[0], (losses, logits, targets, vocab_size, scale, gradient))
