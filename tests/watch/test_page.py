"""The page of `llmpy watch` in a real browser: a run that trains, dies and resumes; a hostile folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.browser import PROGRAM, Browser, started

pytest.importorskip("plotly")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium (Debian: apt install chromium-headless-shell)"),
    pytest.mark.skipif(os.name != "posix", reason="the pipes to the browser are POSIX"),
]

# A step takes at least 20 ms, so that the test sees the curve grow.
TRAINING = """
import sys, time
from support.laptop import Laptop
from llmpy.train import assemble
from llmpy.options.train import Path, TrainOptions
class Slow(Laptop):
    def global_norm(self, *arguments):
        time.sleep(0.02)
        return super().global_norm(*arguments)
given = [TrainOptions(resume=Path(words[1])) if words[0] == "resume" else TrainOptions(
    data=(Path(words[0]),), model="d1", out=Path(words[1]), batch_size=2, sequence_length=16, steps=2000,
    eval_every=20, eval_batches=2, sample_tokens=5, sample_every=15, vocab_size=300, checkpoint_every=10, lr=1e-3)
    for words in [sys.argv[1:]]]
sys.exit(assemble.train(given[0], Slow()))
"""
READY = "!!document.querySelector('#figure .trace')"
STEP = "Number((document.querySelectorAll('#runs tr')[%d]?.cells[1].textContent || '-1').replace(/,/g, ''))"
ROW = "document.querySelector('#runs tr').innerText"
# Arrays are packed in the server's answer, and plain in the chart.
DRAWN = "document.getElementById('figure')._fullData.filter((trace) => trace.yaxis === 'y')[0]"


@pytest.fixture
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


Serve = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def serve(stack: ExitStack) -> Serve:
    """A function that starts `llmpy watch` for the duration of the test."""

    def start(*words: str, port: int = 40_000 + os.getpid() % 20_000) -> tuple[subprocess.Popen[str], str]:
        process, address = started(*words, "--port", str(port))
        stack.callback(process.communicate)
        stack.callback(process.kill)
        return process, address

    return start


def write(run: Path, rows: list[dict[str, Any]]) -> Path:
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def metrics(run: Path) -> dict[int, float]:
    """Step → loss."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_a_run_from_start_to_resume(tmp_path: Path, browser: Browser, stack: ExitStack, serve: Serve) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog ran to the sea\n" * 200, "utf-8")
    one, two = tmp_path / "runs" / "one", tmp_path / "runs" / "two"

    def training(*words: Path | str) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
        command = [sys.executable, "-c", TRAINING, *map(str, words)]
        made = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": path})
        stack.callback(made.wait)
        stack.callback(made.kill)
        return made

    first = training(text, one)
    end = time.monotonic() + 30
    while not (one / "metrics.jsonl").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    server, address = serve(str(tmp_path / "runs"))
    browser.go(address)
    browser.run("window.never = 'reloaded'")

    # The curve grows.
    before = browser.until(f"{READY} && {STEP % 0}")
    browser.until(f"{STEP % 0} > {before + 40}")
    assert browser.run(ROW).count("training") == 1
    charts = browser.run("figure.layout.annotations.map((title) => title.text)")
    assert charts == ["loss", "learning rate", "gradient norm", "tokens per second", "share of peak (%)",
                      "validation bits per byte"]  # fmt: skip
    assert browser.run("document.querySelector('#runs tr').cells[7].textContent").endswith((" s", " min"))
    assert browser.run("document.title").endswith("left – llm.py")
    browser.until("document.querySelector('#samples pre')?.textContent")

    # A second run appears next to the first, and the first box hides a run.
    other = training(text, two)
    browser.until("new Set(figure.data.map((trace) => trace.line.color)).size === 2")
    browser.run("document.querySelectorAll('#runs input')[0].click()")
    browser.until("new Set(figure.data.map((trace) => trace.line.color)).size === 1")
    browser.run("document.querySelectorAll('#runs input')[0].click()")

    # The first is killed and resumes from its checkpoint: the page follows it back and forward.
    for process in (first, other):
        process.kill()
        process.wait()
    shutil.rmtree(two)
    browser.until(f"document.querySelectorAll('#runs tr').length === 1 && !{ROW}.includes('training')")
    last = browser.run(STEP % 0)
    assert last == max(metrics(one))
    resumed = training("resume", one)
    browser.until(f"{ROW}.includes('training') && {STEP % 0} > {last + 10}")
    resumed.kill()
    resumed.wait()
    browser.until(f"{STEP % 0} === {max(metrics(one))}")
    steps, losses = (browser.until(f"[...{DRAWN}.{axis}]") for axis in "xy")
    assert dict(zip(steps, losses, strict=True)) == pytest.approx(metrics(one), rel=1e-5)

    # The server stops, and another one replaces it.
    server.send_signal(signal.SIGINT)
    assert server.wait(20) == 0
    browser.until("document.getElementById('status').textContent.includes('does not answer')")
    with (one / "metrics.jsonl").open("a") as file:
        file.write('{"step": 123456, "loss": 1.0}\n')
    serve(str(tmp_path / "runs"), port=int(address.rstrip("/").rpartition(":")[2]))
    browser.until(f"{STEP % 0} === 123456")
    assert browser.run("document.getElementById('status').textContent") == ""
    assert browser.run("window.never") == "reloaded"
    assert [f for f in browser.errors if "ERR_CONNECTION_REFUSED" not in f] == []


EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script></pre><b>%{x}&amp;"


def test_a_hostile_run_is_only_text(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    rows: list[Any] = [{"step": s, "loss": 5 - s / 100, "grad_norm": 1.0, "lr": 1e-3} for s in range(1, 101)]
    rows[60] |= {"loss": float("nan"), "grad_norm": float("inf"), "skipped": EVIL}
    rows[70] |= {"loss": EVIL, "tokens_per_s": [EVIL], EVIL: EVIL, "__proto__": {"polluted": 1}}
    run = write(tmp_path / "runs" / EVIL.replace("/", "∕"), rows)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("[" * 50_000 + '\n{"step": 101, "loss": 3.9')
    (run / "samples.txt").write_text(f"--- step 7\n{EVIL}\n\n", "utf-8")
    (run / "config.json").write_text(json.dumps({"options": {"model": EVIL, "lr": {EVIL: 1}}, "machine": {}}))
    page = tmp_path / "page.html"
    words = [sys.executable, "-m", "llmpy", "plot", str(run), "-o", str(page)]
    assert subprocess.run(words, capture_output=True).returncode == 0
    _, address = serve(str(run))
    alien = "document.querySelectorAll('img, b, #figure script, #samples script, #runs script').length"
    for place in (address, page.as_uri()):
        browser.go(place)
        browser.until(READY)
        left, top, width, height = browser.run(
            "(({left, top, width, height}) => [left, top, width, height])"
            "(document.querySelector('#figure .nsewdrag').getBoundingClientRect())"
        )
        browser.hover(left + width / 2, top + height / 2)
        shown = browser.until("document.querySelector('#figure .hoverlayer')?.textContent")
        assert run.name in shown  # unchanged, including markup
        assert browser.run(alien) == 0 and browser.run("({}).polluted") is None
        share = browser.run("[...document.querySelectorAll('.modebar-btn')].map((button) => button.dataset.title)")
        assert len(share) == 4 and not any("hare" in title or "loud" in title for title in share)
        assert browser.errors == []
        if place == address:
            assert browser.run("document.querySelector('#samples pre').textContent") == EVIL
            assert EVIL[:60] in browser.run(ROW)  # the model of config.json
            assert browser.run(STEP % 0) == 100
            script = "Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'})"
            browser.run(f"document.body.append({script})")  # even an injected script would not run
            assert browser.run("window.ran") is None
            assert any("Content Security Policy" in error for error in browser.errors)
            browser.errors.clear()


def test_controls_and_colours(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    for name, rate in (("small", 500 / 60), ("large", 2000 / 60)):
        rows = [{"step": s, "loss": 9 / s, "ms": 60_000.0, "tokens_per_s": rate} for s in range(1, 1001)]
        write(tmp_path / name, rows)
    _, address = serve(str(tmp_path / "small"), str(tmp_path / "large"))
    browser.go(address)
    browser.until(READY)
    choose = "(() => { const list = document.getElementById('%s'); list.value = '%s'; list.onchange() })()"
    axis = "document.getElementById('figure')._fullLayout.%saxis"
    drawn = "document.getElementById('figure')._fullData"
    for name, last, title in (("time", 1000, "training time (minutes)"), ("tokens", 2, "tokens (millions)")):
        browser.run(choose % ("axis", name))
        browser.until(f"{axis % 'x'}.title.text === '{title}'")
        assert max(browser.run(f"{drawn}.map((trace) => trace.x.at(-1))")) == pytest.approx(last)
    traces = browser.run(f"{drawn}.length")
    browser.run(choose % ("over", "0"))
    browser.until(f"{drawn}.length < {traces}")
    browser.run("document.getElementById('log').click()")
    browser.until(f"{axis % 'y'}.type === 'log'")
    back, ink = "getComputedStyle(document.body).backgroundColor", "figure.layout.font.color"
    light = browser.run(f"[{back}, {ink}]")
    browser.dark(True)
    browser.until(f"{back} !== '{light[0]}' && {ink} !== '{light[1]}'")
    assert browser.errors == []


def test_a_run_without_numbers(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    (tmp_path / "config.json").write_text("{}")
    _, address = serve(str(tmp_path))
    browser.go(address)
    browser.until("document.getElementById('status').textContent === 'no numbers yet'")
    assert browser.errors == []
