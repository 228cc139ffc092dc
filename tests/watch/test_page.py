"""The page of `llmpy watch` in a real browser: a run that trains, dies and goes on; a folder that wants to break it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.browser import PROGRAM, Browser, started

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium (Debian: apt install chromium-headless-shell)"),
    pytest.mark.skipif(os.name != "posix", reason="the pipes to the browser are POSIX"),
]
MILLION = 1_000_000
FIRST_PAINT_MS = 2000

# A step takes a fiftieth of a second, so that the test sees the curve grow and not only its end.
TRAINING = """
import sys, time
from support.laptop import Laptop
from llmpy.cli import main as cli
from llmpy.train import assemble
class Slow(Laptop):
    def global_norm(self, *arguments):
        time.sleep(0.02)
        return super().global_norm(*arguments)
given = [cli.TrainOptions(resume=cli.Path(words[1])) if words[0] == "resume" else cli.TrainOptions(
    data=(cli.Path(words[0]),), model="d1", out=cli.Path(words[1]), batch_size=2, sequence_length=16, steps=2000,
    eval_every=20, eval_batches=2, sample_tokens=5, sample_every=15, vocab_size=300, checkpoint_every=10, lr=1e-3)
    for words in [sys.argv[1:]]]
sys.exit(assemble.train(given[0], Slow()))
"""


class Training:
    """A run as a process of its own."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", TRAINING, *words], stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
        )  # fmt: skip

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


def serve(stack: ExitStack, *words: str) -> tuple[subprocess.Popen[str], str]:
    """`llmpy watch`, ended with the test at the latest."""
    process, address = started(*words)

    def end() -> None:
        process.kill()
        process.communicate()

    stack.callback(end)
    return process, address


CELL = "Number((document.querySelectorAll('#runs tr')[%d]?.cells[%d].textContent || '-1').replace(/,/g, ''))"
INKED = """(() => {
  const canvas = document.querySelector('#loss canvas'), {width, height} = canvas;
  const ink = css('--run%d').match(/\\d+/g).map(Number);
  const {data} = canvas.getContext('2d').getImageData(0, 0, width, height);
  let count = 0;
  for (let i = 0; i < data.length; i += 4)
    count += Math.abs(data[i] - ink[0]) + Math.abs(data[i + 1] - ink[1]) + Math.abs(data[i + 2] - ink[2]) < 12;
  return count;
})()"""
BOX = """(() => { const {left, top, width, height} = document.querySelector('#loss canvas').getBoundingClientRect();
return [left, top, width, height] })()"""


