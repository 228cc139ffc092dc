"""README and docs as tests read them: their fences, and the commands that they tell a reader to type."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = "the cat sat on the mat and the dog ran to the sea. it was a good day for a dog.\n" * 600  # a reader's my.txt
SHELLS = ("", "sh", "bash", "shell", "console")
# Of a fence in no language only such lines are commands; the rest is output, tables and trees.
COMMAND = re.compile(r"\s*(\$ |\w+=|\S*llmpy |mpiexec |mpirun |srun |\S*python )")
FENCE = re.compile(r"^```(\w*)[ ]*([^\n`]*)\n(.*?)^```[ ]*$", re.DOTALL | re.MULTILINE)
PROGRAMS = r"\.venv/bin/\w+|llmpy|python|mpiexec|mpirun|srun"


class Fence(NamedTuple):
    """A fenced block: the line it begins on, its label and what it quotes, its text."""

    line: int
    label: str
    source: str
    text: str


class Command(NamedTuple):
    """A command: its page and line, what a shell is given, and the words of that up to what pipes or redirects them."""

    place: str
    line: str
    words: list[str]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def fences(page: Path) -> list[Fence]:
    text = page.read_text("utf-8")
    return [Fence(text[: m.start()].count("\n") + 2, m[1], m[2].strip(), m[3]) for m in FENCE.finditer(text)]


def told(line: str) -> str:
    """A line up to what, two blanks further on, explains it; a quotation may go over several lines."""
    found = re.match(r"""(?:'[^']*'|"[^"]*"|[^\s'"]| (?! ))*""", line.strip())
    assert found is not None
    return found[0].strip()


def words_of(line: str) -> list[str]:
    """A line of a shell as words, up to what pipes, redirects, ends or explains it; `…` stands for none."""
    lexer = shlex.shlex(told(line), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
        if set(word) <= set("|&;<>()"):
            break
        if word not in ("…", "..."):
            words.append(word)
    return words


def typed(page: Path) -> Iterator[Command]:
    """The commands of a page's shell fences, in order."""
    for fence in fences(page):
        lines = iter(enumerate(re.sub(r"\\\n\s*", " ", fence.text).splitlines(), fence.line))
        for number, line in lines if fence.label in SHELLS else ():
            if COMMAND.match(line):
                while line.count('"') % 2:  # a quotation that goes on
                    line += "\n" + next(lines)[1]
                line = line.removeprefix("$ ")
                yield Command(f"{name(page)}:{number}", told(line), words_of(line))


def spans(page: Path) -> Iterator[Command]:
    """The commands of a page's text and tables: `code` that begins with a program and says more."""
    text = FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), page.read_text("utf-8"))
    for found in re.finditer(rf"`((?:{PROGRAMS})\s[^`]+)`", text):
        line = " ".join(found[1].split())
        yield Command(f"{name(page)}:{text[: found.start()].count(chr(10)) + 1}", line, words_of(line))


def after(words: list[str], program: str) -> list[str] | None:
    """What follows a program, however it is called: `.venv/bin/llmpy train` → train."""
    for i, word in enumerate(words):
        if word == program or word.endswith(("/" + program, "\\" + program)):
            return words[i + 1 :]
    return None
