"""Text that comes with Python and NumPy, to train without a file or a network.

CPython's reference documentation (`pydoc_data.topics`, shown by `help("with")`) and the docstrings of its standard
library and of NumPy: technical English, of which only whole sentences are kept, about a million characters. Sources are
read as text, no module is imported. They differ between versions: `describe` gives the sha256.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import platform
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..errors import LlmpyError
from ..system.command import command
from .text import Document

# A comment, a triple-quoted string (group 2), or another string: each may contain the signs of the others.
LITERAL = re.compile(r"""#[^\n]*|(\"{3}|'{3})((?:\\.|[^\\])*?)\1|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""", re.DOTALL)
NO_DOCUMENTATION = {"tests", "test", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "site-packages", "dist-packages"}
MARKUP = re.compile(r":\w+:(?=`)|`+|\*\*?(?=\w)|(?<=\w)\*\*?")
CODE_SIGNS = ("::=", ">>>", "=", "|", "...", "#", "<", "\\", "http", "@", "{", "}", "~~", "--")
SENTENCE_WORDS = 20  # of a paragraph: shorter ones are mostly headings, lists and summaries
FULL_LINE = 52  # characters: a line this long may be wrapped; the documents wrap at about 70


def builtin_documents() -> list[Document]:
    """Return the documentation by topic and file. Raises LlmpyError if this distribution of Python omits it.

    Each paragraph occurs once: topics contain each other, and validation text must not leak into training.
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        hint = f"Give a text file: {command('train', '--data', 'book.txt')}"
        raise LlmpyError("data.builtin-missing", "this Python comes without its documentation", hint) from None
    texts = [(name, [topics[name]]) for name in sorted(topics)]
    for package in (os, np):
        texts += _docstrings(Path(str(package.__file__)).parent)
    seen: set[str] = set()
    documents = []
    for name, parts in texts:
        paragraphs = dict.fromkeys(p for part in parts for p in _prose(part) if p not in seen)
        seen.update(paragraphs)
        if paragraphs:
            documents.append(Document(name, "\n\n".join(paragraphs) + "\n"))
    return documents


def describe(documents: Sequence[Document]) -> str:
    """Return one line: source, size and hash of the text."""
    digest = hashlib.sha256("\0".join(d.text for d in documents).encode()).hexdigest()
    characters = sum(len(d.text) for d in documents)
    return (
        f"built-in text: the documentation of Python {platform.python_version()} and NumPy {np.__version__}, "
        f"{len(documents)} documents, {characters:,} characters, sha256 {digest[:12]}"
    )


def _docstrings(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield, for every Python file below a folder, its name and its triple-quoted strings."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - NO_DOCUMENTATION)
        for name in sorted(names):
            if name.endswith(".py"):
                path = Path(folder, name)
                source = path.read_text("utf-8", "replace")
                yield path.relative_to(root.parent).as_posix(), [m[2] for m in LITERAL.finditer(source) if m[2]]


def _prose(text: str) -> Iterator[str]:
    """Yield the paragraphs of whole sentences, one line each, without markup.

    A small model has no capacity to spare for grammar, code and tables. These contain signs that sentences lack.
    """
    for line in _unwrapped(inspect.cleandoc(text)).split("\n"):
        paragraph = " ".join(MARKUP.sub("", line).split()).removeprefix("* ").removeprefix("- ")
        if (
            len(paragraph.split()) >= SENTENCE_WORDS
            and paragraph[0].isupper()
            and paragraph.endswith((".", ":"))
            and not any(sign in paragraph for sign in CODE_SIGNS)
        ):
            yield paragraph


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
