"""Text that comes with Python, to train without a file or a network.

CPython's reference documentation (`pydoc_data.topics`, shown by `help("with")`) is clean technical English: about
250,000 characters of prose in 169 sections (3.11). It differs between versions of Python: `describe` gives its sha256.
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
FULL_LINE = 52  # characters: a line this long may be wrapped; the documents wrap at about 70


def builtin_documents() -> list[Document]:
    """Return the sections of the documentation. Raises LlmpyError if this distribution of Python omits it."""
    try:
        return _sections(importlib.import_module("pydoc_data.topics").topics)
    except ImportError:
        hint = f"Give a text file: {command('train', '--data', 'book.txt')}"
        raise LlmpyError("data.builtin-missing", "this Python comes without its documentation", hint) from None


def describe(documents: Sequence[Document]) -> str:
    """Return one line: source, size and hash of the text."""
    digest = hashlib.sha256("\0".join(d.text for d in documents).encode()).hexdigest()
    characters = sum(len(d.text) for d in documents)
    return (
        f"built-in text: the documentation of Python {platform.python_version()}, {len(documents)} documents, "
        f"{characters:,} characters, sha256 {digest[:12]}"
    )


def _sections(topics: Mapping[str, str]) -> list[Document]:
    """Split topics, sorted by name, at their headings; return each section once.

    Topics contain each other ("with" is a part of "compound"). Unsplit, a fifth of the text would occur twice, and
    validation text would leak into training.
    """
    seen: set[str] = set()
    documents = []
    for name in sorted(topics):
        text = topics[name]
        starts = [0, *(m.start() for m in HEADING.finditer(text) if m.start() > 0), len(text)]
        for start, stop in zip(starts, starts[1:], strict=False):
            section = text[start:stop].strip()
            # without heading and underline, whose character depends on the depth of the section
            body = " ".join(section.split("\n", 2)[2:]).strip()
            if body and body not in seen:
                seen.add(body)
                documents.append(Document(name, _prose(section) + "\n"))
    return documents


def _prose(section: str) -> str:
    """Return heading and sentences of a section, one line per paragraph, without grammar, code or underlines.

    A small model has no capacity to spare for these. Such lines are short or contain a sign that sentences lack.
    """
    heading, *lines = _unwrapped(section).split("\n")
    kept = [heading.strip()]
    for line in lines:
        text = " ".join(line.split()).removeprefix("* ")
        if len(text.split()) >= PROSE_WORDS and not any(sign in text for sign in CODE_SIGNS):
            kept.append(text)
    return "\n\n".join(kept)


def _unwrapped(text: str) -> str:
    """Join each paragraph to one line.

    A line continues the previous one if that was full and both have the same indentation (code lines are short).
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
