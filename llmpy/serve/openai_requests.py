"""Requests of OpenAI's interface, checked: every parameter has its meaning here, or is refused by name.

https://platform.openai.com/docs/api-reference (chat completions, completions), and `top_k`, `min_p` and
`repetition_penalty` as in `llmpy sample`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..data.encode import prompt_ids
from ..data.tokenizer import Tokenizer
from ..errors import LlmpyError
from ..generate.generation import Text, TextStream, encode_prompt
from ..generate.sampling import Choice
from ..rng import Xorshift64Star

LONGEST_STOP, MOST_STOPS = 200, 4
MOST_LIKELIEST = 20
COMPLETION_TOKENS = 16  # OpenAI's default
IGNORED = {"user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"}
NEUTRAL = {  # JSON of the values without an effect
    "presence_penalty": ("0", "0.0"), "frequency_penalty": ("0", "0.0"), "logit_bias": ("{}",), "best_of": ("1",),
    "echo": ("false",), "suffix": ('""',), "store": ("false",),
    "tools": ("[]",), "tool_choice": ('"none"', '"auto"'), "functions": ("[]",),
    "parallel_tool_calls": ("true", "false"), "response_format": ('{"type": "text"}',), "modalities": ('["text"]',),
}  # fmt: skip


class Refusal(Exception):
    """An answer that is an error: HTTP status, OpenAI's code, and the invalid parameter."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.status = status
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Served:
    """What requests are checked against: the model's name, its tokenizer, and limits."""

    name: str
    tokenizer: Tokenizer
    tokens: int  # of the tokenizer
    length: int  # tokens of a text
    characters: int  # more are too many tokens: not worth a tokenizer's time, seconds for a word of a million
    slides: bool  # beyond `length` the window slides, else the text must end
    most_texts: int  # of a request


@dataclass(frozen=True)
class Job:
    """A checked request."""

    chat: bool
    texts: list[Text]
    prompt_tokens: int
    logprobs: bool
    stream: bool
    usage: bool


class Fields:
    """The parameters of a request. null is absence."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, default: Any, expected: str, valid: Callable[[Any], bool]) -> Any:
        """Return a parameter, or its default. Raises Refusal unless it is valid."""
        value = self.left.pop(name, default)
        if value is not default and not valid(value):
            raise Refusal(f"{name} must be {expected}", name, "invalid_value")
        return value

    def flag(self, name: str) -> bool:
        return bool(self.take(name, False, "true or false", lambda x: isinstance(x, bool)))

    def whole(self, name: str, default: int | None, low: int, high: int) -> Any:
        expected = f"an integer from {low} to {high}"
        return self.take(name, default, expected, lambda x: type(x) is int and low <= x <= high)

    def number(self, name: str, default: float, low: float, high: float, above: bool = False) -> float:
        expected = f"a number {'above' if above else 'from'} {low}{', at most' if above else ' to'} {high}"
        valid = lambda x: type(x) in (int, float) and low <= x <= high and not (above and x == low)  # noqa: E731
        return float(self.take(name, default, expected, valid))

    def end(self) -> None:
        """Raise Refusal for a parameter that is left, unless it means nothing."""
        for name, value in self.left.items():
            if name in IGNORED or name in NEUTRAL and json.dumps(value) in NEUTRAL[name]:
                continue
            what = "this value of" if name in NEUTRAL else "the parameter"
            raise Refusal(f"{what} {name[:60]} is not supported", name[:60], "unsupported_parameter")


def parse(data: bytes, chat: bool, served: Served) -> Job:
    """Return the job of a request's body. Raises Refusal."""
    try:
        body = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is not JSON: {str(error)[:100]}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise Refusal("the body is not an object", code="invalid_json")
    try:
        return _parse(Fields(body), chat, served)
    except LlmpyError as error:
        raise Refusal(error.message, "messages" if chat else "prompt", error.code) from None
    except RecursionError:
        raise Refusal("the body is nested too deeply", code="invalid_json") from None


