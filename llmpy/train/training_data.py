"""What a trainer reads: batches to train on, one update ahead, and to validate on; the prompt of samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.hellaswag import read_examples
from ..data.loader import Loader, Position
from ..data.pipeline import HELD_OUT
from ..data.prepare import Dataset
from ..data.records import holds_answers, question
from ..data.shards import fingerprint
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

    batches: list[tuple[np.ndarray, np.ndarray, int]]  # tokens and targets, int32 (B, T), and how many targets count
    names: list[tuple[str, int]]  # file and number of the sample of each
    position: Position  # in the data, before them

    @property
    def counted(self) -> int:
        """Targets that count in the loss."""
        return sum(n for _, _, n in self.batches)


class TrainingData:
    """Batches of a data set, as the options cut them, for one rank."""

    def __init__(
        self, data: Dataset, options: TrainOptions, config: ModelConfig, world: SingleProcess = SINGLE_PROCESS
    ) -> None:
        """Raises LlmpyError if the data are too few or unfit for the options."""
        check_enough(data, options)
        o, B, T, size = options, options.batch_size, options.sequence_length, data.vocab_size
        self.overfit, self.micro_steps = o.overfit, o.micro_steps
        shards, shuffle = (data.val, False) if o.overfit else (data.train, o.shuffle)
        self.train = Loader(shards, B, T, shuffle, o.seed, rank=world.rank, ranks=world.size, vocab_size=size)
        rows = min(B, (min(map(len, data.val)) - 1) // T)  # or as many as the validation text fills
        self.val = Loader(data.val, rows, T, shuffle=False, vocab_size=size)
        self.choices: MultipleChoice | None = None
        if o.hellaswag is not None:
            self.choices = MultipleChoice(read_examples(o.hellaswag, size), config)
        self.tokens = sum(map(len, data.train)), sum(map(len, data.val))  # to train on and to validate
        self.fingerprints: Fingerprints = {
            "train": [*map(fingerprint, data.train)],
            "val": [*map(fingerprint, data.val)],
        }
        self.tokenizer, self.bytes_per_token = data.tokenizer, data.bytes_per_token
        self.opening, self.prompt = self._prompt(data, o.prompt or "", T)

    def _prompt(self, data: Dataset, opening: str, T: int) -> tuple[str, list[int]]:
        """Return what samples continue: as text, and as tokens."""
        if data.tokenizer is not None:
            asked = question(data.val, data.tokenizer, T // 2) if not opening else []
            text = data.tokenizer.decode([i for i in asked if i != data.tokenizer.eot])
            return text or opening, asked or encode_prompt(data.tokenizer, opening)
        if opening:
            raise LlmpyError(
                "train.x",
                "--prompt needs a tokenizer, and the token shards came without one",
                "Put the tokenizer.json that they were made with beside them",
            )
        return "", [data.vocab_size - 1]  # where GPT-2 has its end-of-text

    @property
    def holds_answers(self) -> bool:
        """Whether the text to train on is of messages, of which the assistant's count."""
        tokenizer = self.tokenizer
        return tokenizer is not None and any(holds_answers(shard, tokenizer) for shard in self.train.shards)

    def read(self) -> Update:
        """Read the batches of the next update."""
        train, position = self.train, self.train.position
        if self.overfit:
            train.reset()
        batches, names = [], []
        for _ in range(self.micro_steps):
            tokens, targets = train.next()
            batches.append((tokens.copy(), targets.copy(), int(np.count_nonzero(targets >= 0))))
            names.append(train.batch)
        return Update(batches, names, position)

    def check_same(self, before: Fingerprints, folder: object) -> None:
        """Raise LlmpyError if these are not the data of before, by their fingerprints."""
        if any(contents(before[part]) != contents(marks) for part, marks in self.fingerprints.items()):
            raise LlmpyError(
                "train.x", f"the data are not those that {folder} was trained on", "Restore them, or begin a new run"
            )


def contents(marks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return fingerprints without the names of the files, which may have been moved."""
    return [{name: value for name, value in mark.items() if name != "name"} for mark in marks]


def check_enough(data: Dataset, options: TrainOptions) -> None:
    """Raise LlmpyError if a shard does not fill a batch to train on, or a row to validate; it says what both take."""
    o, T = options, options.sequence_length
    train, val = (min(part, key=len) for part in (data.val if o.overfit else data.train, data.val))
    needed = o.batch_tokens + 1, T + 1
    if len(train) >= needed[0] and len(val) >= needed[1]:
        return
    of_shard = f" in {train.path}" if len(data.train) > 1 else ""
    of_ranks = f" of each of {o.ranks} ranks" if o.ranks > 1 else ""
    # Where lines end, this text may have given more than its share to validate, and a longer one may not.
    held = len(val) if o.overfit else min(len(val), HELD_OUT * (len(train) + len(val)))
    times = max(needed[0] / max(1, len(train)), needed[1] / max(1, held))
    fix = f"give about {math.ceil(10 * times) / 10:,} times as much text"
    if of_shard and len(train) < needed[0]:
        fix = f"leave {train.path} out, or join it with another"
    t = min(T, len(val) - 1, (len(train) - 1) // o.ranks)
    if t > 0 and o.total_batch is None:
        fix += f", or use -B {min(o.batch_size, (len(train) - 1) // (t * o.ranks))} -T {t}"
    raise LlmpyError(
        "train.x",
        f"there are {len(train):,} tokens{of_shard} to train on and {len(val):,} to validate, and -B {o.batch_size} "
        f"-T {T}{of_ranks} takes {needed[0]:,} and {needed[1]:,} at least",
        fix,
    )
