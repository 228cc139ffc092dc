"""What all tests share. Before NumPy is loaded its BLAS gets one thread: tests crawl where others use the machine."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # begun in the background by a shell, and so would be all children
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where downloads and their tokens go, of this test alone. It is not there yet."""
    monkeypatch.setenv("LLMPY_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def said() -> list[str]:
    """Lines for the user: give its `append` to whoever tells them."""
    return []