def metrics(run: Path) -> dict[int, float]:
    """Step → loss."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines) if "loss" in row}


def hover(browser: Browser, share: float) -> str:
    """What is shown when the pointer is over the loss, that far to the right."""
    left, top, width, height = browser.run(BOX)
    browser.mouse("mouseMoved", left + share * width, top + height / 2)
    return str(browser.until("document.querySelector('#loss .hover').innerText"))


def test_a_run_from_start_to_resume(tmp_path: Path, browser: Browser, stack: ExitStack) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog ran to the sea\n" * 200, "utf-8")
    one, two = tmp_path / "runs" / "one", tmp_path / "runs" / "two"
    training = Training(str(text), str(one))
    stack.callback(training.kill)
    end = time.monotonic() + 30
    while not (one / "metrics.jsonl").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    process, address = serve(stack, str(tmp_path / "runs"), "--port", str(41_000 + os.getpid() % 20_000))
    browser.go(address)
    browser.run("window.never = 'reloaded'")

    # The curve grows.
    browser.until(f"{CELL % (0, 1)} > 5")
    before = browser.run(CELL % (0, 1))
    browser.until(f"{CELL % (0, 1)} > {before + 40}")
    assert browser.run("document.querySelector('#runs tr').innerText").count("training") == 1
    assert browser.run(INKED % 0) > 200
    assert browser.run(INKED % 1) == 0
    for key in ("loss", "lr", "grad_norm", "tokens_per_s", "share_of_peak", "val_bits_per_byte"):
        assert not browser.run(f"document.getElementById('{key}').hidden"), key
    assert browser.run("document.getElementById('hellaswag').hidden")
    assert browser.run("document.querySelector('#runs tr').cells[7].textContent").endswith((" s", " min"))
    browser.until("document.querySelector('#samples pre')?.textContent")

    # A point tells its step and value, and they are those of the file.
    step, loss = hover(browser, 0.5).split("step ")[1].split(": ")[:2]
    assert float(loss.split(" ")[0]) == pytest.approx(metrics(one)[int(step)], rel=1e-3)

    # A second run lies over the first.
    other = Training(str(text), str(two))
    stack.callback(other.kill)
    browser.until(f"{INKED % 1} > 50")
    assert "two to step" in browser.run("document.querySelector('#loss canvas').ariaLabel")
    hover(browser, 0.1)
    assert browser.run("document.querySelectorAll('#loss .hover p').length") == 2
    browser.run("document.querySelectorAll('#runs input')[1].click()")
    browser.until(f"{INKED % 1} === 0")
    other.kill()

    # The run is killed, and goes on from its checkpoint: the page follows it back and on.
    training.kill()
    browser.until("!document.querySelector('#runs tr').innerText.includes('training')")
    last = browser.run(CELL % (0, 1))
    assert last == max(metrics(one))
    resumed = Training("resume", str(one))
    stack.callback(resumed.kill)
    browser.until("document.querySelector('#runs tr').innerText.includes('training')")
    browser.until(f"{CELL % (0, 1)} > {last + 10}")
    resumed.kill()
    browser.until(f"{CELL % (0, 1)} === {max(metrics(one))}")
    shown = browser.run("Object.fromEntries(known.get(%s).picture.curves.loss.step.map((s, i, all) => "
                        "[s, known.get(%s).picture.curves.loss.mean[i]]))" % ((json.dumps(str(one)),) * 2))  # fmt: skip
    assert {int(s): v for s, v in shown.items()} == pytest.approx(metrics(one), rel=1e-5)

    # The server ends, and another one takes its place.
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    browser.until("document.getElementById('said').textContent.includes('does not answer')")
    assert browser.run(INKED % 0) > 200
    with (one / "metrics.jsonl").open("a") as file:
        file.write('{"step": 123456, "loss": 1.0}\n')
    serve(stack, str(tmp_path / "runs"), "--port", address.rstrip("/").rpartition(":")[2])
    browser.until(f"{CELL % (0, 1)} === 123456")
    assert browser.run("document.getElementById('said').textContent") == ""
    assert browser.run("window.never") == "reloaded"
    assert [f for f in browser.faults if "ERR_CONNECTION_REFUSED" not in f] == []


EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script></pre><svg onload=alert(3)>"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A run folder whose every text is markup, with numbers that are none."""
    run = tmp_path / "runs" / EVIL.replace("/", "∕")
    run.mkdir(parents=True)
    rows: list[Any] = [{"step": s, "loss": 5 - s / 100, "grad_norm": 1.0, "lr": 1e-3} for s in range(1, 101)]
    rows[50] |= {"skipped": EVIL, "batches": EVIL}
    rows[60] |= {"loss": float("nan"), "grad_norm": float("inf")}
    rows[70] |= {"loss": EVIL, "tokens_per_s": [EVIL], EVIL: EVIL, "__proto__": {"polluted": 1}}
    rows[80] |= {"grad_norm": 1e12, "norm_z": 11.3}
    text = "".join(json.dumps(row) + "\n" for row in rows) + "[" * 50_000 + '\n{"step": 101, "loss": 3.9'
    (run / "metrics.jsonl").write_text(text)
    (run / "samples.txt").write_text(f"--- step 7\n{EVIL}\n\n", "utf-8")
    (run / "config.json").write_text(json.dumps({"options": {"model": EVIL, "lr": {EVIL: 1}}, "machine": EVIL}))
    return run


