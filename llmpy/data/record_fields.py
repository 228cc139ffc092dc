"""The fields of a record → its text, and which characters count in the loss.

    text                              all of it counts
    prompt, completion                texts, or lists of messages (TRL); the completion counts
    messages, conversations           role and content (OpenAI, TRL), from and value (ShareGPT), an optional system:
                                      as the model's chat template has them, else "role: content" and a blank line for
                                      each; the assistant's content counts, with the end-of-turn token or blank line
                                      after it; weight, train, training and loss change what counts
    instruction, input, output        Alpaca, with LLaMA-Factory's system and history; becomes messages

Fields that are null, blank or empty count as absent, since tables of mixed records have them. Fields that these formats
give another meaning (images, preferences …) are refused by name, and so are calls and tools unless a chat template has
them. Other fields are ignored and logged.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

from ..errors import LlmpyError
from .chat_template import ChatTemplate, Message, Rendering, Spans

ASSISTANT = "assistant"  # the role that counts
KINDS = "text, prompt and completion, messages, conversations, or instruction and output"
CHATS = ("messages", "conversations", "conversation")
CONTEXT = {
    "prompt", "completion", "instruction", "input", "output", "system", "history", "response",  # must not be lost
}  # fmt: skip
PREFERENCES = {"chosen", "rejected", "completions", "kto_tag"}
LOST = {
    "tools", "functions", "tool_calls", "function_call", "images", "image", "videos", "video", "audios", "audio",
    "train_detail",
}  # fmt: skip
OF_RECORDS = LOST | {  # unless all of the record is a text
    "weights", "chat_template_kwargs", "labels", "label", "train", "training", "loss",
}  # fmt: skip
OF_MESSAGES = LOST | {
    "tool_call_id", "name", "reasoning_content", "reasoning", "thinking", "refusal", "channel", "recipient",
}  # fmt: skip
LOSS = re.compile("(?i)(.*_)?(loss|train|mask|weight)")  # flags of other programs, not constraints
CONTENT = {"text", *CHATS, "prompt", "completion", "instruction"} | PREFERENCES  # a record has one of these
KNOWN = CONTENT | CONTEXT | {"weight"} | OF_RECORDS
PAIRS = (("prompt", "completion"), ("instruction", "output"))
FLAGS = ("weight", "train", "training", "loss")  # of a message: OpenAI; axolotl; ms-swift
PLAIN = {"role", "content"}
OF_TEMPLATES = {ASSISTANT: {"tool_calls", "reasoning_content"}, "tool": {"name", "tool_call_id"}}
MESSAGE = {*PLAIN, "from", "value", *FLAGS}
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys((ASSISTANT, "gpt", "chatgpt", "bing", "bard", "bot", "model", "ai"), ASSISTANT),
}
TYPES = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}


class Reading(NamedTuple):
    """A record as understood."""

    parts: list[Rendering]  # several if its answers are trained on one at a time
    layout: str  # for the log
    ignored: set[str]  # names of fields without a meaning


def read_fields(where: str, record: Mapping[str, Any], template: ChatTemplate | None = None) -> Reading | None:
    """Return the text of a record, its messages in `template`, or None if all its fields are empty.

    Raises LlmpyError, naming `where` and the field, for two kinds of content and for fields that cannot be used.
    """
    fields = {name: record[name] for name in record.keys() & KNOWN if _holds(record[name])}
    if fields.keys() == {"text"}:  # most records
        return Reading([Rendering(_string(f"{where}: text", fields["text"]), None)], "text", record.keys() - KNOWN)
    _refuse(where, fields.keys() & PREFERENCES)
    found = [name for name in ("text", *CHATS) if name in fields]
    for question, answer in PAIRS:
        empty = not found and fields.keys() & {question, "input"} and record.get(answer) is not None
        if question in record and (answer in fields or empty):  # an answer may be empty, but not missing
            found.append(answer)
    if len(found) > 1:
        raise _ambiguous(f"{where} has two kinds of content, {found[0]} and {found[1]}")
    if not found:
        if alone := sorted(fields.keys() & (CONTENT | {"output"})):
            raise _invalid(
                f"{where} has only {' and '.join(alone)}, of {', '.join(str(name)[:30] for name in sorted(record)[:6])}"
            )
        return None
    kind, extra = found[0], set[str]()
    layout, used, counted, talk = kind, {kind}, None, None
    if fields.get("weight", 1) != 1:
        raise _unsupported(f"{where} has weight {_shown(fields['weight'])}, and only 1 is supported")
    if kind != "text":  # a label that is a text is a category
        used |= {name for name in fields.keys() & {"tools"} if template is not None and template.uses(name)}
        categories = {"label"} if isinstance(fields.get("label"), str) else set()
        _refuse(where, fields.keys() & OF_RECORDS - used - categories)
    if kind == "text":
        text = _string(f"{where}: text", fields["text"])
        used |= {"input", "output", "response"}  # metadata
    elif kind == "completion":
        layout, used = "prompt + completion", used | {"prompt"}
        talk, text, counted = _pair(where, record["prompt"], record["completion"], extra, template)
    else:
        used.add("system")
        if kind == "output":
            layout, used = "instruction/input/output", used | {"instruction", "input", "history"}
        given = _alpaca(where, fields, record["output"]) if kind == "output" else fields[kind]
        talk = messages(f"{where}: {kind}", given, extra, template)
        if "system" in fields:
            if talk[0][0]["role"] == "system":
                raise _ambiguous(f"{where} has two system messages")
            talk.insert(0, ({"role": "system", "content": _string(f"{where}: system", fields["system"])}, False))
        layout += " → user/assistant messages" * (kind != "messages")
    if talk is None:
        _refuse(where, used & {"tools"})
        parts = [Rendering(text, counted)]
    elif template is None:
        parts = [Rendering(*plain(talk))]
    else:
        counts = [i for i, (_, counting) in enumerate(talk) if counting]
        tools = _tools(where, fields["tools"]) if "tools" in fields else None
        parts = template.conversation(where, [message for message, _ in talk], counts, tools)
        layout += " → chat template" + ", one answer at a time: it rewrites earlier ones" * (len(parts) > 1)
    text = "".join(_string(where, part.text) for part in parts)
    if lost := [name for name in fields.keys() & CONTEXT - used if str(fields[name]).strip() not in text]:
        raise _ambiguous(f"{where}: {min(lost)} is not part of {kind}, and would be lost")
    return Reading(parts, layout, extra | record.keys() - KNOWN | fields.keys() - used - CONTEXT - {"weight"})


def plain(talk: Sequence[tuple[Message, bool]]) -> tuple[str, Spans]:
    """Return `role: content` and a blank line for each message, and the characters that count."""
    text, counted = "", []
    for message, counting in talk:
        text += f"{message['role']}: "
        start = len(text)
        text += message["content"] + "\n\n"
        if counting:
            counted.append((start, len(text)))
    return text, tuple(counted)


def messages(
    where: str, messages: Any, ignored: set[str], template: ChatTemplate | None = None
) -> list[tuple[Message, bool]]:
    """Return the messages as role, content and what else `template` reads, and whether each counts.

    Adds the names of message fields without a meaning to `ignored`. Raises LlmpyError for invalid messages.
    """
    if not isinstance(messages, list):
        raise _invalid(f"{where} is {_type(messages)}, not a list of messages")
    talk = []
    for number, message in enumerate(messages, 1):
        at = f"{where}, message {number}"
        if not isinstance(message, dict):
            raise _invalid(f"{at} is {_type(message)}, not an object with role and content")
        spelled = _either(at, message, "role", "from")
        role = ROLES.get(spelled.lower()) if isinstance(spelled, str) else None
        if spelled == "tool" and template is not None and template.uses("tool"):
            role = "tool"
        if role is None:
            what = f"{at} has the role {_shown(spelled)}, not system, user or assistant"
            raise LlmpyError("record.unsupported", what, "Rename it, or remove these records")
        others = {name for name in message.keys() - PLAIN if _holds(message[name])}
        more: Message = {}
        if template is not None:
            known = (name for name in OF_TEMPLATES.get(role, ()) if name in others)
            more = {name: _value(at, message[name]) for name in known if role == "tool" or template.uses(name)}
        if others := others - more.keys():
            _refuse(at, {name for name in others - MESSAGE if name in OF_MESSAGES or LOSS.match(name)})
            ignored |= others - MESSAGE
        if "tool_calls" not in more or message.get("content") is not None:
            more["content"] = _content(at, _either(at, message, "content", "value"))
        talk.append(({"role": role, **more}, _counts(at, message, role) if others else role == ASSISTANT))
    return talk


def _value(at: str, value: Any) -> Any:
    """Return calls or tools without empty fields, which tables have; arguments as objects, which templates expect."""
    if isinstance(value, dict):
        some = {name: _value(at, one) for name, one in value.items() if one is not None}
        if isinstance(text := some.get("arguments"), str):
            try:
                some["arguments"] = json.loads(text)
            except (ValueError, RecursionError):
                raise _invalid(f"{at}: arguments are not JSON") from None
        return some
    return [_value(at, one) for one in value] if isinstance(value, list) else value


def _tools(where: str, tools: Any) -> list[Any]:
    """Return the tools of a record: a list of objects, or its JSON."""
    try:
        found = json.loads(tools) if isinstance(tools, str) else tools
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise _invalid(f"{where}: tools is not a list of objects")
    return list(_value(where, found))


def _pair(
    where: str, prompt: Any, completion: Any, ignored: set[str], template: ChatTemplate | None
) -> tuple[list[tuple[Message, bool]] | None, str, Spans]:
    """Return prompt and completion as messages, or as one text, of which the completion counts."""
    lists = isinstance(completion, list)
    if isinstance(prompt, list) is not lists and not _holds(prompt):
        prompt = [] if lists else ""
    if isinstance(prompt, list) is not lists:
        raise _invalid(f"{where}: prompt is {_type(prompt)}, completion {_type(completion)}")
    if lists:
        asked = [(message, False) for message, _ in messages(f"{where}: prompt", prompt, ignored, template)]
        return [*asked, *messages(f"{where}: completion", completion, ignored, template)], "", ()
    text = _string(f"{where}: prompt", prompt)
    whole = text + _string(f"{where}: completion", completion)
    return None, whole, ((len(text), len(whole)),)


def _alpaca(where: str, fields: Mapping[str, Any], output: Any) -> list[dict[str, Any]]:
    """Return the messages that LLaMA-Factory makes of these fields."""
    turns = fields.get("history", [])
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise _invalid(f"{where}: history is not a list of pairs")
    asked = [_string(f"{where}: {name}", fields[name]) for name in ("instruction", "input") if name in fields]
    turns = [*turns, ["\n".join(asked), output]]
    return [{"role": role, "content": turn[i]} for turn in turns for i, role in enumerate(("user", ASSISTANT))]


def _content(at: str, content: Any) -> str:
    """Return the content of a message: a text, or text parts."""
    if not isinstance(content, list):
        return _string(f"{at}: content", content)
    if not all(isinstance(part, dict) for part in content):
        raise _invalid(f"{at}: content is a list, not one text")
    if other := [part.get("type") for part in content if part.get("type") != "text"]:
        raise _unsupported(f"{at}: content has a part of type {_shown(other[0])}")
    return "".join(_string(f"{at}: text of content", part.get("text")) for part in content)


def _counts(at: str, message: Mapping[str, Any], role: str) -> bool:
    """Return whether a message counts: the assistant's, unless its flags say otherwise."""
    flags = {name: message[name] for name in FLAGS if message.get(name) is not None}
    for name, value in flags.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise _unsupported(f"{at} has {name} {_shown(value)}, not 0 or 1")
    if role != ASSISTANT and flags.get("weight") == 1:
        del flags["weight"]  # of all messages, where a table has the column
    if len(set(map(bool, flags.values()))) > 1:
        raise _ambiguous(f"{at}: {' and '.join(flags)} contradict each other")
    return bool(next(iter(flags.values()), role == ASSISTANT))


