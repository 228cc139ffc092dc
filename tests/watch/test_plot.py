"""`llmpy plot`: pictures, pages and text from run folders."""

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
    """A run of 200 steps with two validations, in a folder that means something to every format."""
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
def test_the_picture_shows_the_curve(run: Path, tmp_path: Path) -> None:
    """The path in the SVG goes through the points: as many vertices, and falling as the loss does."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "loss.svg"
    assert cli.main(["plot", str(run), "-o", str(path), "--smooth", "0"]) == 0
    paths = [re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", d) for d in re.findall(r' d="([^"]*)"', path.read_text())]
    xy = next(np.array(p, float) for p in paths if len(p) == 200)
    loss = np.array([6 * 0.99**s + 0.1 * (s % 3) for s in range(1, 201)])
    assert np.corrcoef(xy[:, 0], np.arange(200))[0, 1] == pytest.approx(1, abs=1e-6)
    assert np.corrcoef(xy[:, 1], loss)[0, 1] == pytest.approx(-1, abs=1e-6)  # down is up


@needs_matplotlib
@pytest.mark.parametrize(("x", "ratio"), [("steps", 1.0), ("tokens", 4.0), ("time", 2.0)])
def test_the_axis_that_was_asked_for(batches: list[str], tmp_path: Path, x: str, ratio: float) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "loss.svg"
    assert cli.main(["plot", *batches, "-o", str(path), "--smooth", "0", "--x", x]) == 0
    paths = [re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", d) for d in re.findall(r' d="([^"]*)"', path.read_text())]
    small, large = (np.array(p, float)[:, 0] for p in paths if len(p) == 100)
    assert np.ptp(large) / np.ptp(small) == pytest.approx(ratio, rel=1e-4)
    assert np.diff(small) == pytest.approx(np.ptp(small) / 99, abs=1e-4)


@pytest.mark.parametrize(
    ("x", "below"),
    [
        ("steps", "step"),
        ("tokens", "tokens (millions)"),
        ("time", "training time (minutes)"),
    ],
)
def test_the_axis_in_the_terminal(
    batches: list[str], x: str, below: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("plotext")
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["plot", *batches, "--x", x]) == 0
    assert below in [" ".join(row.split()) for row in capsys.readouterr().out.splitlines()]


def test_a_page_needs_nothing_from_elsewhere(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    path = tmp_path / "run.html"
    assert cli.main(["plot", str(run), "-o", str(path)]) == 0
    page = path.read_text("utf-8")
    assert "default-src 'none'" in page
    assert not re.search(r"<(script|link)[^>]*(src|href)=", page)
    assert "<b>" not in page[page.rindex("Plotly.newPlot") :]  # the name of the run stays text
    for curve in ("loss", "learning rate", "share of peak (%)"):  # all there is, unless --curves says otherwise
        assert f'"text":"{curve}"' in page


def test_text_needs_no_terminal(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotext")
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.main(["plot", str(run), "--curves", "loss", "lr"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert "\x1b" not in text
    assert max(map(len, lines)) <= 59
    assert lines[0].strip() == "loss"
    assert "** " in text  # two curves without colours: letters
    assert any(0x2800 < ord(letter) < 0x2900 for letter in text)  # one curve: dots


def test_the_last_number_is_the_last_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run whose curve is thinned and averaged, too."""
    pytest.importorskip("plotext")
    rows = [{"step": step, "loss": 9 - step / 500} for step in range(1, 998)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["plot", str(tmp_path)]) == 0
    assert "7.006 " in capsys.readouterr().out


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


def test_a_console_without_unicode(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotext")
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert cli.main(["plot", str(run)]) == 0
    shown.seek(0)
    text = shown.read()
    assert "|" in text
    assert "?" not in text


@pytest.mark.parametrize("log", [[], ["--log"]])
@pytest.mark.parametrize("losses", [[2.0], [3.0] * 9, [1e-30, 1e30], [0.0, 1.0], [0.0]])
def test_odd_curves(tmp_path: Path, losses: list[float], log: list[str]) -> None:
    pytest.importorskip("plotext")
    rows = [json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in enumerate(losses)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    assert cli.main(["plot", str(tmp_path), *log]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plot", "nothing"], "no run folder nothing"),
        (["plot", "RUN", "-o", "loss.txt"], "use a name that ends in .png, .svg, .pdf, .html"),
        (["plot", "RUN", "--smooth", "-1"], "--smooth -1"),
        (["plot", "RUN", "-o", "no/such/folder.html"], "cannot write"),
        (
            ["plot", "RUN", "--curves", "hellaswag"],
            "no hellaswag in RUN yet — wait for the first step, or choose other",
        ),
        (["plot", "RUN", "--x", "time"], "no loss in RUN yet"),
        (["plot", "EMPTY", "-o", "loss.html"], "no loss in EMPTY yet"),
        (["plot", "EMPTY"], "no loss in EMPTY yet — wait for the first step"),
        (["plot"], "no run here — name the folder of a run, or begin one: llmpy train"),
        (["watch", "nothing"], "no run folder nothing"),
        (["watch", "RUN", "--port", "70000"], "--port 70000"),
    ],
)
def test_faults_of_one_line(
    words: list[str], said: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent)
    run.rename("RUN")
    Path("EMPTY").mkdir()
    Path("EMPTY", "config.json").write_text("{}")
    assert cli.main(words) == 1
    err = capsys.readouterr().err
    assert said in err
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
    assert f"needs {package}" in err and "pip install 'llmpy[plot]'" in err and err.count("\n") == 1
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