def _parse(f: Fields, chat: bool, served: Served) -> Job:
    name = f.take("model", "", f"{served.name!r}, the model served here", lambda x: isinstance(x, str))
    if name != served.name:
        what = f"there is no model {name[:60]!r}, only {served.name!r}" if name else f"pass model: {served.name!r}"
        raise Refusal(what, "model", "model_not_found", 404 if name else 400)
    given = "messages" if chat else "prompt"
    value = f.left.get(given, "")
    several = not chat and isinstance(value, list) and not all(type(i) is int for i in value)
    parts = value if several else [value]
    if (size := max(len(json.dumps(part, ensure_ascii=False)) for part in parts)) > served.characters:
        raise Refusal(f"{size:,} characters exceed {served.length:,} tokens", given, "context_length_exceeded")
    n = f.whole("n", 1, 1, served.most_texts)
    if f.left.get("best_of") == n:
        del f.left["best_of"]
    if (count := n * len(parts)) > served.most_texts:
        raise Refusal(f"{count} texts in one request, of at most {served.most_texts}", given, "too_many_texts")
    prompts = [_chat(f, served)] if chat else [_prompt(part, served) for part in parts]
    f.left.pop(given, None)
    limits = [f.whole(x, None, 1, 1 << 31) for x in ("max_tokens", "max_completion_tokens")[: 1 + chat]]
    most = min((limit for limit in limits if limit is not None), default=None)
    choice = Choice(
        f.number("temperature", 1, 0, 2), f.whole("top_k", 0, 0, 1 << 31), f.number("top_p", 1, 0, 1, above=True),
        f.number("min_p", 0, 0, 1), f.number("repetition_penalty", 1, 0, 10, above=True),
    )  # fmt: skip
    stop = f.take("stop", [], f"a text, or a list of up to {MOST_STOPS}, of 1 to {LONGEST_STOP} characters", _stops)
    # Seeds of llmpy sample mean the same; the others of 64 bits are moved into its range.
    seed = f.whole("seed", None, -(1 << 63), (1 << 64) - 1)
    seed = secrets.randbits(63) if seed is None else seed
    if chat:
        logprobs = f.flag("logprobs")
        likeliest = f.whole("top_logprobs", 0, 0, MOST_LIKELIEST)
        if likeliest and not logprobs:
            raise Refusal("top_logprobs needs logprobs", "top_logprobs", "invalid_value")
        shown = likeliest if logprobs else None
    else:
        shown = f.whole("logprobs", None, 0, MOST_LIKELIEST)
    stream = f.flag("stream")
    settings = Fields(f.take("stream_options", {}, "an object, with stream", lambda x: isinstance(x, dict) and stream))
    usage = settings.flag("include_usage")
    settings.left.pop("include_obfuscation", None)  # pads answers against guesses from their length
    settings.end()
    f.end()
    texts: list[Text] = []
    for ids in prompts:
        room = served.length - len(ids)
        if room < 1 or not served.slides and (most or 1) > room:
            what = f"{len(ids):,} tokens in the prompt and {most or 1:,} more exceed {served.length:,}"
            raise Refusal(what, given, "context_length_exceeded")
        count = most or (room if chat else min(room, COMPLETION_TOKENS))
        for _ in range(n):
            coin = Xorshift64Star((seed + len(texts) - 1) % ((1 << 64) - 1) + 1)
            pieces = TextStream(served.tokenizer.continuation, stop if isinstance(stop, list) else [stop])
            texts.append(Text(ids, count, coin, choice, pieces, served.tokenizer.stops, shown))
    return Job(chat, texts, sum(map(len, prompts)), shown is not None, stream, usage)


def _chat(f: Fields, served: Served) -> list[int]:
    if served.tokenizer.template is None:
        what = f"the model {served.name!r} has no chat template. Use /v1/completions"
        raise Refusal(what, "messages", "no_chat_template")
    ignored: set[str] = set()
    messages = f.take("messages", None, "a list of messages", lambda x: isinstance(x, list)) or []
    if not messages:
        raise Refusal("messages is missing or empty", "messages", "missing_required_parameter")
    ids = prompt_ids("messages", messages, served.tokenizer, ignored)
    if ignored:
        what = f"the field {min(ignored)[:60]} of a message is not supported"
        raise Refusal(what, "messages", "unsupported_parameter")
    return ids


def _prompt(given: Any, served: Served) -> list[int]:
    """Return the tokens of a text, or the tokens given."""
    if isinstance(given, str):
        return encode_prompt(served.tokenizer, given)
    if isinstance(given, list) and given and all(type(i) is int and 0 <= i < served.tokens for i in given):
        return given
    what = f"prompt must be a text, token ids from 0 to {served.tokens - 1}, or a list of these"
    raise Refusal(what, "prompt", "invalid_value")


def _stops(x: Any) -> bool:
    texts = x if isinstance(x, list) else [x]
    return len(texts) <= MOST_STOPS and all(isinstance(t, str) and 0 < len(t) <= LONGEST_STOP for t in texts)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