def _either(at: str, message: Mapping[str, Any], name: str, other: str) -> Any:
    """Return the value of a field with two spellings."""
    value, spare = message.get(name), message.get(other)
    if value is None and spare is None:
        raise _invalid(f"{at} has no {name}")
    if spare is None or not _holds(spare) and value is not None:
        return value
    if _holds(value):
        raise _ambiguous(f"{at} has both {name} and {other}")
    return spare


def _string(what: str, value: Any) -> str:
    """Return a value that must be text. Raises LlmpyError for others, and for lone surrogates, which JSON can spell."""
    if not isinstance(value, str):
        raise _invalid(f"{what} is {_type(value)}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _invalid(f"{what} has {value[error.start]!a}, which is not valid in UTF-8") from error
    return value


def _refuse(where: str, names: Set[str]) -> None:
    """Raise LlmpyError if there are such fields."""
    if names:
        raise _unsupported(f"{where} has {min(names)}, which cannot be used")


def _holds(value: Any) -> bool:
    """Return whether a value holds something: no null, no blank text, no list or object of such values."""
    if isinstance(value, str):
        return value != "" and not value.isspace()
    if isinstance(value, dict):
        return any(map(_holds, value.values()))
    if isinstance(value, float):
        return not math.isnan(value)  # an empty cell of a table
    return any(map(_holds, value)) if isinstance(value, list) else value is not None


def _type(value: Any) -> str:
    return "empty" if value is None else TYPES.get(type(value), "of another type")


def _shown(value: Any) -> str:
    return ascii(value)[:30] if isinstance(value, str | int | float) else _type(value)


def _invalid(what: str) -> LlmpyError:
    return LlmpyError("record.invalid", what, f"Give {KINDS}")


def _ambiguous(what: str) -> LlmpyError:
    return LlmpyError("record.ambiguous", what, "Keep one of them")


def _unsupported(what: str) -> LlmpyError:
    return LlmpyError("record.unsupported", what, "Remove these records, or the field if it does not matter")
