"""House rules: architecture.md lists every module, errors have codes, the Makefile explains what is missing."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.pages import PAGES, ROOT, fences

PACKAGE = ROOT / "llmpy"
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*(\.[a-z0-9]+(-[a-z0-9]+)*)+")


def test_architecture_lists_every_module() -> None:
    """By file name, which is unique, and nothing that does not exist."""
    listed = {*re.findall(r"\b[a-z_]\w*\.(?:py|html|css|js)\b", (ROOT / "docs" / "architecture.md").read_text("utf-8"))}
    files = {p.name for suffix in ("py", "html", "css", "js") for p in PACKAGE.rglob(f"*.{suffix}")}
    assert files - listed <= {"__init__.py"}
    assert listed <= {p.name for p in ROOT.rglob("*.*")}


def test_every_error_has_a_code() -> None:
    """A literal, so that `git grep` finds it; or a name, of a table above it or what a rank raised."""
    trees = {path: ast.parse(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")}
    nodes = [(path, node) for path, tree in trees.items() for node in ast.walk(tree)]
    errors = {"LlmpyError"}
    for _ in range(3):  # subclasses of subclasses
        for _, node in nodes:
            if isinstance(node, ast.ClassDef) and errors & {getattr(base, "id", "") for base in node.bases}:
                errors.add(node.name)
    errors.remove("Stopped")  # its argument is a signal
    for path, node in nodes:
        if isinstance(node, ast.Call):
            names = {sub.id for sub in ast.walk(node.func) if isinstance(sub, ast.Name)}  # (A if x else B)(...) too
            if names & errors and not isinstance(node.func, ast.Attribute):
                code = node.args[0]
                literal = isinstance(code, ast.Constant) and CODE.fullmatch(str(code.value))
                assert literal or isinstance(code, ast.Name), f"{path}:{node.lineno}"


def test_targets_of_make_exist() -> None:
    for page in PAGES:
        commands = "".join(fence.text for fence in fences(page) if page.name != "from-llmc.md")  # there: llm.c's
        for target in re.findall(r"^make (\w+)", commands, re.MULTILINE):
            assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), f"{page}: make {target}"


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
@pytest.mark.parametrize(("fails", "named"), [("version_info", "3.9.1"), ("ensurepip", "venv")])
def test_make_names_what_is_missing(tmp_path: Path, fails: str, named: str) -> None:
    """On one line, for a Python that fails one check of the Makefile."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *{fails}*) exit 1;; -V) echo Python 3.9.1;; esac\n', "utf-8")
    python.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    command = ["make", "train", f"PYTHON={python}"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=60)
    (line,) = (line for line in ended.stderr.splitlines() if not line.startswith("make"))
    assert ended.returncode != 0 and named in line
    assert not (tmp_path / ".venv").exists()
