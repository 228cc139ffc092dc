"""Where a run lives."""

from pathlib import Path

import pytest

from llmpy.errors import LlmpyError
from llmpy.run.folder import MODEL_FILE, RunFolder


def test_a_command_that_is_told_can_be_pasted(tmp_path: Path) -> None:
    run = tmp_path / "my run"
    run.mkdir()
    (run / MODEL_FILE).write_bytes(b"")
    with pytest.raises(LlmpyError, match=r"--resume '.*/my run'"):
        RunFolder.open(run, "d1")
