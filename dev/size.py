"""Count lines by folder (like `wc -l`, over the files tracked by git) against the targets of the design.

python dev/size.py                     heart: model/, backend/, train/, data/loader.py, data/shards.py
"""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
HEART = ("llmpy/model/", "llmpy/backend/", "llmpy/train/", "llmpy/data/loader.py", "llmpy/data/shards.py")
TARGETS = {"heart": 9_850, "package": 24_900, "tests": 23_850}  # tests must not exceed the package
AIM = 16_500  # for the package, before new models
PAGE = {".js", ".css", ".html"}


def lines() -> dict[PurePosixPath, int]:
    """Return the line count of each tracked file of code, page or prose."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout.decode()
    files = [PurePosixPath(name) for name in names.split("\0") if name]
    kinds = {".py", ".md", *PAGE}
    return {f: (ROOT / f).read_bytes().count(b"\n") for f in files if f.suffix in kinds and (ROOT / f).is_file()}


def main() -> None:
    found = lines()
    folders: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for file, count in found.items():
        group = file.parts[0] if len(file.parts) > 1 else "."
        if file.suffix == ".py" and group in ("llmpy", "tests"):
            name = "package" if group == "llmpy" else "tests"
            total[name] += count
            total["heart"] += count if str(file).startswith(HEART) else 0
            group = "/".join(file.parts[:2]) if len(file.parts) > 2 else group
        elif file.suffix in PAGE:
            group = "page (js, css, html)"
        elif file.suffix == ".md":
            group = "docs and prose"
        folders[group] += count
    for name, count in sorted(folders.items()):
        print(f"{count:>7,}  {name}")
    print("size: " + ", ".join(f"{name} {total[name]:,} of {most:,}" for name, most in TARGETS.items()), end="")
    print(f" (package: aim {AIM:,})" if total["tests"] <= total["package"] else "; more tests than package")


if __name__ == "__main__":
    main()
