"""Continue a text, a token at a time.

logits of the last token → /temperature → the top k → softmax → inverse of the cumulative sum at a coin

The forward runs over one fixed shape (1, T), the text so far and padding after it: attention is
causal, so what follows a position cannot change it. Beyond the model's reach the window slides.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from . import backend, checkpoint
from .errors import LlmpyError
from .gpt2 import GPT2
from .options import SampleOptions
from .preflight import Machine
from .rng import Xorshift64Star
from .runfolder import MODEL_FILE, finished
from .tokenizer import Tokenizer


class Coin(Protocol):
    """A source of numbers in [0, 1)."""

    def uniform(self) -> float:
        """The next one."""


def generate(
    model: GPT2,
    prompt: Sequence[int],
    count: int,
    reach: int,
    coin: Coin,
    temperature: float = 1.0,
    top_k: int = 0,
) -> Iterator[int]:
    """Yield `count` tokens that continue `prompt` (at least one token); each sees the `reach` before it."""
    text = list(prompt)
    T = min(reach, len(text) + count)
    window = np.zeros((1, T), np.int32)
    for _ in range(count):
        seen = text[-T:]
        window[0, : len(seen)] = seen
        token = choose(model.logits(window, len(seen) - 1)[0], coin, temperature, top_k)
        text.append(token)
        yield token


def choose(logits: np.ndarray, coin: Coin, temperature: float, top_k: int) -> int:
    """One token id by its logits (V,); the likeliest if `temperature` is 0. `top_k` 0 means all V."""
    if not np.isfinite(logits).all():
        raise LlmpyError("the model's output is not finite", "its training went wrong: train again")
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # of a tiny temperature: −∞, which is right for all but the likeliest
        scaled = (scaled - scaled.max()) / temperature
    if 0 < top_k < len(scaled):
        # A stable order, so that ties at the border fall the same way everywhere.
        scaled[np.argsort(-scaled, kind="stable")[top_k:]] = -np.inf
    total = np.cumsum(np.exp(scaled))
    return min(int(np.searchsorted(total, coin.uniform() * total[-1], side="right")), len(scaled) - 1)


class TextStream:
    """Tokens in, text out as soon as it is whole: a token may end inside a UTF-8 character."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._held: list[int] = []
        self._shown = 0

    def feed(self, token: int) -> str:
        """The text that `token` completes, perhaps none."""
        self._held.append(token)
        text = self._decode(self._held)
        whole = text.rstrip("\ufffd")
        fresh = whole[self._shown :]
        self._shown = len(whole)
        if len(whole) == len(text):
            self._held, self._shown = [], 0
        return fresh

    def finish(self) -> str:
        """What never became whole, as replacement characters."""
        rest = self._decode(self._held)[self._shown :]
        self._held, self._shown = [], 0
        return rest


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of the prompt; an empty one is the end-of-text token, after which texts begin.

    Raises LlmpyError for a prompt that is no text: bytes of the command line that are not UTF-8.
    """
    return tokenizer.encode(prompt) or [tokenizer.eot]


def sample(options: SampleOptions, write: Callable[[str], object], machine: Machine | None = None) -> None:
    """Continue a prompt with the model of a run; text goes to `write` as it comes, all else to stderr.

    Raises LlmpyError for a run that is missing, damaged or of two minds about its vocabulary.
    """
    header, tokenizer = open_run(options.run)
    prompt = encode_prompt(tokenizer, options.prompt)
    ops = machine or cast(Machine, backend.load("cpu", threads=options.threads, dtype=options.dtype))
    ops.warm_up(lambda line: print(line, file=sys.stderr, flush=True))
    model = GPT2(header.config, ops)
    checkpoint.load_parameters(options.run / MODEL_FILE, model.params)
    model.store_weights()
    stream = TextStream(tokenizer.decode)
    write(options.prompt)
    coin = Xorshift64Star(options.seed)
    for token in generate(
        model, prompt, options.tokens, header.trained_length, coin, options.temperature, options.top_k
    ):
        write(stream.feed(token))
    write(stream.finish() + "\n")


def open_run(run: Path) -> tuple[checkpoint.Header, Tokenizer]:
    """The model's header and the tokenizer of a run folder, which must agree."""
    try:
        there = run.is_dir()
        known = "" if there else ", ".join(map(str, finished()[:5]))
    except OSError as fault:  # a name too long, a folder that may not be entered
        raise LlmpyError(f"cannot read {run}: {fault.strerror}", "check the path and its permissions") from None
    if not there:
        raise LlmpyError(f"no run folder {run}", f"there are: {known}" if known else "train one: llmpy train")
    header = checkpoint.read_header(run / MODEL_FILE)
    path = run / "tokenizer.json"
    if not path.is_file():
        raise LlmpyError(f"{path} is missing", "the run was trained on token ids: there is no text to continue")
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size != header.config.vocab_size:
        raise LlmpyError(
            f"{path} has {tokenizer.vocab_size} tokens but the model {header.config.vocab_size}",
            "restore the tokenizer.json that the model was trained with",
        )
    return header, tokenizer
