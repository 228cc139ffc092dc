"""docs/python.ipynb runs from top to bottom: in Jupyter if it is installed, else cell by cell."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "python.ipynb"
JUPYTER = all(importlib.util.find_spec(name) for name in ("nbclient", "nbformat", "ipykernel"))
IN_JUPYTER = """
import sys, nbformat
from nbclient import NotebookClient
NotebookClient(nbformat.read(sys.argv[1], 4), timeout=300).execute()
"""
BY_CELL = """
import json, sys
cells = json.load(open(sys.argv[1], encoding="utf-8"))["cells"]
names = {"__name__": "__main__"}
for cell in cells:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
"""


def test_the_notebook_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = subprocess.run(
        [sys.executable, "-c", IN_JUPYTER if JUPYTER else BY_CELL, str(NOTEBOOK)],
        cwd=tmp_path, env={**os.environ, "MPLBACKEND": "agg", "MPLCONFIGDIR": str(tmp_path)}, capture_output=True,
        encoding="utf-8", timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "my-gpt2" / "model.safetensors").is_file()
    (run,) = (tmp_path / "runs").iterdir()
    rows = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    losses = [row["loss"] for row in rows if "loss" in row]
    assert sum(losses[-10:]) / 10 < 0.8 * losses[0]


def test_the_notebook_has_no_output() -> None:
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
