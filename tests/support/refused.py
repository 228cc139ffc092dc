"""Expect an error by its stable code instead of its wording."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from llmpy.errors import LlmpyError


@contextmanager
def refused(code: str, *names: object) -> Iterator[pytest.ExceptionInfo[LlmpyError]]:
    """Expect an LlmpyError with this code and a text that contains all `names`: a path, a value, a flag."""
    with pytest.raises(LlmpyError) as caught:
        yield caught
    error = caught.value.code, str(caught.value)
    del caught  # its traceback holds this frame: a cycle that keeps sockets of the error open
    assert error[0] == code, error
    missing = [str(name) for name in names if str(name) not in error[1]]
    assert not missing, f"{error} does not name {missing}"
