"""Commands that work when pasted."""

from pathlib import Path

from llmpy.system.command import command, install


def test_words_are_quoted_for_a_shell() -> None:
    assert command("train", "--resume", Path("my run")) == "llmpy train --resume 'my run'"
    assert install("llmpy[plot]", "b") == "pip install 'llmpy[plot]' b"
