"""Continue texts token by token.

With cached keys and values (`kv_cache`) a token costs one pass through the weights, shared by all texts. At the end of
the model's reach the window slides by a quarter of it, not at every token: three quarters are prefilled again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..backend.machine import Machine
from ..data.tokenizer import Tokenizer
from ..errors import LlmpyError, unreadable
from ..formats import hub, resolve, tokenizer_of
from ..formats.source import Source
from ..model.arena import memory
from ..model.config import ModelConfig
from ..model.families import adapter_room, model_memory, trained_table
from ..model.language_model import LanguageModel
from ..run.folder import finished
from ..system.command import command
from ..system.resources import available_memory
from ..system.terminal import aside
from ..system.words import count_of, did_you_mean, gigabytes
from .kv_cache import Decoder, cache_table, packed_table, prefill_table, rows_table
from .sampling import Choice, Coin, choose, logprob

DEFAULT = Choice()
SLIDE = 4  # the window slides by reach / SLIDE


class Token(NamedTuple):
    """A sampled token and its log-probability under the model alone, NaN unless requested."""

    id: int
    logprob: float


def window_start(length: int, reach: int) -> int:
    """Return the first visible token for a text of `length`: at most `reach` back, a multiple of the slide."""
    slide = max(1, reach // SLIDE)
    return 0 if length <= reach else -(-(length - reach) // slide) * slide


class Generation:
    """Texts continued in one batch, each independent of the others.

    Each prompt has at least one token and gets at most `count` more. Tokens see `reach` back. `pack`: see `Decoder`.
    Several threads may generate with one model: a step holds its machine's lock. `tokens`: those of the tokenizer, if
    the model has rows for more.
    """

    def __init__(
        self, model: LanguageModel, prompts: Sequence[Sequence[int]], count: int, reach: int, coins: Sequence[Coin],
        choice: Choice, pack: bool = True, logprobs: bool = False, tokens: int | None = None,
    ) -> None:  # fmt: skip
        self._tokens = tokens
        self.texts = [list(prompt) for prompt in prompts]
        self._reach, self._coins, self._choice, self._logprobs = reach, coins, choice, logprobs
        length = min(reach, max(map(len, self.texts)) + count)
        self._decoder = Decoder(model, len(self.texts), length, pack)
        self._starts = [-1] * len(self.texts)  # of the cached window

    def step(self, rows: Sequence[int]) -> list[Token]:
        """Append one token to each of these texts and return the tokens."""
        tokens = []
        with self._decoder.ops.lock:
            found = self._logits(rows)
        for row, logits in zip(rows, found, strict=True):
            logits = logits[: self._tokens]
            token = choose(logits, self._coins[row], self._choice, self.texts[row])
            self.texts[row].append(token)
            tokens.append(Token(token, logprob(logits, token) if self._logprobs else float("nan")))
        return tokens

    def _logits(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Return the next token's logits (V,) for each of these texts."""
        starts = {row: window_start(len(self.texts[row]), self._reach) for row in rows}
        found: dict[int, np.ndarray] = {}
        if continued := [row for row in rows if self._starts[row] == starts[row]]:
            last = [self.texts[row][-1] for row in continued]
            found = dict(zip(continued, self._decoder.decode(continued, last), strict=True))
        for row in rows:
            if row not in found:
                self._starts[row] = starts[row]
                found[row] = self._decoder.prefill(row, self.texts[row][starts[row] :])
        return [found[row] for row in rows]


def generate(
    model: LanguageModel, prompt: Sequence[int], count: int, reach: int, coin: Coin, choice: Choice = DEFAULT,
    pack: bool = True, tokens: int | None = None,
) -> Iterator[int]:  # fmt: skip
    """Yield `count` tokens that continue `prompt`; arguments as in `Generation`."""
    generation = Generation(model, [prompt], count, reach, [coin], choice, pack, tokens=tokens)
    for _ in range(count):
        yield generation.step([0])[0].id


class TextStream:
    """A decoder of tokens to text that emits only complete UTF-8 characters.

    Text ends before the first stop string, which sets `stopped`. A possible start of one is held back.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = stop
        self._held: list[int] = []
        self._shown = 0
        self._waiting = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """Return the text that `token` completes, possibly empty."""
        self._held.append(token)
        text = self._decode(self._held)
        whole = text.rstrip("\ufffd")
        fresh = whole[self._shown :]
        self._shown = len(whole)
        if len(whole) == len(text):
            self._held, self._shown = [], 0
        return self._before_stop(fresh)

    def finish(self) -> str:
        """Return the held-back text, incomplete characters as U+FFFD."""
        rest = self._before_stop(self._decode(self._held)[self._shown :]) + self._waiting
        self._held, self._shown, self._waiting = [], 0, ""
        return rest

    def _before_stop(self, fresh: str) -> str:
        if self.stopped:
            return ""
        text = self._waiting + fresh
        ends = [place for place in map(text.find, self._stop) if place >= 0]
        if ends:
            self.stopped, self._waiting = True, ""
            return text[: min(ends)]
        held = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._waiting = text[len(text) - held :]
        return text[: len(text) - held]


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the prompt's ids after the tokenizer's prefix, end-of-text if empty. LlmpyError for invalid UTF-8."""
    return [*tokenizer.prefix, *tokenizer.encode(prompt)] or [tokenizer.eot]


def check_memory(config: ModelConfig, ops: Machine, B: int, S: int, loaded: bool = False) -> None:
    """Raise LlmpyError if B texts of S positions, and the model unless `loaded`, exceed the available memory."""
    stored, wide = ops.dtype.itemsize, ops.wide.itemsize
    parameters = model_memory(config, ops)
    if config.lora is not None:
        parameters += (stored + wide) * sum(t.size for t in trained_table(config)) + stored * adapter_room(config, S)
    tables = packed_table(config, ops), cache_table(config, B, S), prefill_table(config, S), rows_table(config, B)
    needed = (0 if loaded else parameters) + sum(memory(table, stored, wide) for table in tables)
    available = available_memory()
    if needed > available:
        what = f"{count_of(B, 'text')} of {S:,} tokens: {gigabytes(needed)} required, {gigabytes(available)} available"
        hint = "Use fewer prompts or --tokens, or close other programs"
        raise LlmpyError("memory.insufficient", f"not enough memory for {what}", hint)


def open_run(run: Path) -> tuple[Source, Tokenizer]:
    """Open a model and its tokenizer: a run, a file or folder of another format, or a hub model."""
    if not hub.is_name(run.as_posix()):
        try:
            there = run.exists()
            known = [] if there else [str(folder) for folder in finished()]
        except OSError as error:  # a name too long, a folder without permission
            raise unreadable(run, error) from None
        if not there:
            others = f"Finished runs: {', '.join(known[:5])}" if known else f"Train one: {command('train')}"
            near = did_you_mean(str(run), [*hub.NAMES, *known])
            raise LlmpyError("model.missing", f"no run or model {run}", f"{near} {others}".lstrip())
    source = resolve(run.as_posix(), aside)
    return source, tokenizer_of(source, aside)[0]
