"""The one exception a user ever sees: what is wrong, and what to do about it; and words for such messages."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable, Sequence

NEAR = 3  # proposals at most


class LlmpyError(Exception):
    """A fault of the input or the machine, not of the program; the command line prints it as one line.

    `hint` names the fix and follows the message after a dash. `code` is the exit code of the process.
    """

    code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} — {hint}" if hint else message)


class Diverged(LlmpyError):
    """Training produced numbers that are not finite."""

    code = 3


class Stopped(LlmpyError):
    """A signal ended the program before there was anything to save, or a second one at once."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}")
        self.code = 128 + number


class Unheard(LlmpyError):
    """Standard output is full, or its reader has left."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean …?` with the `nearest` of the known words, or ""."""
    return asked(nearest(word, known))


def asked(words: Sequence[str]) -> str:
    """`did you mean A, B or C?`; "" of none."""
    return f"did you mean {' or '.join(filter(None, (', '.join(words[:-1]), words[-1])))}?" if words else ""


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """Those of the known words that the word may stand for: the nearest, and others as near, NEAR in all."""
    far = {k: _far(_plain(word), _plain(k)) for k in known}
    least = min(far.values(), default=math.inf)
    return [k for k in far if far[k] == least < math.inf][:NEAR]


def _plain(word: str) -> str:
    return word.lower().replace("_", "-").strip("-")


def _far(word: str, known: str) -> float:
    """0: the known word begins so; few: slips of the pen, at most one in three letters; the word's length: it is short
    for the known one, or the one is the other's beginning or end; infinite: nobody means that.
    """
    least = min(len(word), len(known))
    if least > 1 and known.startswith(word):
        return 0
    slips = len(word) // 3 if len(word) > 3 else 0
    if abs(len(word) - len(known)) <= slips and (edits := _edits(word, known, slips)) <= slips:
        return edits
    letters = iter(known)
    short = least > 1 and word[0] == known[0] and all(letter in letters for letter in word)
    ends = least > 3 and (word.endswith(known) or known.endswith(word))
    return len(word) if short or ends or (least > 2 and word.startswith(known)) else math.inf


def _edits(a: str, b: str, most: int) -> int:
    """Letters to put in, leave out, change, or swap with the next one, so that `a` becomes `b`; any number above
    `most` for more than that.
    """
    before, row = [0], [*range(len(b) + 1)]
    for i, x in enumerate(a):
        older, before, row = before, row, [i + 1]
        for j, y in enumerate(b):
            row.append(min(before[j] + (x != y), before[j + 1] + 1, row[j] + 1))
            if i and j and a[i - 1 : i + 1] == y + b[j - 1]:
                row[-1] = min(row[-1], older[j - 1] + 1)
        if min(row) > most and min(before) > most:
            break
    else:
        return row[-1]
    return most + 1


def count_of(n: int, one: str, many: str = "") -> str:
    """1 step, 2 steps; `many`: where that is not `one` with an s."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"
