"""Chat with a model that was tuned on messages: `llmpy chat RUN`.

The conversation is written as training wrote its own (`data.records`), and cut into tokens at the same places, so that
the model sees what it was tuned on:

    <|endoftext|>system: …⏎⏎user: …⏎⏎assistant: …⏎⏎user: …⏎⏎assistant:␣

An answer ends where the text ends or another role starts. Questions and answers that no longer fit the model's reach
next to an answer are forgotten, the oldest first; the system's message stays.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from ..api import GPT2
from ..backend.machine import Machine
from ..data.encode import encode
from ..data.records import ASSISTANT, conversation
from ..data.tokenizer import Tokenizer
from ..errors import LlmpyError
from ..generate.sampling import choice_of
from ..options.sample_chat import ChatOptions
from ..system.terminal import paint

STOPS = tuple(f"\n\n{role}:" for role in ("system", "user", ASSISTANT))
HELP = "Ctrl-C ends an answer, /reset forgets the conversation, /quit or Ctrl-D ends it"
Message = dict[str, str]


def chat(options: ChatOptions, ask: Callable[[], str] | None = None, machine: Machine | None = None) -> None:
    """Read messages with `ask` until EOFError or /quit, and answer each; Ctrl-C ends only an answer.

    `ask` None: standard input, with a prompt and a line editor where that is a terminal.
    Raises LlmpyError for a model that is missing, corrupt, or without a tokenizer.
    """
    o = options
    model = GPT2.load(str(o.run), threads=o.threads, dtype=o.dtype, machine=machine)
    tokenizer, reach = model.require_tokenizer(), model.trained_length
    model.warm_up()  # now: Ctrl-C, which ends an answer, would break LLVM at work
    room = reach - min(o.tokens, reach // 2)
    system: list[Message] = [] if o.system is None else [{"role": "system", "content": o.system}]
    messages: list[Message] = []
    seed = o.seed
    aside(f"{HELP}; a model that was not tuned on messages continues the text instead of answering")
    for text in said(ask or reader()):
        if text == "/reset":
            messages.clear()
            continue
        messages.append({"role": "user", "content": text})
        try:
            ids = prompt(tokenizer, system, messages, room)
        except (LlmpyError, UnicodeEncodeError) as error:  # the latter: bytes that are not UTF-8
            messages.pop()
            aside(str(error))
            continue
        pieces = model.continued(ids, o.tokens, choice_of(o), STOPS, seed)
        messages.append({"role": ASSISTANT, "content": answer(pieces)})
        seed += 1


def prompt(tokenizer: Tokenizer, system: list[Message], messages: list[Message], room: int) -> list[int]:
    """Return at most `room` tokens, up to where the assistant speaks; `messages` alternate and end with a question.

    Removes the oldest questions with their answers until the rest fits. Raises LlmpyError if the last one does not.
    """
    while True:
        document = conversation("chat", [*system, *messages, {"role": ASSISTANT, "content": ""}])
        text = document.part(0, len(document.text) - 2)  # without the blank line that ends the answer
        ids = [int(i) for block in encode(tokenizer, [text]) for i in block.ids]
        if len(ids) <= room:
            return ids
        if len(messages) == 1:
            what = f"the message has {len(ids):,} tokens with its surroundings, and there is room for {room:,}"
            raise LlmpyError("cli.x", what, "Use fewer words")
        del messages[:2]


def answer(pieces: Iterator[str]) -> str:
    """Print an answer as it comes, up to Ctrl-C, without blank lines at its end; return it."""
    told, blank = "", ""
    with contextlib.suppress(KeyboardInterrupt):
        for piece in pieces:
            text = blank + piece
            whole = text.rstrip()
            blank = text[len(whole) :]
            told += whole
            print(whole, end="", flush=True)
    print(flush=True)
    return told.strip()


def said(ask: Callable[[], str]) -> Iterator[str]:
    """Yield what the user says, and /reset, until the end."""
    while True:
        try:
            text = ask().strip()
        except KeyboardInterrupt:
            text = "/help"
        except EOFError:
            return
        if text == "/quit":
            return
        if text.startswith("/") and text != "/reset":
            aside(HELP)
        elif text:
            yield text


def reader() -> Callable[[], str]:
    """Return how to read a line: at a terminal with a prompt, an editor and a history."""
    if not sys.stdin.isatty():
        return input
    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # noqa: F401 - makes input() an editor
    return lambda: input(paint("> ", "cyan", sys.stdout))


def aside(line: str) -> None:
    """Print what is no part of the conversation."""
    print(paint(line, "dim", sys.stderr), file=sys.stderr, flush=True)
