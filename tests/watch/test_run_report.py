"""`llmpy report`: the page has the figures of the run, and its command repeats the run to the bit."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from support.laptop import in_place_of_the_cpu
from support.refused import refused

from llmpy.cli import main as cli
from llmpy.options.watch import ReportOptions
from llmpy.watch.run_report import report, ticks, verdict

FIXTURES = Path(__file__).parents[1] / "fixtures" / "0.1.0"
TRAIN = (
    "train --data text.txt --model d1 -B 2 -T 16 --eval-every 3 --eval-batches 1 --sample-tokens 4 --vocab-size 300 "
    "--schedule cosine --prompt a|b --checkpoint-every 3"
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a text, where the command line trains on the reference."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llmpy.backend.cpu.CPU", in_place_of_the_cpu)
    Path("text.txt").write_text("the cat sat on the mat and the dog ran to the sea\n" * 200, "utf-8")
    return tmp_path


def run(*lines: str) -> None:
    for line in lines:
        assert cli.main(shlex.split(line)) == 0, line


def rows(page: str) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|]+) \| (.*) \|$", page, re.MULTILINE))


def commands(page: str) -> list[str]:
    return re.findall(r"^llmpy (train .*)$", page, re.MULTILINE)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_command_of_a_resumed_run_repeats_it(here: Path) -> None:
    run(f"{TRAIN} --steps 4 --out one", "train --resume one --steps 7", "report one")
    page = Path("one/report.md").read_text("utf-8")
    assert "one after another, repeat the run" in page and "From step 4, weights of hash " in page
    assert commands(page)[1] == "train --resume one --steps 7"
    Path("one").rename("first")
    run(*commands(page))  # each resumes the one before
    assert digest(Path("one/model.safetensors")) == digest(Path("first/model.safetensors"))
    run(f"{TRAIN} --steps 7 --out two")
    for name, more in (("cut", ""), ("moved", "--threads 3")):
        shutil.copytree("two", name)
        shutil.rmtree(Path(name, "checkpoints/step-00000007"))
        run(f"report {name}")
        unfinished = Path(name, "report.md").read_text("utf-8")  # metrics are ahead of the last checkpoint
        last = max(int(path.name[5:]) for path in Path(name, "checkpoints").iterdir())
        assert (
            rows(unfinished)["steps"] == f"{last} of 7"
            and " has not finished" in unfinished
            and "SHA" not in unfinished
        )
        run(f"train --resume {name} {more}", f"report {name}")
    run("report two")
    moved, page, uncut = (Path(name, "report.md").read_text("utf-8") for name in ("moved", "cut", "two"))
    assert commands(page) == commands(uncut)  # it was only interrupted
    (command,) = commands(uncut)
    assert sorted(commands(moved)[0].split()) == sorted(f"{command} --out moved".split())
    assert commands(moved)[1:] == ["train --resume moved --threads 3"]
    assert all(" bit for bit," in " ".join(text.split()) for text in (moved, page))
    lines = [json.loads(line) for line in Path("cut/metrics.jsonl").read_text("utf-8").splitlines()]
    losses, scores = ([row[name] for row in lines if name in row] for name in ("loss", "val_loss"))
    found = rows(page)
    assert found["steps"] == "7 of 7" and found["training tokens"] == str(7 * 2 * 16)
    assert found["training loss (nats per token)"] == f"{losses[-1]:.4f}"
    assert found["validation loss (nats per token)"] == f"{scores[-1]:.4f}"
    assert found["lowest validation loss"].startswith(f"{min(scores):.4f} at step ")
    assert found["SHA-256 of model.safetensors"] == digest(Path("cut/model.safetensors"))
    assert page.count("\nStep ") == 1 and "\nStep 7:\n" in page
    picture = ElementTree.parse("cut/report.svg")
    (curve,) = [e for e in picture.iter() if e.tag.endswith("polyline")]
    x, y = np.array([pair.split(",") for pair in curve.attrib["points"].split()], float).T
    assert np.corrcoef(x, range(1, 8))[0, 1] > 0.9999 and np.corrcoef(y, losses)[0, 1] < -0.9999
    assert len([e for e in picture.iter() if e.tag.endswith("circle")]) == len(scores)
    (again,) = commands(page)
    run(f"{again} --out again")
    assert digest(Path("again/model.safetensors")) == found["SHA-256 of model.safetensors"]


def test_fine_tuning_is_repeated_with_its_schedule(here: Path) -> None:
    """Its defaults are others: `--schedule cosine` is one of `train`'s and must appear."""
    run(f"{TRAIN} --steps 1 --out base", "train --init base --data text.txt -B 2 -T 16 --steps 2 --schedule cosine "
        "--eval-batches 1 --sample-tokens 1 --out tuned", "report tuned -o t.md")  # fmt: skip
    (again,) = commands(Path("t.md").read_text("utf-8"))
    assert "--init base" in again and "--schedule cosine" in again and "--beta2" not in again
    run(f"{again} --out again", "report base", "report again")
    pages = (Path(name).read_text("utf-8") for name in ("t.md", "again/report.md", "base/report.md"))
    tuned, repeated, base = (re.findall("From step 0, weights of hash ([0-9a-f]{16}): ", page) for page in pages)
    assert tuned == repeated != base and len(base) == 1
    assert digest(Path("again/model.safetensors")) == digest(Path("tuned/model.safetensors"))


