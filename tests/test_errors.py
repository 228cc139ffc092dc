"""Errors: copied as multiprocessing pickles them, one full stop between sentences, one code for a kind."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from llmpy.errors import Diverged, LlmpyError, Stopped, unreadable


@pytest.mark.parametrize("error", [LlmpyError("a.b", "wrong", "Fix it"), Diverged("a.b", "wrong"), Stopped(15)])
def test_copies(error: LlmpyError) -> None:
    for again in (copy.copy(error), copy.deepcopy(error)):  # as pickle does it
        assert (type(again), str(again)) == (type(error), str(error))
        assert (again.code, again.hint, again.exit_code) == (error.code, error.hint, error.exit_code)


def test_one_full_stop_between_message_and_hint() -> None:
    assert str(LlmpyError("a.b", "the library failed.", "Try again")) == "the library failed. Try again"
    assert str(LlmpyError("a.b", "no\nfile\u2028x\n", "Try again")) == "no file x. Try again"


def test_a_missing_file_is_not_an_unreadable_one() -> None:
    codes = [unreadable(Path("x"), error).code for error in (FileNotFoundError(2, "gone"), PermissionError(13, "no"))]
    assert codes == ["file.missing", "file.unreadable"]
