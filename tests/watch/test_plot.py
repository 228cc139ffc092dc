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
from llmpy.options.watch import CURVES
from llmpy.watch import letters as terminal
from llmpy.watch import plot

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
    ("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".html", b"<!doctype html>")]
)
def test_every_format_twice_the_same(run: Path, tmp_path: Path, suffix: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib")
    written = []
    for _ in range(2):
        path = tmp_path / f"loss{suffix}"
        assert cli.main(["plot", str(run), str(run), "-o", str(path), "--curves", "loss", "share_of_peak"]) == 0
        assert files(tmp_path) == [path.name]  # no temporary file stays
        written.append(path.read_bytes())
    assert written[0].startswith(magic)
    # A page names the process that read the run; else all bytes are the same.
    assert suffix == ".html" or written[0] == written[1]


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
    page = tmp_path / "loss.html"
    assert cli.main(["plot", *batches, "-o", str(page), "--x", x]) == 0
    assert f'"axis": "{plot.AXES[x]}"' in page.read_text("utf-8")


@pytest.mark.parametrize(
    ("x", "below"),
    [
        ("steps", "1 step 100"),
        ("tokens", "0.025 tokens (millions) 10"),
        ("time", "0.01 time in training steps (hours) 2"),
    ],
)
def test_the_axis_in_the_terminal(
    batches: list[str], x: str, below: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["plot", *batches, "--x", x]) == 0
    assert [row for row in capsys.readouterr().out.splitlines() if " ".join(row.split()) == below]


def test_the_page_holds_its_numbers(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "loss.html"
    assert cli.main(["plot", str(run), "-o", str(path), "--smooth", "3"]) == 0
    held = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"))
    assert held is not None
    (row,) = json.loads(held[1])["runs"]
    assert row["name"] == str(run)
    assert row["picture"]["smoothed"] == 3
    assert row["picture"]["curves"]["loss"]["step"] == list(range(1, 201))


def test_a_page_shows_all_there_is_whatever_is_wanted(run: Path, tmp_path: Path) -> None:
    words = ["plot", str(run), "-o", str(tmp_path / "run.html"), "--curves", "hellaswag"]
    assert cli.main(words) == 0
    assert cli.main([*words, "--terminal"]) == 1


def test_text_needs_no_terminal(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.main(["plot", str(run), "--curves", "loss", "lr"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "\x1b" not in "".join(lines)
    assert max(map(len, lines)) < 60 + len(str(run))
    assert max(len(row) for row in lines if "┤" in row or "│" in row) <= 59
    assert lines[0] == "loss"
    assert "** " + str(run) + ": " in "\n".join(lines)  # two curves without colours: letters
    assert any(0x2800 < ord(letter) < 0x2900 for letter in "".join(lines))  # one curve: dots


def test_the_last_number_is_the_last_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run whose curve is drawn in buckets, too."""
    rows = [{"step": step, "loss": 9 - step / 500} for step in range(1, 998)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["plot", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith(f"{tmp_path}: 7.006\n")


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
    monkeypatch.setenv("NO_COLOR", no_colour)
    monkeypatch.setenv("TERM", term)
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    assert cli.main(["plot", str(run), "--terminal"]) == 0
    assert ("\x1b[34m" in shown.getvalue()) is coloured


def test_a_console_without_unicode(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert cli.main(["plot", str(run)]) == 0
    shown.seek(0)
    text = shown.read()
    assert "|" in text
    assert "?" not in text


def dots(rows: list[str]) -> np.ndarray:
    """Braille letters → (4·rows, 2·columns) of bool."""
    cells = [[ord(c) - 0x2800 if c != " " else 0 for c in row] for row in rows]
    codes = np.array([row + [0] * (max(map(len, cells)) - len(row)) for row in cells])
    grid = np.zeros((4 * codes.shape[0], 2 * codes.shape[1]), bool)
    for row in range(4):
        for column in range(2):
            grid[row::4, column::2] = codes >> terminal.BITS[row, column] & 1
    return grid


def test_the_dots_lie_on_the_line() -> None:
    steps = np.arange(100.0)
    rows = terminal.chart([(steps, 100 - steps)], 62, lambda v: f"{v:3.0f}", False, True)
    grid = dots([row[5:] for row in rows[:-1]])
    assert grid.shape == (64, 114)
    for row, column in np.argwhere(grid):
        assert abs(row / 63 - column / 113) < 0.02
    assert grid.any(axis=0).all()  # without a gap
    assert rows[0].startswith("100 ┤")
    assert rows[-1].split() == ["0", "step", "99"]
    assert len(rows[-1]) == 62


def test_an_axis_of_less_than_one_is_as_wide() -> None:
    """As millions of tokens are, or hours."""
    rows = [
        terminal.chart([(at, np.arange(9.0))], 62, str, False, True)[:-1] for at in (np.arange(9.0), np.arange(9) / 64)
    ]
    assert rows[0] == rows[1]


def test_odd_lines() -> None:
    for line in (
        (np.array([5.0]), np.array([2.0])),
        (np.arange(9.0), np.full(9, 3.0)),
        (np.arange(2.0), np.array([0.0, 1e30])),
    ):
        for log in (False, True):
            rows = terminal.chart([line], 1, str, True, True, log)
            assert any("\x1b[34m" in row for row in rows)


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
        (["plot", "RUN", "--x", "time"], "the metrics of RUN tell no time — leave --x or that run out"),
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


def test_without_matplotlib(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["plot", str(run), "-o", str(run / "loss.png")]) == 1
    assert "pip install 'llmpy[plot]'" in capsys.readouterr().err
    assert not (run / "loss.png").exists()


def test_the_newest_run_when_none_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.parent / "runs").mkdir()
    run.rename(run.parent / "runs" / "mine")
    monkeypatch.chdir(run.parent)
    assert cli.main(["plot"]) == 0
    assert "mine: " in capsys.readouterr().out
    assert tuple(plot.TITLES) == CURVES
