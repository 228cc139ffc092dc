"""Talk with a model that was tuned on messages: `llmpy chat RUN`.

The talk is written as training wrote its conversations (`data.records`), and cut into tokens at the same places, so
that the model sees what it was tuned on:

    <|endoftext|>system: …⏎⏎user: …⏎⏎assistant: …⏎⏎user: …⏎⏎assistant:␣

and an answer ends where the text ends or another role begins. What no longer fits the model's reach beside an answer
is forgotten, the oldest messages first; the system's stays.

No model file says what it was tuned on, but the tokens of a run do: where an answer begins in them, after
"assistant: ", their mask begins to count. Who talks with a model that has none such is told what to expect.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ..api import GPT2
from ..backend.machine import Machine
from ..data.encode import encode
from ..data.records import ASSISTANT, conversation, holds_answers
from ..data.shards import mask_path, open_shard
from ..data.tokenizer import Tokenizer
from ..errors import LlmpyError
from ..formats import hub
from ..generate.sampling import choice_of
from ..options.sample_chat import ChatOptions
from ..options.train import TrainOptions
from ..run.folder import CONFIG_FILE, own_tokens, read_config
from ..system.command import command
from ..system.terminal import paint
from ..system.words import did_you_mean

STOPS = tuple(f"\n\n{role}:" for role in ("system", "user", ASSISTANT))
HELP = {
    "/reset": "forget the talk so far",
    "/quit": "end (or press Ctrl-D)",
    "/help": "tell this",
}
SEEDS = (1 << 64) - 1
Message = dict[str, str]


class Talk:
    """The messages so far, and the tokens that a model continues."""

    def __init__(self, tokenizer: Tokenizer, reach: int, system: str | None = None) -> None:
        """`reach`: tokens that a model sees; half of it at least is left for the talk."""
        self._tokenizer, self._reach = tokenizer, reach
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[Message] = []

    def reset(self) -> None:
        """Forget everything but what the system said."""
        self.messages.clear()

    def say(self, role: str, content: str) -> None:
        """Add a message."""
        self.messages.append({"role": role, "content": content})

    def prompt(self, answer: int) -> list[int]:
        """Tokens up to where the assistant speaks, so few that `answer` more are seen with them.

        Messages that have no room are forgotten, the oldest first. Raises LlmpyError if the last alone has none: it is
        taken back.
        """
        room = self._reach - min(answer, self._reach // 2)
        while len(ids := self._tokens()) > room:
            if len(self.messages) == 1:
                self.messages.pop()
                raise LlmpyError(
                    f"the message has {len(ids):,} tokens with what surrounds it, and the model sees {room:,} beside "
                    "its answer",
                    "say it in fewer words",
                )
            del self.messages[0]
            while len(self.messages) > 1 and self.messages[0]["role"] == "assistant":
                del self.messages[0]  # an answer without its question
        return ids

    def _tokens(self) -> list[int]:
        """As training has them: the document that an empty answer would make, without the blank line that ends it."""
        document = conversation("chat", [*self._system, *self.messages, {"role": "assistant", "content": ""}])
        blocks = encode(self._tokenizer, [document.part(0, len(document.text) - 2)])
        return [int(i) for block in blocks for i in block.ids]


def chat(options: ChatOptions, ask: Callable[[], str] | None = None, machine: Machine | None = None) -> None:
    """Read messages with `ask` until EOFError or /quit, and answer each; Ctrl-C ends an answer, not the talk.

    `ask` None: standard input, with a prompt and a line editor where that is a terminal.
    Raises LlmpyError for a model that is missing, damaged, or without a tokenizer.
    """
    o = options
    model = GPT2.load(str(o.run), threads=o.threads, dtype=o.dtype, machine=machine)
    tokenizer = model.require_tokenizer()
    model.warm_up()  # now: Ctrl-C, which ends an answer, would break LLVM at work
    talk = Talk(tokenizer, model.trained_length, o.system)
    if not tuned(o.run, tokenizer):
        aside(
            f"note: nothing shows that {o.run} was tuned on messages; a model that was not goes on with the text "
            f"instead of answering. Tune it on records of messages, {command('train', '--init', o.run)} --data "
            f"FILE.jsonl, or let it continue a text, {command('sample', o.run)} --prompt …"
        )
    seed = o.seed
    ask = ask or reader()
    aside("answers end at Ctrl-C; /reset forgets, /quit ends")
    while (text := next_message(ask, talk)) is not None:
        talk.say("user", text)
        try:
            ids = talk.prompt(o.tokens)
        except LlmpyError as fault:
            aside(str(fault))
            continue
        except UnicodeEncodeError:
            aside("the message holds bytes that are not UTF-8: type it again, or set a UTF-8 locale (LANG=C.UTF-8)")
            talk.messages.pop()
            continue
        pieces = model.continued(ids, o.tokens, choice_of(o), STOPS, seed)
        talk.say("assistant", answer(pieces))
        seed = seed % SEEDS + 1


def tuned(model: Path, tokenizer: Tokenizer) -> bool:
    """Whether a model is one of a run whose training tokens are there and hold conversations."""
    if str(model) in hub.NAMES:
        return False
    here = model.absolute()
    try:
        folder = next((p for p in (here, *here.parents) if (p / CONFIG_FILE).is_file()), here)
        paths = own_tokens(folder) or TrainOptions.from_record(read_config(folder / CONFIG_FILE)).data or ()
        masks = [m for path in paths for m in (sorted(path.rglob("*.mask")) if path.is_dir() else [mask_path(path)])]
        shards = (open_shard(m.with_suffix(".bin"), tokenizer.vocab_size) for m in masks if m.is_file())
        return any(holds_answers(shard, tokenizer) for shard in shards)
    except (LlmpyError, OSError):  # no run, or its data are out of reach: then it is not known
        return False


def answer(pieces: Iterator[str]) -> str:
    """Print an answer as it comes, up to Ctrl-C, without blank lines at its end; what was said of it."""
    said, blank = "", ""
    with contextlib.suppress(KeyboardInterrupt):
        for piece in pieces:
            text = blank + piece
            whole = text.rstrip()
            blank = text[len(whole) :]
            said += whole
            print(whole, end="", flush=True)
    print(flush=True)
    return said.strip()


def next_message(ask: Callable[[], str], talk: Talk) -> str | None:
    """What the user says next, commands carried out; None at the end."""
    while True:
        try:
            text = ask().strip()
        except KeyboardInterrupt:
            aside("\nto end: /quit or Ctrl-D")
            continue
        except EOFError:
            return None
        if text == "/quit":
            return None
        if text == "/reset":
            talk.reset()
            aside("the talk is forgotten")
        elif text == "/help":
            for command, what in HELP.items():
                aside(f"  {command:<8} {what}")
        elif text.startswith("/"):
            aside(f"no command {text.split()[0]}: {did_you_mean(text, HELP) or 'use ' + ', '.join(HELP)}")
        elif text:
            return text


def reader() -> Callable[[], str]:
    """How to read a line: at a terminal with a prompt, an editor and a history, else just so."""
    if not sys.stdin.isatty():
        return input
    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # noqa: F401 - makes input() an editor
    return lambda: input(paint("> ", "cyan", sys.stdout))


def aside(line: str) -> None:
    """What is no part of the talk."""
    print(paint(line, "dim", sys.stderr), file=sys.stderr, flush=True)
