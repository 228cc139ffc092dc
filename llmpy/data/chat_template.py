"""Messages → the text of a model's own chat template, and which characters of it count in the loss.

A template is a program in Jinja, written for `transformers`, whose environment it gets here (its version 5.24,
`chat_template_utils.py`): sandboxed, with `raise_exception`, `strftime_now`, a `tojson` without HTML escapes, loop
controls and `{% generation %}`. Special tokens that the template writes are tokens. Their spellings in messages stay
text: private characters stand for them while the template runs.

What counts: the `{% generation %}` blocks, else what a message adds to the rendering of the messages before it, up to
its end-of-turn token. Some templates rewrite earlier answers (Qwen3 drops their thinking). Their conversations become
one text for each answer, which ends with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import LlmpyError

if TYPE_CHECKING:
    import jinja2

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters around what {% generation %} encloses
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
PRIVATE = range(0xF0000, 0xFFFFE)  # characters without a meaning
FIX = 'Remove these records, or train on {"text": …} that is formatted already'
Spans = tuple[tuple[int, int], ...]  # [start, stop) in characters, ascending
Message = dict[str, Any]


class Rendering(NamedTuple):
    """A text, which characters count (None: all), and in which of them special tokens are text (True: all)."""

    text: str
    counted: Spans | None
    literal: Spans | bool = True


class ChatTemplate:
    """A template, with the tokenizer's names of tokens (bos_token …) and its special tokens.

    `apart`: returns whether text between special tokens can be encoded separately, as literal spans require.
    """

    def __init__(self, source: str, names: Mapping[str, str], special: Iterable[str], apart: Callable[[], bool]):
        self.source, self._names, self._apart = source, names, apart
        spelled = map(re.escape, sorted([*special, OPEN, CLOSE], key=len, reverse=True))
        self._special = re.compile("|".join(spelled))

    def uses(self, field: str) -> bool:
        """Return whether the template reads a field of messages or records."""
        return field in self.source

    def prompt(self, where: str, messages: Sequence[Message]) -> Rendering:
        """Return the text up to the assistant's next answer. Raises LlmpyError as `conversation`."""
        (hidden, _), letters = self._hidden(where, messages, None)
        return self._shown(_blocks(self._render(where, hidden, None, True))[1], (), letters)

    def conversation(
        self, where: str, messages: Sequence[Message], counted: Sequence[int], tools: list[Any] | None = None
    ) -> list[Rendering]:
        """Return the text in which the messages numbered `counted` (from 0) count, or one text for each of these.

        Raises LlmpyError, naming `where`, if the template refuses the messages, if the characters
        that a message adds cannot be located, and if the spelling of a special token cannot be kept apart.
        """
        (messages, tools), letters = self._hidden(where, messages, tools)
        render = partial(self._render, where)
        whole = render(messages, tools)
        if GENERATION.search(self.source):
            said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            blocks, text = _blocks(whole)
            if said != [*counted]:
                if len(said) != len(blocks) or not {*counted} <= {*said}:
                    what = f"{where} has flags of messages that the {{% generation %}} blocks cannot follow"
                    raise LlmpyError("record.unsupported", what, FIX)
                blocks = [block for i, block in zip(said, blocks, strict=True) if i in counted]
            return [self._shown(text, blocks, letters)]
        parts = []
        for i in counted:
            if messages[i]["role"] == "assistant":
                before = render(messages[:i], tools, True)
            else:  # up to its content
                before = render([*messages[:i], {**messages[i], "content": OPEN}], tools).partition(OPEN)[0]
            through = whole if i == len(messages) - 1 else render(messages[: i + 1], tools)
            start = len(before)
            if not through.startswith(before):
                what = f"{where}: the chat template changes what precedes message {i + 1} once it is there"
                raise LlmpyError("template.inconsistent", what, FIX)
            parts.append((through, (start, self._end(through, start))))
        if all(whole.startswith(through) for through, _ in parts):
            return [self._shown(whole, [span for _, span in parts], letters)]
        return [self._shown(through, [span], letters) for through, span in parts]

    @cached_property
    def end_of_turn(self) -> str | None:
        """The special token that ends an answer, if any."""
        user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        try:
            (text, spans, _), *_ = self.conversation("a probe", [user, answer], [1])
        except LlmpyError:
            return None
        found = self._special.findall(text[spans[0][0] : spans[0][1]]) if spans else []
        return found[-1] if found else None

    def _end(self, text: str, start: int) -> int:
        """Return where an answer from `start` on ends: after the last special token, if only blanks follow it."""
        ends = [found.end() for found in self._special.finditer(text, start)]
        return ends[-1] if ends and not text[ends[-1] :].strip() else len(text)

    def _hidden(self, where: str, messages: Any, tools: Any) -> tuple[Any, dict[int, str]]:
        """Return messages and tools with a character for each special token's spelling, and character → spelling."""
        texts = json.dumps([messages, tools], ensure_ascii=False, default=str)
        spelled = sorted({*self._special.findall(texts)})
        if not spelled:
            return (messages, tools), {}
        if not self._apart():
            what = f"{where} has {spelled[0]} in a message, and this tokenizer cannot encode it there as text"
            raise LlmpyError("record.unsupported", what, "Remove these records, or this spelling")
        letters = dict(zip((i for i in PRIVATE if chr(i) not in texts), spelled, strict=False))
        stands = {spelling: chr(i) for i, spelling in letters.items()}
        return _mapped([messages, tools], lambda text: self._special.sub(lambda m: stands[m[0]], text)), letters

    def _shown(self, text: str, spans: Sequence[tuple[int, int]], letters: dict[int, str]) -> Rendering:
        """Return a rendering with the spellings for which `letters` stand, in literal spans between special tokens."""
        if not letters:
            return Rendering(text, tuple(spans), ())
        borders = [0, *(at for found in self._special.finditer(text) for at in found.span()), len(text)]
        sections = zip(borders[::2], borders[1::2], strict=True)
        literal = [(a, b) for a, b in sections if not letters.keys().isdisjoint(map(ord, text[a:b]))]

        def moved(spans: Sequence[tuple[int, int]]) -> Spans:
            return tuple((len(text[:a].translate(letters)), len(text[:b].translate(letters))) for a, b in spans)

        return Rendering(text.translate(letters), moved(spans), moved(literal))

    def _render(self, where: str, messages: Any, tools: Any, prompt: bool = False) -> str:
        values = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        template = self._compiled
        try:
            return template.render(self._names, **values)
        except Exception as error:  # the template is a program of others
            what = f"{where} is refused by the model's chat template: {str(error)[:200] or type(error).__name__}"
            raise LlmpyError("template.refused", what, FIX) from error

    @cached_property
    def _compiled(self) -> jinja2.Template:
        import jinja2

        try:
            return _environment().from_string(self.source)
        except (jinja2.TemplateError, RecursionError) as error:
            what = f"the model's chat template is invalid: {str(error)[:200]}"
            raise LlmpyError("template.invalid", what, "Restore chat_template.jinja, or remove it") from error


def _blocks(text: str) -> tuple[list[tuple[int, int]], str]:
    """Return the spans of {% generation %} blocks, and the text without their marks."""
    spans: list[tuple[int, int]] = []
    parts: list[str] = []
    at = start = 0
    for part in re.split(f"([{OPEN}{CLOSE}])", text):
        if part == OPEN:
            start = at
        elif part == CLOSE:
            spans.append((start, at))
        else:
            parts.append(part)
            at += len(part)
    return spans, "".join(parts)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return a value of JSON with all its texts changed, but not the names of fields."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(one, change) for name, one in value.items()}
    return [_mapped(one, change) for one in value] if isinstance(value, list | tuple) else value


def _environment() -> jinja2.Environment:
    """Return the environment that `transformers` gives templates."""
    import jinja2
    from jinja2 import ext, nodes, sandbox
    from jinja2.parser import Parser

    class Generation(ext.Extension):
        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            before, after = (nodes.Output([nodes.TemplateData(mark)]) for mark in (OPEN, CLOSE))
            return [before, nodes.Scope(body), after]

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment
