"""README and docs as tests read them: fenced code and the commands in it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELLS = ("", "sh", "bash", "shell", "console")  # labels of fences with commands
FENCE = re.compile(r"^```(\w*) *([^\n`]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(?:\$ |\w+=|\S*llmpy |mpiexec |mpirun |srun |\S*python )")  # other lines are output
TYPED = re.compile(r"""(?:'[^']*'|"[^"]*"|[^\s'"]| (?! ))*""")  # up to two spaces, which start an explanation


class Fence(NamedTuple):
    """Fenced code: its first line, its label, the file that it quotes, its text."""

    line: int
    label: str
    source: str
    text: str


class Command(NamedTuple):
    """A command: its page and line, and its words up to a pipe or redirection."""

    place: str
    words: list[str]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def fences(page: Path) -> list[Fence]:
    text = page.read_text("utf-8")
    return [Fence(text[: m.start()].count("\n") + 2, m[1], m[2].strip(), m[3]) for m in FENCE.finditer(text)]


def words_of(line: str) -> list[str]:
    """Return the words of a line of a shell; `…` is dropped."""
    typed = TYPED.match(line.removeprefix("$ "))
    lexer = shlex.shlex(typed[0] if typed else "", posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    end = next((i for i, word in enumerate(words) if set(word) <= set("|&;<>()")), len(words))
    return [word for word in words[:end] if word not in ("…", "...")]


def typed(page: Path) -> Iterator[Command]:
    """Yield the commands of a page's fences, in order."""
    for fence in fences(page):
        lines = re.sub(r"\\\n\s*", " ", fence.text).splitlines() if fence.label in SHELLS else ()
        for number, line in enumerate(map(str.strip, lines), fence.line):
            if COMMAND.match(line) and line.count('"') % 2 == 0:
                yield Command(f"{name(page)}:{number}", words_of(line))


def after(words: list[str], program: str) -> list[str] | None:
    """Return the arguments of a program, called by any path, or None: `.venv/bin/llmpy train` → [train]."""
    for i, word in enumerate(words):
        if word == program or word.endswith(("/" + program, "\\" + program)):
            return words[i + 1 :]
    return None
