"""Samples during training, always with the same random numbers, so that they are comparable."""

from __future__ import annotations

import itertools

from ..generate.generation import TextStream, generate
from ..generate.sampling import Choice
from ..model.language_model import LanguageModel
from ..options.train import TrainOptions
from ..rng import Xorshift64Star
from ..run.journal import Journal
from .signals import StopSignals
from .training_data import TrainingData

SEED = 1337  # llm.c's
CHOICE = Choice(temperature=0.5, top_k=50)  # the defaults of `llmpy sample`


def write_sample(
    model: LanguageModel, data: TrainingData, options: TrainOptions, step: int, journal: Journal, stop: StopSignals
) -> None:
    """Print a sample that continues the prompt; a stop signal ends it."""
    o, stream = options, TextStream(data.tokenizer.continuation if data.tokenizer else token_ids)
    # Packed matrices would take memory that training needs, for little gain.
    about = o.sample_tokens, o.sequence_length, Xorshift64Star(SEED), CHOICE
    tokens = generate(model, data.prompt, *about, pack=False, tokens=data.train.vocab_size)
    ends = data.tokenizer.stops if data.tokenizer and data.holds_answers else ()
    until_asked = itertools.takewhile(lambda token: not stop.asked and token not in ends, tokens)
    text = (data.opening + "".join(map(stream.feed, until_asked)) + stream.finish()).strip("\n")
    for line in (f"--- sample at step {step}", *text.split("\n"), "---"):
        journal.log(line)
    journal.record_sample(f"--- step {step}", text)


def token_ids(ids: list[int]) -> str:
    """Return ids as text, for lack of a tokenizer."""
    return "".join(f"{i} " for i in ids)
