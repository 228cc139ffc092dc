"""Chat with a model fine-tuned on messages: `llmpy chat RUN`.

The conversation is formatted and tokenized as in training (`data.records`):

    <|endoftext|>system: …⏎⏎user: …⏎⏎assistant: …⏎⏎user: …⏎⏎assistant:␣

or by the model's chat template, if it has one. An answer ends at a token that ends answers or texts, or, without a
template, where another role starts. When the conversation and an answer exceed the
model's trained length, the oldest questions and answers are dropped; the system message stays.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator

from ..api import Model
from ..backend.machine import Machine
from ..data.encode import prompt_ids
from ..data.record_fields import ASSISTANT
from ..data.tokenizer import Tokenizer
from ..errors import LlmpyError
from ..generate.sampling import choice_of
from ..options.sample_chat import ChatOptions
from ..system.terminal import aside, generated, paint

STOPS = tuple(f"\n\n{role}:" for role in ("system", "user", ASSISTANT))
HELP = "Ctrl-C stops an answer, /reset clears the conversation, /quit or Ctrl-D exits"
Message = dict[str, str]


def chat(options: ChatOptions, ask: Callable[[], str] | None = None, machine: Machine | None = None) -> None:
    """Read messages with `ask` until EOFError or /quit, and answer each; Ctrl-C stops only an answer.

    `ask` defaults to standard input, with a prompt and a line editor if that is a terminal.
    Raises LlmpyError if the model is missing, corrupt or without a tokenizer.
    """
    o = options
    model = Model.load(str(o.run), threads=o.threads, dtype=o.dtype, machine=machine, trainable=False)
    tokenizer, reach = model.require_tokenizer(), model.trained_length
    model.warm_up()  # before the first answer: Ctrl-C would break LLVM during compilation
    room = reach - min(o.tokens, reach // 2)
    system: list[Message] = [] if o.system is None else [{"role": "system", "content": o.system}]
    messages: list[Message] = []
    seed = o.seed
    untrained = ". A model not fine-tuned on messages continues the text instead of answering"
    aside(HELP + untrained * (tokenizer.template is None), "dim")
    for text in questions(ask or reader()):
        if text == "/reset":
            messages.clear()
            continue
        messages.append({"role": "user", "content": text})
        try:
            ids = prompt(tokenizer, system, messages, room)
        except LlmpyError as error:
            messages.pop()
            aside(str(error), "dim")
            continue
        pieces = model.continued(ids, o.tokens, choice_of(o), () if tokenizer.template else STOPS, seed)
        messages.append({"role": ASSISTANT, "content": answer(pieces)})
        seed += 1


def prompt(tokenizer: Tokenizer, system: list[Message], messages: list[Message], room: int) -> list[int]:
    """Return at most `room` tokens, ending where the assistant starts; `messages` alternate and end with a question.

    Remove the oldest questions and answers from `messages` until the rest fits.
    Raises LlmpyError if the last question alone does not fit.
    """
    while True:
        ids = prompt_ids("the conversation", [*system, *messages], tokenizer)
        if len(ids) <= room:
            return ids
        if len(messages) == 1:
            what = f"the message takes {len(ids):,} tokens with its role markers, more than the limit of {room:,}"
            raise LlmpyError("chat.message-too-long", what, "Write a shorter message")
        del messages[:2]


def answer(pieces: Iterator[str]) -> str:
    """Print an answer as it is generated, until Ctrl-C, without trailing blank lines; return it stripped."""
    printed, blank = "", ""
    with contextlib.suppress(KeyboardInterrupt):
        for piece in pieces:
            text = blank + piece
            whole = text.rstrip()
            blank = text[len(whole) :]
            printed += whole
            print(generated(whole), end="", flush=True)
    print(flush=True)
    return printed.strip()


def questions(ask: Callable[[], str]) -> Iterator[str]:
    """Yield the user's messages and /reset, until /quit or EOFError."""
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
            aside(HELP, "dim")
        elif text:
            yield text


def reader() -> Callable[[], str]:
    """Return a function that reads a line; in a terminal it has a prompt, an editor and a history."""
    if not sys.stdin.isatty():
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape", newline="\n")
        return input
    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # noqa: F401 - makes input() an editor
    return lambda: input(paint("> ", "cyan", sys.stdout))
