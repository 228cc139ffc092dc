"""No thread can be started: the same results with fewer."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from support.laptop import Laptop
from support.models import untrained_run

from llmpy.backend.cpu import pool
from llmpy.data.encode import encode
from llmpy.data.records import Document
from llmpy.data.tokenizer import Tokenizer
from llmpy.formats import open_model
from llmpy.model.gpt2 import GPT2
from llmpy.options.train import TrainOptions
from llmpy.system import thread_limit
from llmpy.train import assemble


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no thread start, as under a limit of processes."""

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    thread_limit.few.cache_clear()
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setattr(threading.Thread, "start", start)
    yield
    thread_limit.few.cache_clear()


def test_work_is_the_same_without_threads(
    tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_model(untrained_run(tmp_path))
    texts = [Document("a", "one two three " * 50), Document("b", "four")]

    def everything(out: Path) -> list[object]:
        params = GPT2(source.config, Laptop()).params
        source.fill(params)
        tokenizer = Tokenizer.train((t.text for t in texts), 270)
        ids = [block.ids.tolist() for block in encode(tokenizer, texts)]
        (tmp_path / "text.txt").write_text("one two three four " * 300, "utf-8")
        options = TrainOptions(
            data=(tmp_path / "text.txt",), model="d1", out=out, batch_size=2, sequence_length=8, steps=3,
            eval_batches=1, sample_tokens=1, checkpoint_every=1, keep=0,
        )  # fmt: skip
        assert assemble.train(options, Laptop()) == 0
        return [params.buffer.tobytes(), ids, (out / "model.safetensors").read_bytes()]

    expected = everything(tmp_path / "one")
    request.getfixturevalue("limit")
    assert everything(tmp_path / "two") == expected
    assert len(list((tmp_path / "two" / "checkpoints").iterdir())) == 3
    assert capsys.readouterr().err.count("pids.max") == 1
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    before = len(pool._helpers)
    pool.hire(before + 3, lambda worker, spins: None)
    assert len(pool._helpers) == before


def test_threads_are_used_where_they_can_be() -> None:
    thread_limit.few.cache_clear()
    assert not thread_limit.few()
