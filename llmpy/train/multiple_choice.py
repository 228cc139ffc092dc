"""HellaSwag accuracy (acc_norm): how often the model finds the right one of four endings most likely.

choice = argmin over the endings of the mean cross-entropy of their tokens, given context and ending so far

Ties go to the first, as in llm.c (`llmc/dataloader.h`, EvalLoader). All rows have the length of the longest example.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..data.hellaswag import ENDINGS, Example
from ..errors import LlmpyError
from ..model.config import ModelConfig
from ..model.language_model import LanguageModel


def row_length(examples: Sequence[Example]) -> int:
    """Return the tokens of a row that holds any example."""
    return max(e.context.size + max(ending.size for ending in e.endings) for e in examples) - 1


class MultipleChoice:
    """The examples, and buffers for one at a time."""

    def __init__(self, examples: Sequence[Example], config: ModelConfig) -> None:
        """Raises LlmpyError if an example is longer than the model's context."""
        self.examples = examples
        T = row_length(examples)
        if config.context < T:
            what = f"--hellaswag has an example of {T + 1:,} tokens, but the model's context is {config.context:,}"
            raise LlmpyError("hellaswag.too-long", what, "Use a model with a longer context, or remove that example")
        self._tokens = np.zeros((ENDINGS, T), np.int32)
        self._targets = np.empty((ENDINGS, T), np.int32)

    def right(self, model: LanguageModel, i: int) -> bool:
        """Return whether the model chooses the right ending of example i."""
        tokens, targets = self._rows(self.examples[i])
        model.loss(tokens, targets)
        acts = model.reserve(ENDINGS, tokens.shape[1], training=False)
        losses = model.ops.to_host(acts.losses).reshape(tokens.shape)  # 0 where there is no target
        means = losses.sum(axis=1, dtype=np.float64) / np.count_nonzero(targets >= 0, axis=1)
        return int(np.argmin(means)) == self.examples[i].label

    def _rows(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and targets, int32 (4, T): a row per ending; targets outside the ending are masked."""
        self._targets.fill(-1)
        start = example.context.size - 1
        for row, ending in enumerate(example.endings):
            stop = start + ending.size
            self._tokens[row, : start + 1] = example.context
            self._tokens[row, start + 1 : stop] = ending[:-1]
            self._targets[row, start:stop] = ending
        return self._tokens, self._targets