def look_for_harm(browser: Browser) -> None:
    """Nothing of EVIL became an element, and nothing ran."""
    assert (
        browser.run("document.querySelectorAll('img, svg, #charts script, #samples script, #runs script').length") == 0
    )
    assert browser.run("({}).polluted") is None
    assert browser.run("document.querySelector('#samples pre').textContent") == EVIL
    assert EVIL[:60] in browser.run("document.querySelector('#runs tr').innerText")  # the model of config.json
    assert browser.run(CELL % (0, 1)) == 100
    assert browser.run(INKED % 0) > 200
    at = "charts[0].pixel(%d) / document.querySelector('#loss canvas').clientWidth"
    assert f"step 51: skipped: {EVIL}" in hover(browser, browser.run(at % 51))
    assert "step 71: loss <img src=x" in hover(browser, browser.run(at % 71))
    assert browser.faults == []


def test_a_hostile_run_is_only_text(tmp_path: Path, hostile: Path, browser: Browser, stack: ExitStack) -> None:
    _, address = serve(stack, str(hostile), "--port", str(42_000 + os.getpid() % 20_000))
    browser.go(address)
    browser.until(f"{CELL % (0, 1)} === 100")
    browser.until("charts[0].y")
    look_for_harm(browser)
    # A script that came in nevertheless would not run.
    browser.run(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
    )
    assert browser.run("window.ran") is None
    assert any("Content Security Policy" in fault for fault in browser.faults)


def test_a_saved_page_needs_no_server(tmp_path: Path, hostile: Path, browser: Browser) -> None:
    page = tmp_path / "page.html"
    words = [sys.executable, "-m", "llmpy", "plot", str(hostile), "-o", str(page)]
    assert subprocess.run(words, capture_output=True).returncode == 0
    shutil.rmtree(hostile)
    browser.go(page.as_uri())
    browser.until("charts[0].y")
    look_for_harm(browser)


def test_a_million_lines(tmp_path: Path, browser: Browser, stack: ExitStack) -> None:
    """The first look at them, from the request to the drawn curve, over all steps; then all of them, none lost."""
    run = tmp_path / "run"
    run.mkdir()
    with (run / "metrics.jsonl").open("w") as file:
        for begin in range(0, MILLION, 10_000):
            file.writelines(
                f'{{"step": {s}, "loss": {3 + 100 / (s + 15):.6f}, "lr": 0.0006, "grad_norm": 0.5}}\n'
                for s in range(begin + 1, begin + 10_001)
            )
        file.write('{"step": 1000001, "loss": 1')
    spike = f'{{"step": 654321, "loss": {3 + 100 / (654321 + 15):.6f},'
    with (run / "metrics.jsonl").open("r+b") as raw:  # one step that no look here and there would find
        data = raw.read()
        raw.seek(data.index(spike.encode()))
        raw.write(spike.replace("3.00", "9.00").encode())
    for attempt in range(3):  # each with a server that has read nothing: another process may delay one, not all
        _, address = serve(stack, str(run), "--port", str(43_000 + os.getpid() % 20_000))
        browser.go(address)
        took = browser.until("charts[0].y ? performance.now() : 0")
        if took < FIRST_PAINT_MS:
            break
        assert attempt < 2, f"{took:.0f} ms"
    assert browser.run(CELL % (0, 1)) > 0.99 * MILLION
    assert browser.run(INKED % 0) > 200
    browser.until(f"{CELL % (0, 1)} === {MILLION} && [...known.values()][0].read === 1", 60)
    curve = browser.run("known.values().next().value.picture.curves.loss")
    assert len(curve["step"]) <= 1000
    assert max(curve["largest"][100:]) == pytest.approx(9, abs=0.01)

    # The part around the spike, in full.
    left, top, width, _ = browser.run(BOX)
    inside = width - 58 - 12
    ends = [left + 58 + inside * share for share in (0.64, 0.67)]
    browser.mouse("mouseMoved", ends[0], top + 60)
    browser.mouse("mousePressed", ends[0], top + 60, "left")
    browser.mouse("mouseMoved", ends[1], top + 60)
    browser.mouse("mouseReleased", ends[1], top + 60, "left")
    browser.until("known.values().next().value.picture.curves.loss.step[0] > 600000")
    curve = browser.run("known.values().next().value.picture.curves.loss")
    at = max(range(len(curve["largest"])), key=lambda i: curve["largest"][i])
    assert abs(curve["step"][at] - 654321) <= 64
    browser.run("document.getElementById('whole').click()")
    browser.until("known.values().next().value.picture.curves.loss.step[0] < 1000")
    assert browser.faults == []

    # Beside a run that is shown it fills its row, and is not waited for.
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 3.0}) + "\n")
    for attempt in range(3):
        _, address = serve(stack, str(other), str(tmp_path), "--port", str(43_000 + os.getpid() % 20_000))
        browser.go(address)
        took = browser.until(f"charts[0].y && {CELL % (1, 1)} === {MILLION} ? performance.now() : 0")
        if took < FIRST_PAINT_MS:
            break
        assert attempt < 2, f"{took:.0f} ms"
    assert browser.run("[...known.values()].map((run) => !!run.picture)") == [True, False]
    assert browser.faults == []


