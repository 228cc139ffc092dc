"""What README and docs tell a reader can be relied on: code runs, quotations are true, links lead on.

Pages are found, not listed. In a page's fences

    python                  runs, block after block in one namespace; a page needs no other
    py FILE                 quotes FILE: its lines stand there one after another, but for indentation
    sh, bash, console, none commands: test_docs_commands runs them
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.laptop import TINY
from support.pages import FENCE, PAGES, ROOT, TEXT, fences, name
from support.samples import in_memory, with_tokenizer

from llmpy.formats import hub, huggingface
from llmpy.options.train import TrainOptions

OPTIONAL = {"torch", "transformers", "matplotlib"}


@pytest.fixture
def gpt2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model lies where GPT-2 would, had it been downloaded."""
    small = with_tokenizer(in_memory(replace(TINY, vocab_size=257)), tmp_path / "tokenizer.json")
    huggingface.write_model(tmp_path / "cache" / "models" / "gpt2", small, "float32")
    monkeypatch.setattr(hub, "user_cache", lambda: tmp_path / "cache")


@pytest.mark.parametrize("page", [p for p in PAGES if any(f.label == "python" for f in fences(p))], ids=name)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpt2: None) -> None:
    """In a folder with a my.txt, short enough to train ten epochs on, and with a GPT-2; --minutes last a second."""
    monkeypatch.setattr(TrainOptions, "seconds", property(lambda options: options.minutes and 1.0))
    (tmp_path / "my.txt").write_text(TEXT[: len(TEXT) // 9], "utf-8")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    try:
        for fence in fences(page):
            if fence.label == "python":
                # Empty lines before it: a failing line has the page's number.
                code = "\n" * (fence.line - 1) + fence.text
                exec(compile(code, str(page), "exec", dont_inherit=True), namespace)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_quotations_are_true(page: Path) -> None:
    for fence in fences(page):
        if fence.label == "py" and fence.source:
            have = [line.strip() for line in (ROOT / fence.source).read_text("utf-8").splitlines()]
            want = [line.strip() for line in fence.text.strip().splitlines()]
            places = (have[i : i + len(want)] for i in range(len(have)))
            assert want in places, f"{name(page)}:{fence.line} is no longer in {fence.source}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s#]+)", FENCE.sub("", page.read_text("utf-8"))):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{name(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_extras_to_install_exist(page: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = re.findall(r"install (?:-e )?'(?:llmpy|\.)\[(\w+)\]'", page.read_text("utf-8"))
    assert {*extras} <= project["optional-dependencies"].keys()
