"""Continue texts, a token at a time.

logits of the last token → repetition penalty → /temperature → top k → top p → min p → softmax
                         → inverse of the cumulative sum at a coin

Keys and values of what was read are kept (`decode`), so a token costs one pass through the weights, for any number
of texts at a time. Beyond the model's reach the window slides by a quarter of it, not at every token: then
three quarters are read again, at the speed of a whole pass, and the next quarter goes on from there. With
`cached` False every token is computed from the whole window; the tokens are the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from .. import backend
from ..backend.machine import Machine
from ..data.tokenizer import Tokenizer
from ..errors import LlmpyError
from ..formats import hub, resolve, tokenizer_of
from ..formats.source import Source
from ..model.arena import memory
from ..model.config import ModelConfig
from ..model.gpt2 import GPT2, PARAMS
from ..options.options import ChatOptions, SampleOptions
from ..rng import Xorshift64Star
from ..run.folder import finished
from ..system.command import command
from ..system.resources import available_memory, crowded
from ..system.words import did_you_mean
from .kv_cache import CACHE, PACKED, PREFILL, ROWS, Decoder

SLIDE = 4  # the window slides by reach / SLIDE


class Coin(Protocol):
    """A source of numbers in [0, 1)."""

    def uniform(self) -> float:
        """The next one."""


@dataclass(frozen=True)
class Choice:
    """How a token is chosen by its logits; the defaults take the model's own distribution.

    temperature 0 takes the likeliest token. Else, of all tokens: the `top_k` likeliest (0: all); of these, the
    fewest that together have the probability `top_p`; of these, those with at least `min_p` times the probability of
    the likeliest. `repetition_penalty` r makes tokens of the text so far less likely: positive logits are divided
    by r, negative ones multiplied (Keskar et al. 2019). top p: Holtzman et al. 2020; min p: Nguyen et al. 2024.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class Token(NamedTuple):
    """A chosen token; `logprob` is the logarithm of its probability by the model alone, NaN if not asked for."""

    id: int
    logprob: float


