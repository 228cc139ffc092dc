"""Prepare the checkout of a tag for building a release: `python dev/release.py v0.2.0 OWNER/NAME`.

Stops unless tag, llmpy/version.py, CITATION.cff and the first section of CHANGELOG.md have the same version. Then
README's links become absolute: PyPI shows it without the files that they point to.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)")


def problems(tag: str, version: str, citation: str, changelog: str) -> list[str]:
    """Return where the version differs from the tag's."""
    first = re.search("^## .*$", changelog, re.MULTILINE)
    dated = first and re.fullmatch(rf"## {re.escape(version)} - \d{{4}}-\d\d-\d\d", first[0])
    cited = re.search(r"^version: (.*)$", citation, re.MULTILINE)
    return [what for what, wrong in (
        (f"the tag is {tag}, llmpy/version.py has {version}", tag != f"v{version}"),
        (f"CITATION.cff has no version: {version}", not cited or cited[1] != version),
        (f"CHANGELOG.md does not start with a section: ## {version} - YYYY-MM-DD", not dated),
    ) if wrong]  # fmt: skip


def absolute(text: str, repository: str, tag: str) -> str:
    """Return Markdown whose relative links point to the files of the tag on GitHub, pictures to their bytes."""
    page, raw = f"github.com/{repository}/blob/{tag}", f"raw.githubusercontent.com/{repository}/{tag}"
    return LINK.sub(lambda m: f"{m[1]}[{m[2]}](https://{raw if m[1] else page}/{m[3]})", text)


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    _, tag, repository = sys.argv
    names = "llmpy/version.py", "CITATION.cff", "CHANGELOG.md", "README.md"
    version, citation, changelog, readme = ((ROOT / name).read_text("utf-8") for name in names)
    if found := problems(tag, version.split('"')[-2], citation, changelog):
        sys.exit("\n".join(found))
    (ROOT / "README.md").write_text(absolute(readme, repository, tag), "utf-8")


if __name__ == "__main__":
    main()
