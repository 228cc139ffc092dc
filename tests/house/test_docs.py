"""README and docs: Python runs, quotations match their files, links have targets, README stays short.

Fences labelled `python` run, those of a page in one namespace; `py FILE` quotes lines of FILE, whatever their
indentation; for commands see tests/cli/test_docs_commands.py.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.laptop import TINY
from support.pages import FENCE, PAGES, ROOT, fences, name
from support.samples import in_memory, with_tokenizer

from llmpy.formats import hub, huggingface
from llmpy.options.fields import options_of
from llmpy.options.sample_chat import SampleOptions
from llmpy.options.train import TrainOptions

OPTIONAL = {"torch", "transformers", "matplotlib"}
TEXT = "the cat sat on the mat and the dog ran to the sea. it was a good day for a dog.\n" * 66  # ten epochs are short


@pytest.mark.parametrize("page", [p for p in PAGES if any(f.label == "python" for f in fences(p))], ids=name)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a my.txt, a small model in place of GPT-2, and `minutes` of one second."""
    small = with_tokenizer(in_memory(replace(TINY, vocab_size=257)), tmp_path / "tokenizer.json")
    huggingface.write_model(tmp_path / "cache" / "models" / "gpt2", small, "float32")
    monkeypatch.setattr(hub, "user_cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(TrainOptions, "seconds", property(lambda options: options.minutes and 1.0))
    (tmp_path / "my.txt").write_text(TEXT, "utf-8")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    try:
        for fence in fences(page):
            if fence.label == "python":  # empty lines before it give a traceback the page's line numbers
                exec(compile("\n" * (fence.line - 1) + fence.text, str(page), "exec", dont_inherit=True), namespace)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_extras_and_quotations(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s#]+)", FENCE.sub("", page.read_text("utf-8"))):
        assert "://" in target or target.startswith("mailto:") or (page.parent / target).exists(), target
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert {*re.findall(r"install (?:-e )?'(?:llmpy|\.)\[([\w-]+)\]'", page.read_text("utf-8"))} <= extras.keys()
    for fence in fences(page):
        if fence.label == "py" and fence.source:
            have, quoted = (
                [line.strip() for line in text.strip().splitlines()]
                for text in ((ROOT / fence.source).read_text("utf-8"), fence.text)
            )
            assert any(have[i : i + len(quoted)] == quoted for i in range(len(have))), f"line {fence.line}"


OURS = {f.name: f.default for f in (*options_of(TrainOptions), *options_of(SampleOptions))}


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("formats", "--eval-batches 5 --eval-every 10` (the defaults stay {eval_batches} and {eval_every})"),
        ("from-llmc", "| `--eval-every`, `--eval-batches` | 20, 20 | {eval_every}, {eval_batches} |"),
        (
            "from-llmc",
            "| `--batch-size` (`-B`), `--sequence-length` (`-T`) | 4, 1024 | {batch_size}, {sequence_length} |",
        ),
        ("from-llmc", "| only at the end, {sample_tokens} |"),
        ("from-llmc", "| 0: never | {checkpoint_every}; 0: only at the end |"),
        ("from-llmc", "| `--keep` | 0: all | {keep} |"),
        ("from-llmc", "| `--min-lr`, a fraction | 1.0: no decay | {min_lr} |"),
        ("from-nanogpt", "| 2000, 200 random | {eval_every}, the first {eval_batches} |"),
        ("from-nanogpt", "| every {checkpoint_every} steps, the newest {keep} |"),
        ("from-nanogpt", "| {weight_decay}, {beta1}, {beta2}, {clip} | the same |"),
        (
            "from-nanogpt",
            "is `--tokens` (200), `temperature` is {temperature} and not 0.8, `top_k` {top_k} and not 200",
        ),
        ("from-nanogpt", "`seed` {seed} in both"),
        ("resume", "({checkpoint_every} steps by default, 0: only at the end)"),
        ("resume", "checkpoints stay ({keep} by default, 0: all)"),
    ],
)
def test_defaults_are_those_that_pages_name(page: str, text: str) -> None:
    assert text.format(**OURS) in " ".join((ROOT / "docs" / f"{page}.md").read_text("utf-8").split())


def test_fine_tuning_keeps_the_other_defaults() -> None:
    """So `--eval-batches 5 --eval-every 10` must be given to evaluate as llm.c's program does."""
    tuned = TrainOptions.gather({"init": "gpt2"})
    assert (tuned.eval_batches, tuned.eval_every, tuned.checkpoint_every) == (20, 250, 250)
    changed = {f.name for f in options_of(TrainOptions) if getattr(tuned, f.name) != f.default} - {"init"}
    flags = re.search(
        r"fine-tunes GPT-2: (.*?)\. To evaluate", " ".join((ROOT / "docs/formats.md").read_text().split())
    )
    assert flags and {"lr", *changed} == {flag.replace("-", "_") for flag in re.findall(r"--([a-z0-9-]+)", flags[1])}


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    lines = text.splitlines()
    assert len(lines) <= 150
    assert len(text.split()) <= 1300
    assert [line for line in lines if len(line) > 120] == []
