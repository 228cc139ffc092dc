"""The pages say what is there: every module of the package, and targets of make that exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.pages import PAGES, ROOT, fences

README = (ROOT / "README.md").read_text("utf-8")
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def files_in_the_tree() -> set[str]:
    """Paths below llmpy/ that the tree of docs/architecture.md lists, by their indentation."""
    block = (ROOT / "docs" / "architecture.md").read_text("utf-8").split("```")[1]
    folders: list[str] = []
    found = set()
    for line in block.strip("\n").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, phrase = line.strip().partition(" ")
        if name.endswith("/"):
            folders[depth:] = [name]
        else:
            assert phrase.strip(), f"{name} has no phrase"
            found.add("".join([*folders[:depth], name]))
    return found


def test_the_tree_is_the_package() -> None:
    kinds = (".py", ".html", ".css", ".js")
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "llmpy").rglob("*.*") if p.suffix in kinds}
    # An __init__.py that only marks a folder, or holds the version, needs no line.
    assert files_in_the_tree() == {f for f in files if not f.endswith("__init__.py")} | (files_in_the_tree() & files)


def test_tests_mirror_the_package() -> None:
    folders = {p.name for p in (ROOT / "llmpy").iterdir() if p.is_dir() and p.name != "__pycache__"}
    others = {"support", "house", "fixtures", "__pycache__"}
    of_tests = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir()} - others
    assert of_tests == folders - {"system", "options"} | (of_tests & {"system", "options"})


def test_targets_of_make_exist() -> None:
    for page in PAGES:
        fenced, text = "".join(fence.text for fence in fences(page)), page.read_text("utf-8")
        targets = {*re.findall(r"^make (\w+)", fenced, re.MULTILINE), *re.findall(r"`make (\w+)", text)}
        if page.name == "from-llmc.md":
            targets -= {"train_gpt2", "train_gpt2cu"}  # llm.c's
        for target in targets:
            assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), f"{page}: make {target}"


def test_ci_runs_the_check_and_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    assert "make check\nmake test\n" in script
    assert "\nmake test\n" in README
    if os.name == "posix":
        assert os.access(ROOT / ".ci" / "run", os.X_OK)


needs_make = pytest.mark.skipif(not shutil.which("make"), reason="no make")


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make` with this Makefile in another folder."""
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "pyproject.toml").touch()
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, encoding="utf-8", timeout=60)


@needs_make
@pytest.mark.parametrize(
    ("fake", "said"),
    [
        (None, "llm.py needs Python 3.11 or newer: install it"),
        ('case "$*" in *version_info*) exit 1;; -V) echo Python 3.9.1;; esac', "is Python 3.9.1: name a newer one"),
        ('case "$*" in *ensurepip*) exit 1;; esac', "has no venv module: install it"),
    ],
)
def test_one_sentence_for_what_is_missing(tmp_path: Path, fake: str | None, said: str) -> None:
    python = tmp_path / "fake-python"
    if fake is not None:
        python.write_text(f"#!/bin/sh\n{fake}\n", encoding="utf-8")
        python.chmod(0o755)
    result = make(tmp_path, "train", f"PYTHON={python}")
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / ".venv").exists()
