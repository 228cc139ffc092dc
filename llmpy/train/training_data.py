"""The data of a trainer: training and validation batches, and the prompt of samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.hellaswag import read_examples
from ..data.loader import Loader, Position
from ..data.pipeline import HELD_OUT, check_counted
from ..data.records import holds_answers, question
from ..data.shards import fingerprint
from ..data.user_data import Dataset
from ..errors import LlmpyError
from ..generate.generation import encode_prompt
from ..model.config import ModelConfig
from ..options.train import TrainOptions
from .multiple_choice import MultipleChoice
from .single_process import SINGLE_PROCESS, SingleProcess

Fingerprints = dict[str, list[dict[str, Any]]]  # of the training and validation shards


@dataclass(frozen=True)
class Update:
    """The micro-batches of one update of this rank."""

    # Tokens, targets and positions, int32 (B, T), None for rows of one document; and the number of unmasked targets.
    batches: list[tuple[np.ndarray, np.ndarray, np.ndarray | None, int]]
    names: list[tuple[str, int]]  # file and sample number of each
    position: Position  # in the data, before them

    @property
    def counted(self) -> int:
        """The number of unmasked targets."""
        return sum(n for *_, n in self.batches)


class TrainingData:
    """The batches of a dataset for one rank."""

    def __init__(
        self, data: Dataset, options: TrainOptions, config: ModelConfig, world: SingleProcess = SINGLE_PROCESS
    ) -> None:
        """Raise LlmpyError if the data are too short or do not fit the options."""
        check_enough(data, options)
        o, B, T, size = options, options.batch_size, options.sequence_length, data.vocab_size
        self.overfit, self.micro_steps = o.overfit, o.micro_steps
        shards, shuffle = (data.val, False) if o.overfit else (data.train, o.shuffle)
        self.train = Loader(shards, B, T, shuffle, o.seed, rank=world.rank, ranks=world.size, vocab_size=size)
        rows = min(B, (min(map(len, data.val)) - 1) // T)  # the validation text may be short
        self.val = Loader(data.val, rows, T, shuffle=False, vocab_size=size)
        self.choices: MultipleChoice | None = None
        if o.hellaswag is not None:
            self.choices = MultipleChoice(read_examples(o.hellaswag, size), config)
        self.tokens = sum(map(len, data.train)), sum(map(len, data.val))  # training, validation
        self.fingerprints: Fingerprints = {
            "train": [*map(fingerprint, data.train)],
            "val": [*map(fingerprint, data.val)],
        }
        self.tokenizer = data.tokenizer
        self.token_bytes = data.tokenizer.byte_lengths() if data.tokenizer else np.zeros(size, np.int32)
        self.opening, self.prompt = self._prompt(data, o.prompt or "", T)

    def _prompt(self, data: Dataset, opening: str, T: int) -> tuple[str, list[int]]:
        """Return the prompt of samples, as text and as tokens."""
        if data.tokenizer is not None:
            asked = question(data.val, data.tokenizer, T // 2) if not opening else []
            text = data.tokenizer.decode(asked[asked[:1] == [data.tokenizer.eot] :])
            return text or opening, asked or encode_prompt(data.tokenizer, opening)
        if opening:
            what = "--prompt requires a tokenizer, but the token shards have none"
            raise LlmpyError("tokenizer.missing", what, "Put their tokenizer.json into the same folder")
        return "", [data.vocab_size - 1]  # GPT-2's end-of-text

    @property
    def holds_answers(self) -> bool:
        """Whether the training text holds messages of an assistant."""
        tokenizer = self.tokenizer
        return tokenizer is not None and any(holds_answers(shard, tokenizer) for shard in self.train.shards)

    def read(self) -> Update:
        """Return the batches of the next update."""
        train, position = self.train, self.train.position
        if self.overfit:
            train.reset()
        batches, names = [], []
        for _ in range(self.micro_steps):
            tokens, targets = train.next()
            positions = None if train.positions is None else train.positions.copy()
            batches.append((tokens.copy(), targets.copy(), positions, int(np.count_nonzero(targets >= 0))))
            names.append(train.batch)
        return Update(batches, names, position)

    def check_counted(self) -> None:
        """Raise LlmpyError if nothing in the training or the validation text counts."""
        eot = (self.train.vocab_size or 0) - 1 if self.tokenizer is None else self.tokenizer.eot
        for what, loader in (("training", self.train), ("validation", self.val)):
            check_counted(((shard.tokens, shard.mask) for shard in loader.shards), eot, self.tokenizer, what)

    def check_same(self, before: Fingerprints, folder: object) -> None:
        """Raise LlmpyError if the fingerprints `before` differ from these data's."""
        if any(contents(before[part]) != contents(marks) for part, marks in self.fingerprints.items()):
            what = f"the data differ from those that {folder} was trained on"
            raise LlmpyError("data.changed", what, "Restore them, or start a new run")


def contents(marks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return fingerprints without file names: files may move."""
    return [{name: value for name, value in mark.items() if name != "name"} for mark in marks]


def check_enough(data: Dataset, options: TrainOptions) -> None:
    """Raise LlmpyError if a shard is shorter than a training batch or a validation row."""
    o, T = options, options.sequence_length
    train, val = (min(part, key=len) for part in (data.val if o.overfit else data.train, data.val))
    needed = o.batch_tokens + 1, T + 1
    if len(train) >= needed[0] and len(val) >= needed[1]:
        return
    of_shard = f" in {train.path}" if len(data.train) > 1 else ""
    of_ranks = f" of each of {o.ranks} ranks" if o.ranks > 1 else ""
    # The split is at a line end, so this text may hold out more than its share, and a longer one less.
    held = len(val) if o.overfit else min(len(val), HELD_OUT * (len(train) + len(val)))
    times = max(needed[0] / max(1, len(train)), needed[1] / max(1, held))
    fix = f"Use about {math.ceil(10 * times) / 10:,} times as much text"
    if of_shard and len(train) < needed[0]:
        fix = f"Remove {train.path} or merge it with another shard"
    t = min(T, len(val) - 1, (len(train) - 1) // o.ranks)
    if t > 0 and o.total_batch is None:
        fix += f", or use -B {min(o.batch_size, (len(train) - 1) // (t * o.ranks))} -T {t}"
    raise LlmpyError(
        "data.too-short",
        f"{len(train):,} training tokens{of_shard} and {len(val):,} validation tokens are too few: -B {o.batch_size} "
        f"-T {T}{of_ranks} requires {needed[0]:,} and {needed[1]:,}",
        fix,
    )
