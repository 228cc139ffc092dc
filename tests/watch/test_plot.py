"""`llmpy plot`: images, pages and text from run folders."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from llmpy.cli import main as cli

needs_matplotlib = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of matplotlib about others


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 200 steps with two validations, in a folder name with markup for every format."""
    folder = tmp_path / "a $run$ <b>&amp;"
    folder.mkdir()
    rows = [{"step": 0, "val_loss": 6.0}]
    for step in range(1, 201):
        rows.append({"step": step, "loss": 6 * 0.99**step + 0.1 * (step % 3), "lr": 1e-3, "share_of_peak": 0.7})
    rows.append({"step": 200, "val_loss": 1.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def batches(tmp_path: Path) -> list[str]:
    """Two runs of 100 steps; the second reads four times as many tokens in twice the time."""
    names = []
    for name, tokens, ms in (("small", 25_000, 36_000), ("large", 100_000, 72_000)):
        (tmp_path / name).mkdir()
        rows = [{"step": s, "loss": 9 / s, "ms": ms, "tokens_per_s": tokens / ms * 1000} for s in range(1, 101)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        names.append(str(tmp_path / name))
    return names


def paths(picture: Path, points: int) -> list[np.ndarray]:
    """Return the curves of so many points in an SVG: x and y (points, 2)."""
    found = [re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", d) for d in re.findall(r' d="([^"]*)"', picture.read_text())]
    return [np.array(path, float) for path in found if len(path) == points]


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_file())


@needs_matplotlib
@pytest.mark.parametrize(
    ("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".html", b"<html>")]
)
def test_every_format_twice_the_same(run: Path, tmp_path: Path, suffix: str, magic: bytes) -> None:
    pytest.importorskip("plotly" if suffix == ".html" else "matplotlib")
    written = []
    for _ in range(2):
        path = tmp_path / f"loss{suffix}"
        assert cli.main(["plot", str(run), str(run), "-o", str(path), "--curves", "loss", "share_of_peak"]) == 0
        assert files(tmp_path) == [path.name]  # no temporary file stays
        written.append(path.read_bytes())
    assert magic in written[0][:30]
    assert written[0] == written[1]


@needs_matplotlib
@pytest.mark.parametrize(("x", "ratio"), [("steps", 1.0), ("tokens", 4.0), ("time", 2.0)])
def test_the_chosen_axis(batches: list[str], tmp_path: Path, x: str, ratio: float) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "loss.svg"
    assert cli.main(["plot", *batches, "-o", str(path), "--smooth", "0", "--x", x]) == 0
    curves = paths(path, 100)
    small, large = (curve[:, 0] for curve in curves)
    assert np.ptp(large) / np.ptp(small) == pytest.approx(ratio, rel=1e-4)
    assert np.diff(small) == pytest.approx(np.ptp(small) / 99, abs=1e-4)
    loss = 9 / np.arange(1, 101)
    assert all(np.corrcoef(curve[:, 1], loss)[0, 1] == pytest.approx(-1, abs=1e-6) for curve in curves)  # down is up


def test_a_page_loads_nothing(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    path = tmp_path / "run.html"
    assert cli.main(["plot", str(run), "-o", str(path)]) == 0
    page = path.read_text("utf-8")
    assert "default-src 'none'" in page
    assert not re.search(r"<(script|link)[^>]*(src|href)=", page)
    assert "<b>" not in page[page.rindex("Plotly.newPlot") :]  # the name of the run stays text
    for curve in ("loss", "learning rate", "share of peak (%)"):  # all curves, without --curves
        assert f'"text":"{curve}"' in page


def test_text_needs_no_terminal(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotext")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.chdir(run.parent)
    run = run.rename("my")
    rows = [{"step": step, "loss": 9 - step / 500} for step in range(1, 998)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row | {"val_loss": 8, "lr": 1}) + "\n" for row in rows))
    assert cli.main(["plot", "my", "--curves", "loss", "lr"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert "\x1b" not in text
    assert max(map(len, lines)) <= 59
    assert lines[0].strip() == "loss"
    assert "7.006 " in text  # the last loss, although the curve is thinned and averaged
    assert "** " in text  # two curves without colours: letters
    assert any(0x2800 < ord(letter) < 0x2900 for letter in text)  # one curve: dots


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("no_colour", "term", "coloured"), [("", "xterm", True), ("1", "xterm", False), ("", "dumb", False)]
)
def test_colours_on_a_terminal_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch, no_colour: str, term: str, coloured: bool
) -> None:
    pytest.importorskip("plotext")
    monkeypatch.setenv("NO_COLOR", no_colour)
    monkeypatch.setenv("TERM", term)
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    assert cli.main(["plot", str(run), "--terminal"]) == 0
    assert ("\x1b[38;5;4m" in shown.getvalue()) is coloured


@pytest.mark.parametrize("log", [[], ["--log"]])
@pytest.mark.parametrize("losses", [[2.0], [3.0] * 9, [1e-30, 1e30], [0.0, 1.0], [0.0]])
def test_odd_curves(tmp_path: Path, losses: list[float], log: list[str]) -> None:
    pytest.importorskip("plotext")
    rows = [json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in enumerate(losses)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    assert cli.main(["plot", str(tmp_path), *log]) == 0


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["plot", "nothing"], ["nothing", "[run.missing]"]),
        (["plot", "RUN", "-o", "loss.txt"], ["loss.txt", ".png, .svg, .pdf, .html"]),
        (["plot", "RUN", "-o", "no/such/folder.html"], ["no/such/folder.html", "[file.unwritable]"]),
        (["plot", "RUN", "--curves", "hellaswag"], ["no hellaswag in RUN", "--curves", "[watch.no-curves]"]),
        (["plot", "RUN", "--x", "time"], ["no loss in RUN", "[watch.no-curves]"]),
        (["plot", "EMPTY", "-o", "loss.html"], ["no loss in EMPTY", "[watch.no-curves]"]),
        (["plot"], ["no run in runs", "llmpy train", "[run.missing]"]),
        (["watch", "nothing"], ["nothing", "[run.missing]"]), (["watch", "RUN", "--port", "70000"], ["--port 70000"]),
    ],
)  # fmt: skip
def test_errors_of_one_line(
    words: list[str], parts: list[str], run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent)
    run.rename("RUN")
    Path("EMPTY").mkdir()
    Path("EMPTY", "config.json").write_text("{}")
    assert cli.main(words) == 1
    err = capsys.readouterr().err
    assert all(part in err for part in parts), err
    assert err.count("\n") == 1
    assert files(run.parent) == []


@pytest.mark.parametrize(
    ("words", "package"),
    [
        (["plot", "-o", "loss.png"], "matplotlib"), (["plot", "-o", "loss.html"], "plotly"), (["plot"], "plotext"),
        (["watch"], "plotly"),
    ],
)  # fmt: skip
def test_without_a_package(
    words: list[str], package: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main([words[0], str(run), *words[1:]]) == 1
    err = capsys.readouterr().err
    assert package in err and "pip install 'llmpy[plot]' [package.missing]" in err and err.count("\n") == 1
    assert files(run.parent) == []


def test_the_newest_run_when_none_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("plotext")
    (run.parent / "runs").mkdir()
    run.rename(run.parent / "runs" / "mine")
    monkeypatch.chdir(run.parent)
    assert cli.main(["plot"]) == 0
    assert "mine" in capsys.readouterr().out