def test_runs_of_earlier_versions_and_unfinished_ones(here: Path) -> None:
    run(f"report {shlex.quote(str(FIXTURES / 'finished'))} -o old.md")
    found = rows(Path("old.md").read_text("utf-8"))
    assert found["steps"] == "8 of 8" and found["lowest validation loss"] == "5.1361 at step 8"
    assert Path("old.svg").exists()
    shutil.copytree(FIXTURES / "stopped", "stopped")
    run("report stopped")
    page = Path("stopped/report.md").read_text("utf-8")
    assert "depend on the clock" in page and "time of training steps" not in page and "SHA-256" not in page
    Path("stopped/metrics.jsonl").unlink()
    Path("stopped/report.svg").unlink()
    Path("stopped/samples.txt").write_text("--- step 3\n```\n# no heading\n", "utf-8")
    config = Path("stopped/config.json")
    config.write_text(config.read_text("utf-8").replace("/text.txt", "/\\udcff.txt"), "utf-8")
    run("report stopped")
    page = Path("stopped/report.md").read_text("utf-8")
    assert "--data '?.txt'" in page
    assert "svg" not in page and not Path("stopped/report.svg").exists()
    assert "\n````text\n```\n# no heading\n````\n" in page


HOSTILE = (
    '{"options": {}, "model": {"layers": 1, "heads": 1, "channels": 4, "context": 8, "vocab_size": 9}, "starts": [%s]}'
)


@pytest.mark.parametrize(
    "record",
    [
        HOSTILE % '{"step": 1%s}' % ("0" * 400),
        HOSTILE % "[]",
        '{"options": {}}',
        '{"options": {}, "model": {"x": 1}, "machine": {}}',
        "{}",
    ],
)
def test_nothing_is_written_of_a_run_that_has_not_started(here: Path, record: str) -> None:
    Path("new").mkdir()
    Path("new/config.json").write_text(record, "utf-8")
    with refused("run.bad-config", "config.json"):
        report(ReportOptions(Path("new")), print)
    with refused("run.missing", "nowhere"):
        report(ReportOptions(Path("nowhere")), print)
    with refused("option.invalid", "--out page.html"):
        ReportOptions(out=Path("page.html"))
    with refused("file.unwritable", "none"):
        report(ReportOptions(FIXTURES / "finished", Path("none/page.md")), print)
    assert sorted(p.name for p in here.rglob("*")) == ["config.json", "new", "text.txt"]


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [(0, 100, [0, 20, 40, 60, 80, 100]), (1.9, 8.4, [2, 4, 6, 8]), (-0.1, 0.2, [-0.1, 0, 0.1, 0.2])],
)
def test_ticks(low: float, high: float, marks: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(marks)


def test_an_unfinished_run_promises_nothing() -> None:
    start = {"step": 0, "llmpy": "0.2.0", "ranks": 1, "options": {"steps": 600}, "machine": {"isa": "avx2"}}
    assert "bit for bit" in verdict([start], start["options"], finished=True)
    assert "not finished" in verdict([start], start["options"], finished=False)
    more = start | {"step": 600, "options": {"steps": 900}}
    assert "one after another" in verdict([start, more], more["options"], finished=True)
    assert "none repeats" in verdict([start, more | {"step": 400}], more["options"], finished=True)
    kept = start | {"step": 400, "options": {"steps": 600, "keep": 5, "checkpoint_every": 5}}
    assert "bit for bit" in verdict([start, kept], kept["options"], finished=True)
    assert "one after another" in verdict([start, kept, more], more["options"], finished=True)
    assert "Not all starts" in verdict([more], more["options"], finished=True)
    assert "Not all starts" in verdict([start], start["options"], finished=True, complete=False)