def batches(folder: Path) -> None:
    """Two runs below: `large` reads four times as many tokens a step as `small`, and takes twice as long."""
    for name, ms, tokens in (("small", 1000.0, 500), ("large", 2000.0, 2000)):
        run = folder / name
        run.mkdir(parents=True)
        rows: list[dict[str, Any]] = [
            {"step": s, "loss": 9 / s, "ms": ms, "tokens_per_s": tokens / ms * 1000, "norm_z": 9.0 * (s == 300),
             "grad_norm": 1.0 + (s == 300)} for s in range(1, 1001)
        ]  # fmt: skip
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


CHOOSE = """(() => { const list = document.getElementById('axis');
list.value = '%s'; list.dispatchEvent(new Event('change')); return list.value })()"""
# What is written below the charts: the text, and how far it lies from the right edge of its canvas.
WRITTEN = """(() => {
  const told = [], write = CanvasRenderingContext2D.prototype.fillText;
  CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
    if (this.textAlign === 'center') told.push([text, this.canvas.clientWidth - x - this.measureText(text).width / 2]);
    write.call(this, text, x, y);
  };
  charts.forEach((chart) => chart.draw());
  CanvasRenderingContext2D.prototype.fillText = write;
  return told;
})()"""


def test_the_axis_below(tmp_path: Path, browser: Browser, stack: ExitStack) -> None:
    """Steps, tokens or time: chosen, kept when the page is loaded anew, pointed at, dragged over."""
    batches(tmp_path)
    words = str(tmp_path / "small"), str(tmp_path / "large"), "--port", str(45_000 + os.getpid() % 20_000)
    _, address = serve(stack, *words)
    browser.go(address)
    browser.until("charts[0].y")
    assert browser.run("charts[0].x") == [1, 1000]
    assert browser.run("document.getElementById('axis').value") == "step"
    share = {"step": 1, "tokens": 0.25, "seconds": 0.5}
    for axis, last in (("seconds", 2000), ("tokens", 2_000_000)):
        assert browser.run(CHOOSE % axis) == axis
        browser.until(f"charts[0].x?.[1] === {last}")
        ends = browser.run("charts[0].lines().map(({run, line}) => charts[0].pixel(line[look.axis].at(-1)))")
        first, width = browser.run("[charts[0].pixel(charts[0].x[0]), charts[0].width]")
        assert (ends[0] - first) / width == pytest.approx(share[axis], abs=0.001)
    browser.go(address)
    browser.until("charts[0].x?.[1] === 2000000")
    assert browser.run("document.getElementById('axis').value") == "tokens"

    said = hover(browser, 0.2)
    small, large = (int(part.split(":")[0].replace(",", "")) for part in said.split("step ")[1:3])
    assert small == pytest.approx(4 * large, abs=4)
    assert said.count("k tokens") == 2

    # A part of it is asked for in tokens: of the two runs these are different steps.
    left, top, width, _ = browser.run(BOX)
    inside = width - 58 - 12
    browser.mouse("mouseMoved", left + 58 + inside * 0.1, top + 60)
    browser.mouse("mousePressed", left + 58 + inside * 0.1, top + 60, "left")
    browser.mouse("mouseMoved", left + 58 + inside * 0.2, top + 60)
    browser.mouse("mouseReleased", left + 58 + inside * 0.2, top + 60, "left")
    shown = "[...known.values()].map((run) => [run.picture.curves.loss.step[0], run.picture.curves.loss.step.at(-1)])"
    browser.until("known.values().next().value.picture.curves.loss.step[0] > 1")
    assert browser.run(shown) == [pytest.approx([400, 800], abs=5), pytest.approx([100, 200], abs=2)]
    browser.run("document.getElementById('whole').click()")

    # Outliers lie where their steps do.
    browser.until("known.values().next().value.picture.outliers.length")
    at = browser.run("[...known.values()].map((run) => charts[2].pixelOf(run, run.picture.outliers[0][0]))")
    assert at == browser.run("[150000, 600000].map((tokens) => charts[2].pixel(tokens))")

    # Nothing that is written below is cut off, whatever ends at the edge.
    for axis, last in (("step", "1,000"), ("tokens", "2M"), ("seconds", "30 min")):
        browser.run(CHOOSE % axis)
        written = browser.run(WRITTEN)
        assert last in [text for text, _ in written]
        assert min(room for _, room in written) >= 0
    assert browser.faults == []


