"""Text that every Python carries: training starts with no file and no network.

CPython's own reference documentation (`pydoc_data.topics`, which `help("with")` shows) is clean technical
English, about 250,000 characters of prose in 169 sections (3.11). It changes with the version of Python, hence the
sha256 in the description.
"""

from __future__ import annotations

import hashlib
import importlib
import platform
import re
from collections.abc import Mapping, Sequence

from ..errors import LlmpyError
from ..system.command import command
from .text import Document

HEADING = re.compile(r"^(?=.+\n([*=\-~^])\1{2,}$)", re.MULTILINE)  # a line underlined in reST
CODE_SIGNS, PROSE_WORDS = ("::=", ">>>", " = ", "|", "...", "#", "<"), 7
FULL_LINE = 52  # characters from which on a line may have been wrapped; the documents are wrapped at about 70


def builtin_documents() -> list[Document]:
    """Return the documentation's sections. Raises LlmpyError where a distribution of Python leaves them out."""
    try:
        return _sections(importlib.import_module("pydoc_data.topics").topics)
    except ImportError:
        fix = f"give a text file: {command('train', '--data', 'book.txt')}"
        raise LlmpyError("data.x", "this Python carries no text to train on", fix) from None


def describe(documents: Sequence[Document]) -> str:
    """One line: what the text is, how much of it, and a hash by which to tell versions apart."""
    digest = hashlib.sha256("\0".join(d.text for d in documents).encode()).hexdigest()
    characters = sum(len(d.text) for d in documents)
    return (
        f"built-in text: the documentation of Python {platform.python_version()}, {len(documents)} documents, "
        f"{characters:,} characters, sha256 {digest[:12]}"
    )


def _sections(topics: Mapping[str, str]) -> list[Document]:
    """Topics by name, cut at their headings, each section once.

    Topics contain one another ("with" is a part of "compound"): whole, a fifth of the text would stand in
    it twice, and the validation part would have been seen in training.
    """
    seen: set[str] = set()
    documents = []
    for name in sorted(topics):
        text = topics[name]
        starts = [0, *(m.start() for m in HEADING.finditer(text) if m.start() > 0), len(text)]
        for start, stop in zip(starts, starts[1:], strict=False):
            section = text[start:stop].strip()
            # the underline's character tells the depth, which differs between two copies
            body = " ".join(section.split("\n", 2)[2:]).strip()
            if body and body not in seen:
                seen.add(body)
                documents.append(Document(name, _prose(section) + "\n"))
    return documents


def _prose(section: str) -> str:
    """The heading and the sentences of a section, each paragraph a line: no grammar, no code, no underlines.

    What is not English costs a small model the words that it could have learnt. A line of it is short or has
    a sign that sentences lack.
    """
    heading, *lines = _unwrapped(section).split("\n")
    kept = [heading.strip()]
    for line in lines:
        text = " ".join(line.split()).removeprefix("* ")
        if len(text.split()) >= PROSE_WORDS and not any(sign in text for sign in CODE_SIGNS):
            kept.append(text)
    return "\n\n".join(kept)


def _unwrapped(text: str) -> str:
    """Paragraphs as one line each: where a line was wrapped says nothing that a small model could learn.

    A line continues the one before if that was full and both are equally indented (code lines are short).
    """
    lines: list[str] = []
    full, margin = False, 0
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip(" *"))
        if full and line.strip() and indent == margin and not line.lstrip().startswith(("*", ">>>")):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
        full, margin = len(line) >= FULL_LINE, indent
    return "\n".join(lines)
