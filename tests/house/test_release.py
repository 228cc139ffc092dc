"""dev/release.py: a tag is built only if all versions agree, and with links that work on PyPI."""

from __future__ import annotations

import re
import runpy
import tomllib

from support.pages import ROOT

from llmpy import __version__

TOOL = runpy.run_path(str(ROOT / "dev" / "release.py"))


def test_versions_must_agree() -> None:
    citation, changelog = ((ROOT / name).read_text("utf-8") for name in ("CITATION.cff", "CHANGELOG.md"))
    assert f"\nversion: {__version__}\n" in citation
    released = changelog[changelog.index("## 0.1.0 - ") :]
    assert TOOL["problems"]("v0.1.0", "0.1.0", "version: 0.1.0\n", released) == []
    if released != changelog:  # another version comes first
        assert len(TOOL["problems"]("v0.1.0", "0.1.0", "version: 0.1.0\n", changelog)) == 1
    found = TOOL["problems"]("v0.9.0", "0.9.1", citation, changelog)
    assert [line.split()[0] for line in found] == ["the", "CITATION.cff", "CHANGELOG.md"]


def test_old_pips_find_every_extra() -> None:
    """Before 23.3, pip ignored an extra with `_`, and installed nothing for it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert [name for name in project["optional-dependencies"] if not re.fullmatch("[a-z-]+", name)] == []


def test_links_become_absolute() -> None:
    text = TOOL["absolute"]((ROOT / "README.md").read_text("utf-8") + "[a](#b) [c](https://d.e)", "OWNER/NAME", "v1")
    links = re.findall(r"\]\(([^)\s]+)", text)
    assert [link for link in links if not link.startswith("https://")] == ["#b"]
    assert "![A training step" in text and "](https://raw.githubusercontent.com/OWNER/NAME/v1/docs/speed.svg)" in text
    assert "(https://github.com/OWNER/NAME/blob/v1/docs/train.md)" in text and "(https://d.e)" in text
