"""docs/python.ipynb runs from top to bottom, cell by cell, and is stored without output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "python.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code = "\n".join("".join(cell["source"]) for cell in CELLS)
    quiet = os.environ | {"MPLBACKEND": "agg", "MPLCONFIGDIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=quiet, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "my-gpt2" / "model.safetensors").is_file()
    (run,) = (tmp_path / "runs").iterdir()
    rows = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    losses = [row["loss"] for row in rows if "loss" in row]
    assert sum(losses[-10:]) / 10 < 0.8 * losses[0]


def test_the_notebook_has_no_output() -> None:
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in CELLS)