def window_start(length: int, reach: int) -> int:
    """The first token of a text of `length` that its next token sees: 0 … reach tokens back, in steps of a slide."""
    slide = max(1, reach // SLIDE)
    return 0 if length <= reach else -(-(length - reach) // slide) * slide


class Generation:
    """Texts that are continued side by side. What becomes of one does not depend on the others.

    `prompts` have at least one token each; `count` bounds the tokens added to each; a token sees at most `reach` before
    it. `pack`: see `Decoder`.
    """

    def __init__(
        self,
        model: GPT2,
        prompts: Sequence[Sequence[int]],
        count: int,
        reach: int,
        coins: Sequence[Coin],
        choice: Choice,
        cached: bool = True,
        pack: bool = True,
        logprobs: bool = False,
    ) -> None:
        self.texts = [list(prompt) for prompt in prompts]
        self._model, self._reach, self._coins, self._choice = model, reach, coins, choice
        self._logprobs = logprobs
        self._length = min(reach, max(map(len, self.texts)) + count)
        self._decoder = Decoder(model, len(self.texts), self._length, pack) if cached else None
        self._starts = [-1] * len(self.texts)  # of the window that the cache holds
        self._window = np.zeros((1, self._length), np.int32)

    def step(self, rows: Sequence[int]) -> list[Token]:
        """One token more for each of these texts."""
        tokens = []
        for row, logits in zip(rows, self._logits(rows), strict=True):
            token = choose(logits, self._coins[row], self._choice, self.texts[row])
            self.texts[row].append(token)
            tokens.append(Token(token, logprob(logits, token) if self._logprobs else float("nan")))
        return tokens

    def _logits(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Logits (V,) of what follows each of these texts."""
        starts = {row: window_start(len(self.texts[row]), self._reach) for row in rows}
        if self._decoder is None:
            return [self._whole(self.texts[row][start:]) for row, start in starts.items()]
        going_on = [row for row in rows if self._starts[row] == starts[row]]
        found: dict[int, np.ndarray] = {}
        if going_on:
            last = [self.texts[row][-1] for row in going_on]
            found = dict(zip(going_on, self._decoder.decode(going_on, last), strict=True))
        for row in rows:
            if row not in found:
                self._starts[row] = starts[row]
                found[row] = self._decoder.prefill(row, self.texts[row][starts[row] :])
        return [found[row] for row in rows]

    def _whole(self, seen: Sequence[int]) -> np.ndarray:
        """Logits (V,) by a forward pass over one fixed shape: the text and what follows it, which it cannot see."""
        self._window[0, : len(seen)] = seen
        return self._model.logits(self._window, len(seen) - 1)[0]


def generate(
    model: GPT2,
    prompt: Sequence[int],
    count: int,
    reach: int,
    coin: Coin,
    choice: Choice = Choice(),  # noqa: B008 - frozen
    cached: bool = True,
    pack: bool = True,
) -> Iterator[int]:
    """Yield `count` tokens that continue `prompt` (at least one token); arguments as of `Generation`."""
    generation = Generation(model, [prompt], count, reach, [coin], choice, cached, pack)
    for _ in range(count):
        yield generation.step([0])[0].id


def choose(logits: np.ndarray, coin: Coin, choice: Choice, text: Sequence[int] = ()) -> int:
    """One token id by its logits (V,) and the text so far. Raises LlmpyError for logits that are not finite."""
    if not np.isfinite(logits).all():
        raise LlmpyError("the model's output is not finite", "its training went wrong: train again")
    c = choice
    if c.repetition_penalty != 1:
        seen = np.unique(np.asarray(text, np.int64))
        logits, old = logits.copy(), logits[seen]
        logits[seen] = np.where(old > 0, old / c.repetition_penalty, old * c.repetition_penalty)
    if c.temperature == 0:
        return int(logits.argmax())
    # Candidates stay in the order of their ids, ties at a border go to the first: the same choice everywhere.
    ids = likeliest(logits, c.top_k)
    scaled = logits[ids].astype(np.float64)
    with np.errstate(over="ignore"):  # of a tiny temperature: −∞, which is right for all but the likeliest
        p = np.exp((scaled - scaled.max()) / c.temperature)
    if c.top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= c.top_p * p.sum()]] = 0
    p[p < c.min_p] = 0  # the likeliest has p = 1 here
    total = np.cumsum(p)
    return int(ids[min(int(np.searchsorted(total, coin.uniform() * total[-1], side="right")), np.flatnonzero(p)[-1])])


def likeliest(logits: np.ndarray, k: int) -> np.ndarray:
    """Ids of the k largest of logits (V,), ascending; of equals the first; all of them if k is 0."""
    if not 0 < k < len(logits):
        return np.arange(len(logits))
    border = np.partition(logits, -k)[-k]
    above = np.flatnonzero(logits > border)
    return np.sort(np.append(above, np.flatnonzero(logits == border)[: k - len(above)]))


def logprob(logits: np.ndarray, token: int) -> float:
    """log softmax(logits)[token], in nats."""
    shifted = logits - logits.max()
    return float(shifted[token] - np.log(np.exp(shifted).sum(dtype=np.float64)))


class TextStream:
    """Tokens in, text out as soon as it is whole: a token may end inside a UTF-8 character.

    The text ends before the first of the strings `stop`; what may become one of them is held back. `stopped` tells
    whether that has happened: then no more tokens are needed.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = stop
        self._held: list[int] = []
        self._shown = 0
        self._waiting = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that `token` completes, perhaps none."""
        self._held.append(token)
        text = self._decode(self._held)
        whole = text.rstrip("\ufffd")
        fresh = whole[self._shown :]
        self._shown = len(whole)
        if len(whole) == len(text):
            self._held, self._shown = [], 0
        return self._before_stop(fresh)

    def finish(self) -> str:
        """What never became whole, as replacement characters, and what was held back."""
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
    """Token ids of the prompt; an empty one is the end-of-text token, after which texts begin.

    Raises LlmpyError for a prompt that is no text: bytes of the command line that are not UTF-8.
    """
    return tokenizer.encode(prompt) or [tokenizer.eot]


def sample(options: SampleOptions, write: Callable[[str], object], machine: Machine | None = None) -> None:
    """Continue prompts with a model; text goes to `write`, all else to stderr.

    A text ends before <|endoftext|>, unless `options.ignore_eot`, at `options.stop`, or after `options.tokens`. That of
    a single prompt comes token by token; those of several as each ends, in their order. With `options.json` one JSON
    object comes at the end.
    Raises LlmpyError for a model that is missing, damaged or of two minds about its vocabulary.
    """
    source, tokenizer = open_run(options.run)
    openings = read_prompts(options)
    prompts = [encode_prompt(tokenizer, opening) for opening in openings]
    ops = machine or cast(Machine, backend.load("cpu", threads=options.threads, dtype=options.dtype))
    for line in crowded(ops.threads):
        _aside(line)
    reach = source.trained_length
    check_memory(source.config, ops, len(prompts), min(reach, max(map(len, prompts)) + options.tokens))
    ops.warm_up(_aside, decoding=True)
    model = GPT2(source.config, ops, trainable=False)
    source.fill(model.params)
    # Each text has a generator of its own; the first has that of a text alone.
    coins = [Xorshift64Star((options.seed + i - 1) % ((1 << 64) - 1) + 1) for i in range(len(prompts))]
    generation = Generation(
        model, prompts, options.tokens, reach, coins, choice_of(options), options.cache, logprobs=options.json
    )
    streams = [TextStream(tokenizer.decode, options.stop or ()) for _ in prompts]
    eot = None if options.ignore_eot else tokenizer.eot
    told: list[list[str]] = [[opening] for opening in openings]
    added: list[list[Token]] = [[] for _ in prompts]
    aloud = len(prompts) == 1 and not options.json
    if aloud:
        write(openings[0])
    live = list(range(len(prompts)))
    for _ in range(options.tokens):
        for row, token in zip(live, generation.step(live), strict=True):
            added[row].append(token)
            told[row].append(streams[row].feed(token.id) if token.id != eot else "")
            if aloud:
                write(told[row][-1])
        live = [row for row in live if not streams[row].stopped and added[row][-1].id != eot]
        if not live:
            break
    for row, stream in enumerate(streams):
        told[row].append(stream.finish())
    if options.json:
        write(json.dumps({"texts": [record(*r, eot) for r in zip(prompts, told, added, streams, strict=True)]}) + "\n")
    elif aloud:
        write(told[0][-1] + "\n")
    else:
        write("\n---\n".join("".join(pieces) for pieces in told) + "\n")


def choice_of(options: SampleOptions | ChatOptions) -> Choice:
    """What the command line says of choosing."""
    return Choice(**{f.name: getattr(options, f.name) for f in fields(Choice)})


def record(
    prompt: list[int], told: list[str], added: list[Token], stream: TextStream, eot: int | None
) -> dict[str, Any]:
    """What --json tells of a text: ids, texts, log-probabilities (nats) and why it ended."""
    ended = "stop" if stream.stopped else "eot" if added[-1].id == eot else "length"
    return {
        "prompt": told[0],
        "prompt_tokens": prompt,
        "text": "".join(told[1:]),
        "tokens": [token.id for token in added],
        "logprobs": [token.logprob for token in added],
        "ended": ended,
    }


def read_prompts(options: SampleOptions) -> list[str]:
    """The prompts of the command line, then those of the file, a line each; one empty prompt if there are none."""
    prompts = list(options.prompt or ())
    if options.prompts_file is not None:
        try:
            lines = options.prompts_file.read_text("utf-8").splitlines()
        except OSError as fault:
            raise LlmpyError(f"cannot read {options.prompts_file}: {fault.strerror}", "check the path") from None
        except UnicodeDecodeError:
            raise LlmpyError(f"{options.prompts_file} is not UTF-8", "save it as UTF-8 text") from None
        found = [line for line in lines if line.strip()]
        if not found:
            raise LlmpyError(f"{options.prompts_file} has no prompts", "write one on each line")
        prompts += found
    return prompts or [""]


def check_memory(config: ModelConfig, ops: Machine, B: int, S: int, loaded: bool = False) -> None:
    """Raise LlmpyError if B texts of S positions need more memory than there is; a `loaded` model has its own."""
    stored, wide = ops.dtype.itemsize, ops.wide.itemsize
    parameters = sum((stored if t.decay else wide) * t.size for t in PARAMS(config))
    tables = PACKED(config, ops), CACHE(config, B, S), PREFILL(config, S), ROWS(config, B)
    needed = (0 if loaded else parameters) + sum(memory(table, stored, wide) for table in tables)
    available = available_memory()
    if needed > available:
        raise LlmpyError(
            f"{B} text{'s' * (B > 1)} of {S:,} tokens need about {needed / 1e9:.1f} GB of memory, and "
            f"{available / 1e9:.1f} GB are available",
            "use fewer prompts, fewer --tokens, or close other programs",
        )


def open_run(run: Path) -> tuple[Source, Tokenizer]:
    """A model and its tokenizer: of a run folder, of a file or folder of another format, or of the hub."""
    if str(run) not in hub.NAMES:
        try:
            there = run.exists()
            known = [] if there else [str(folder) for folder in finished()]
        except OSError as fault:  # a name too long, a folder that may not be entered
            raise LlmpyError(f"cannot read {run}: {fault.strerror}", "check the path and its permissions") from None
        if not there:
            others = f"there are: {', '.join(known[:5])}" if known else f"train one: {command('train')}"
            near = did_you_mean(str(run), [*hub.NAMES, *known])
            raise LlmpyError(f"no run folder {run}", f"{near} {others}".lstrip())
    source = resolve(str(run), _aside)
    return source, tokenizer_of(source, _aside)[0]


def _aside(line: str) -> None:
    """What is no part of the text."""
    print(line, file=sys.stderr, flush=True)
