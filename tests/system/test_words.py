"""Text that is shared: tables."""

from llmpy.system.words import columns


def test_columns() -> None:
    assert columns([("a", "bb", "c"), ("aaa", "b", "ccc")]) == "a    bb    c\naaa   b  ccc"
