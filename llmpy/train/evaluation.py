"""Validation loss and HellaSwag accuracy."""

from __future__ import annotations

import hashlib
import json
import math

from ..model.language_model import LanguageModel
from ..options.train import ALL_BATCHES, TrainOptions
from ..run.checkpoint import Score
from .report import Report
from .signals import StopSignals
from .single_process import SINGLE_PROCESS, SingleProcess
from .training_data import TrainingData, contents


class Evaluation:
    """Evaluates the model, always on the same batches, which are divided among the ranks."""

    def __init__(
        self, model: LanguageModel, data: TrainingData, options: TrainOptions, report: Report, stop: StopSignals,
        world: SingleProcess = SINGLE_PROCESS,
    ) -> None:  # fmt: skip
        self._model, self._data, self._report, self._stop, self._world = model, data, report, stop, world
        wanted, most = options.eval_batches, data.val.batches_per_epoch
        self._batches = most if wanted == ALL_BATCHES else max(1, min(wanted, most))
        digest = hashlib.blake2b(json.dumps(contents(data.fingerprints["val"])).encode(), digest_size=6).hexdigest()
        # Losses are comparable only if measured on the same batches.
        self._measured_on = f"{self._batches:,} batches of {data.val.B} x {data.val.T} of text {digest}"
        self.loss = math.nan  # the latest

    def validate(self, step: int) -> Score | None:
        """Report and return the mean validation loss, which may be NaN; None after a stop signal or without targets.

        Batches are weighted by their unmasked targets; without a mask equally, as in llm.c.
        """
        if self._stop.signal:
            return None
        val, world, report = self._data.val, self._world, self._report
        val.reset()
        total = weight = size = 0.0
        for first in range(0, self._batches, world.size):  # a batch per rank: the same sum for any number of ranks
            mine = 0.0, 0.0, 0.0
            for i in range(first, min(first + world.size, self._batches)):
                tokens, targets = val.next()
                if i - first == world.rank:
                    wanted = targets[targets >= 0]
                    share = wanted.size / targets.size
                    count = float(self._data.token_bytes[wanted].sum())
                    mine = share * self._model.loss(tokens, targets, val.positions), share, count
            for part, counted, count in self._stop.agree(*mine):
                total += part
                weight += counted
                size += count
            if self._stop.signal:
                return None
        if not weight:
            report.journal.log(f"step {step}: all targets of the {self._batches:,} validation batches are masked")
            return None
        loss = total / weight
        if not math.isfinite(loss):
            return Score(step, loss, self._measured_on)
        numbers, line = {"val_loss": loss}, f"step {step}: validation loss {loss:.4f}"
        if size:  # of the text that was measured
            numbers["val_bits_per_byte"] = total * val.B * val.T / math.log(2) / size
            line += f", {numbers['val_bits_per_byte']:.3f} bits per byte"
        report.record(step, **numbers)
        report.journal.record_llmc(f"s:{step} tel:{loss:.4f}")
        report.journal.log(line)
        self.loss = loss
        return Score(step, loss, self._measured_on)

    def choose(self, step: int) -> None:
        """Report HellaSwag accuracy, if there are examples and no stop signal comes."""
        choices = self._data.choices
        if choices is None or self._stop.signal:
            return
        world, count, right = self._world, len(choices.examples), 0
        for first in range(0, count, world.size):
            mine = first + world.rank
            right += int(sum(r for (r,) in self._stop.agree(mine < count and choices.right(self._model, mine))))
            if self._stop.signal:
                return
        self._report.record(step, hellaswag=right / count)
        self._report.journal.record_llmc(f"s:{step} eval:{right / count:.4f}")
        self._report.journal.log(f"step {step}: HellaSwag accuracy {right / count:.4f} ({right:,} of {count:,})")