def test_a_run_that_tells_no_tokens(tmp_path: Path, browser: Browser, stack: ExitStack) -> None:
    batches(tmp_path)
    page = tmp_path / "page.html"
    words = [sys.executable, "-m", "llmpy", "plot", str(tmp_path / "large"), "--x", "time", "-o", str(page)]
    assert subprocess.run(words, capture_output=True).returncode == 0
    browser.go(page.as_uri())  # without a server, on the axis that was asked for
    browser.until("charts[0].x?.[1] === 2000")
    browser.run(CHOOSE % "tokens")
    browser.until("charts[0].x[1] === 2000000")
    (tmp_path / "small" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
    (tmp_path / "small" / "samples.txt").write_text("--- step 2\nthe cat\n\n")
    _, address = serve(
        stack, str(tmp_path / "small"), str(tmp_path / "large"), "--port", str(46_000 + os.getpid() % 20_000)
    )
    browser.go(address)
    browser.until("charts[0].y")
    browser.run(CHOOSE % "tokens")
    browser.until("document.querySelector('#runs tr').innerText.includes('its metrics tell no tokens')")
    browser.until("charts[0].lines().length === 1")
    assert browser.run("document.querySelector('#samples pre')?.textContent") == "the cat"  # which lies along no axis
    browser.run(CHOOSE % "step")
    browser.until("charts[0].lines().length === 2")
    assert "metrics tell" not in browser.run("document.getElementById('runs').innerText")
    assert browser.faults == []


def test_light_dark_and_keyboard(tmp_path: Path, browser: Browser, stack: ExitStack) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": 9 / s}) + "\n" for s in range(1, 50)))
    _, address = serve(stack, str(run), "--port", str(44_000 + os.getpid() % 20_000))
    browser.go(address)
    browser.until("charts[0].y")
    back = "getComputedStyle(document.body).backgroundColor"
    light = browser.run(back)
    inked = browser.run(INKED % 0)
    browser.dark(True)
    browser.until(f"{back} !== '{light}'")
    browser.until(f"{INKED % 0} > {inked / 2}")  # in the colour that css() gives now
    browser.run("document.getElementById('theme').click()")  # light, whatever the system prefers
    browser.until(f"{back} === '{light}'")
    browser.run("document.querySelector('#loss canvas').focus()")
    key = {"key": "ArrowRight", "bubbles": True}
    browser.run(f"document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {json.dumps(key)}))")
    assert browser.until("document.querySelector('#loss .hover').innerText").startswith("step 1: 9")
    browser.run("document.getElementById('log').click()")
    browser.until("charts[0].y[1] < 2")  # a logarithm
    assert browser.faults == []
