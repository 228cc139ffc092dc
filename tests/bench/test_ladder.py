"""The ladder of docs/peak.md: every rung multiplies, the check finds errors, the chapter matches the program."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from functools import partial
from typing import Any

import numpy as np
import pytest
from support.pages import ROOT, after, typed

PAGE = ROOT / "docs" / "peak.md"
CHAPTER = PAGE.read_text("utf-8")


@pytest.fixture(scope="module")
def ladder() -> Any:
    """dev/ladder.py, a program outside the package."""
    spec = importlib.util.spec_from_file_location("ladder", ROOT / "dev" / "ladder.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ladder"] = module  # dataclasses look it up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules["ladder"]


def test_every_rung_multiplies(ladder: Any) -> None:
    """Use rows, depth and columns that no tile, word or vector divides; `climb` checks each product."""
    shape = (2 * ladder.MR + 3, 37, 2 * ladder.NR + 5)
    numbers = ladder.climb(list(range(len(ladder.RUNGS))), shape, budget=0.0)
    assert [r["rung"] for r in numbers["rungs"]] == list(range(len(ladder.RUNGS)))
    assert all(0 <= r["error_of_bound"] <= 1 and r["gflops"] > 0 for r in numbers["rungs"])
    assert [r["extrapolated"] for r in numbers["rungs"]] == [n == 0 for n in range(len(ladder.RUNGS))]
    assert json.loads(json.dumps(numbers)) == numbers
    text = ladder.table(numbers)
    assert all(rung.name in text for rung in ladder.RUNGS)


def test_depth_beyond_a_panel(ladder: Any) -> None:
    """Panels end at KC and blocks at BLOCK_K: the pieces must add up."""
    shape = (ladder.MR, ladder.KC + 2 * ladder.BLOCK_K + 1, ladder.BLOCK_COLS + 1)
    assert len(ladder.climb([3, 4, 5], shape, budget=0.0)["rungs"]) == 3


def test_plain_loops_are_bitwise_identical(ladder: Any) -> None:
    """Rungs 1 to 3 add the same terms in the same order, as stated in the chapter."""
    problem = ladder.Problem.draw(8, 77, 100)
    results = []
    for rung in ladder.RUNGS[1:4]:
        call, out = rung.prepare(problem, ladder.backend.load("cpu", threads=1, dtype="float32"))
        call()
        results.append(out)
    assert all(np.array_equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("wrong", [np.float32(1 + 1e-5), np.float32(np.nan)])
def test_the_check_notices(ladder: Any, wrong: np.float32) -> None:
    problem, rung = ladder.Problem.draw(8, 768, 48), ladder.RUNGS[6]
    pre_gelu = (problem.inp.astype(np.float64) @ problem.weight.T + problem.bias).astype(np.float32)
    out = ladder.gelu(pre_gelu.astype(np.float64)).astype(np.float32)
    assert ladder.check(rung, problem, (out, pre_gelu)) <= 1
    out[0, 0] *= wrong
    with pytest.raises(AssertionError, match="rounding"):
        ladder.check(rung, problem, (out, pre_gelu))


def test_commands_of_the_chapter_run(ladder: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Run them on the smallest product; commands of llmpy run in test_docs_commands."""
    monkeypatch.setattr(ladder, "climb", partial(ladder.climb, budget=0.0))
    commands = [after(command.words, "dev/ladder.py") for command in typed(PAGE)]
    found = [words for words in commands if words is not None]
    assert len(found) > 3
    for words in found:
        monkeypatch.setattr(sys, "argv", ["ladder.py", *words, "--shape", str(ladder.MR), "1", str(ladder.NR)])
        assert ladder.main() == 0
        out, chosen = capsys.readouterr().out, ladder.build_parser().parse_args(words).rung
        assert all((rung.name in out) == (not chosen or n in chosen) for n, rung in enumerate(ladder.RUNGS))


def test_the_chapter_has_every_rung_and_its_picture(ladder: Any) -> None:
    table = re.findall(r"^\| (\d) ([^|]*?) \|.*% \|", CHAPTER, re.MULTILINE)
    assert table == [(str(n), rung.name) for n, rung in enumerate(ladder.RUNGS)]
    for name in re.findall(r"\]\(([^)#:]+)\)", CHAPTER):
        assert (ROOT / "docs" / name).exists(), name
