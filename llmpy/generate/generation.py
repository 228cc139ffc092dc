"""Continue texts token by token; open and load the model that does.

With cached keys and values (`kv_cache`) a token costs one pass through the weights, shared by all texts. At the end of
the model's reach the window slides by a quarter of it, not at every token: three quarters are prefilled again.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self, cast

import numpy as np

from .. import backend
from ..backend.machine import Machine
from ..data.tokenizer import Tokenizer
from ..errors import LlmpyError
from ..formats import resolve, tokenizer_of
from ..formats.source import Source
from ..model.arena import memory
from ..model.config import ModelConfig
from ..model.families import adapter_room, language_model, model_memory, trained_table
from ..model.language_model import LanguageModel
from ..system.resources import available_memory, crowded
from ..system.terminal import aside
from ..system.words import count_of, gigabytes
from .kv_cache import Decoder, cache_table, packed_table, prefill_table, rows_table
from .sampling import Choice, Coin, choose, likeliest, logprobs

DEFAULT = Choice()
SLIDE = 4  # the window slides by reach / SLIDE


class Token(NamedTuple):
    """A token and its log-probability under the model alone, NaN unless requested; the likeliest tokens, if requested.

    A sampled token may be missing among the likeliest.
    """

    id: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()


def window_start(length: int, reach: int) -> int:
    """Return the first visible token for a text of `length`: at most `reach` back, a multiple of the slide."""
    slide = max(1, reach // SLIDE)
    return 0 if length <= reach else -(-(length - reach) // slide) * slide


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


class Text:
    """A text to continue: a prompt of at least one token, and its own sampling, stops and length.

    It ends (`ended`) at a token in `ends` ("eot"), where its stream stops ("stop"), or after `count` tokens ("length").
    `logprobs`: record log-probabilities, also of so many likeliest tokens; None: none.
    """

    def __init__(
        self, prompt: Sequence[int], count: int, coin: Coin, choice: Choice = DEFAULT, stream: TextStream | None = None,
        ends: Container[int] = (), logprobs: int | None = None,
    ) -> None:  # fmt: skip
        self.ids, self.added, self.ended = list(prompt), list[Token](), "" if count > 0 else "length"
        self.slot, self.start = -1, -1  # in the decoder, and of the window that it caches there
        self._count, self._coin, self._choice, self._logprobs = count, coin, choice, logprobs
        self._stream, self._ends = stream or TextStream(lambda _: ""), ends

    def add(self, logits: np.ndarray) -> str:
        """Append a token chosen from logits (V,); return the text that it completes. Raises LlmpyError as `choose`."""
        id, n = choose(logits, self._coin, self._choice, self.ids), self._logprobs
        token = Token(id, float("nan"))
        if n is not None:
            first = sorted(likeliest(logits, n).tolist(), key=lambda i: -logits[i]) if n else []
            value, *values = logprobs(logits, [id, *first])
            token = Token(id, value, tuple(zip(first, values, strict=True)))
        self.added.append(token)
        self.ids.append(id)
        piece = "" if id in self._ends else self._stream.feed(id)
        if id in self._ends:
            self.ended = "eot"
        elif len(self.added) == self._count:
            self.ended = "length"
        if self.ended or self._stream.stopped:
            piece += self._stream.finish()
            self.ended = "stop" if self._stream.stopped else self.ended
        return piece


class Generation:
    """Texts continued in one batch, each as if it were alone. They join and leave between tokens.

    There is room for `slots` texts at a time, which see `reach` tokens back; with `length` < `reach` none may grow
    longer than that. `pack`: see `Decoder`. Several threads may generate with one model: a step holds its machine's
    lock. `tokens`: those of the tokenizer, if the model has rows for more.
    """

    def __init__(
        self, model: LanguageModel, slots: int, length: int, reach: int, pack: bool = True, tokens: int | None = None
    ) -> None:
        self.texts: list[Text] = []  # joined
        self.free = list(range(slots))
        self._decoder = Decoder(model, slots, min(length, reach), pack)
        self._reach, self._tokens = reach, tokens

    @classmethod
    def of(
        cls, model: LanguageModel, texts: Sequence[Text], count: int, reach: int, pack: bool = True,
        tokens: int | None = None,
    ) -> Self:  # fmt: skip
        """Return a generation of these texts, which get at most `count` tokens each."""
        found = cls(model, len(texts), max(len(text.ids) for text in texts) + count, reach, pack, tokens)
        for text in texts:
            if not text.ended:
                found.join(text)
        return found

    def join(self, text: Text) -> None:
        """Give a text a free slot."""
        text.slot, text.start = self.free.pop(0), -1
        self.texts.append(text)

    def leave(self, text: Text) -> None:
        """Free the slot of a text."""
        self.texts.remove(text)
        self.free.append(text.slot)

    def step(self) -> list[tuple[Text, str]]:
        """Append one token to each text; return all texts, and what the tokens complete. Those that end leave."""
        return [(text, self.add(text, logits)) for text, logits in self.logits()]

    def add(self, text: Text, logits: np.ndarray) -> str:
        """Return `text.add(logits)`; a text that ends leaves."""
        piece = text.add(logits)
        if text.ended:
            self.leave(text)
        return piece

    def logits(self, prefills: int | None = None) -> list[tuple[Text, np.ndarray]]:
        """Return the next token's logits (V,) for each text, but of those whose window must be cached only so many."""
        starts = {text: window_start(len(text.ids), self._reach) for text in self.texts}
        continued = [text for text in self.texts if text.start == starts[text]]
        others = [text for text in self.texts if text.start != starts[text]][:prefills]
        found: dict[Text, np.ndarray] = {}
        with self._decoder.ops.lock:
            if continued:
                slots, last = [text.slot for text in continued], [text.ids[-1] for text in continued]
                found = dict(zip(continued, self._decoder.decode(slots, last), strict=True))
            for text in others:
                text.start = starts[text]
                found[text] = self._decoder.prefill(text.slot, text.ids[text.start :])
        return [(text, found[text][: self._tokens]) for text in self.texts if text in found]


def generate(
    model: LanguageModel, prompt: Sequence[int], count: int, reach: int, coin: Coin, choice: Choice = DEFAULT,
    pack: bool = True, tokens: int | None = None,
) -> Iterator[int]:  # fmt: skip
    """Yield `count` tokens that continue `prompt`; arguments as in `Text` and `Generation`."""
    text = Text(prompt, count, coin, choice)
    generation = Generation.of(model, [text], count, reach, pack, tokens)
    while not text.ended:
        generation.step()
        yield text.ids[-1]


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
        hint = "Use fewer or shorter texts, or close other programs"
        raise LlmpyError("memory.insufficient", f"not enough memory for {what}", hint)


def load_model(
    source: Source, B: int, S: int, *, threads: int | None, dtype: str, machine: Machine | None = None
) -> LanguageModel:
    """Load a model to generate B texts of S positions, with its kernels compiled. Raises LlmpyError."""
    ops = machine or cast(Machine, backend.load("cpu", threads=threads, dtype=dtype))
    for line in crowded(ops.threads):
        aside(line)
    check_memory(source.config, ops, B, S)
    ops.warm_up(aside, decoding=True, kinds=source.config.kinds)
    model = language_model(source.config, ops, trainable=False)
    source.load_into(model)
    return model


def open_run(run: Path) -> tuple[Source, Tokenizer]:
    """Open a model and its tokenizer: a run, a file or folder of another format, or a hub model."""
    source = resolve(run.as_posix(), aside)
    return source, tokenizer_of(source, aside)[0]
