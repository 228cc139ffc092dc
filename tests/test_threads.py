"""One model in several threads, models in several threads, forked processes: the results of one thread alone."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.laptop import Laptop
from support.refused import refused

from llmpy import GPT2, Tokenizer, Trainer, backend
from llmpy.backend.cpu import jit, pool
from llmpy.model.config import ModelConfig

SMALL = ModelConfig(layers=2, heads=2, channels=32, context=32, vocab_size=257)
CALLERS = 8


def made(seed: int = 1, threads: int = 2, **more: Any) -> GPT2:
    """Return a model whose texts differ: large weights."""
    machine = more.pop("machine", None) or backend.load("cpu", threads=threads)
    model = GPT2.new(SMALL, tokenizer=Tokenizer.bytes(), seed=seed, machine=machine)
    for values in model.parameters.values():
        values *= 8 if values.ndim > 1 else 1
    model.store_weights()
    return model


@pytest.fixture(scope="module")
def model() -> GPT2:
    return made()


def batch(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 257, (1 + n % 3, 5 + n % 20))


def text(model: GPT2, n: int) -> str:
    return model.generate("ab"[: 1 + n % 2], 10 + n % 30, temperature=1.0, seed=n + 1)


def gradients(model: GPT2, n: int) -> list[bytes]:
    """Read after others had the time to overwrite them."""
    loss, grads = model.loss_and_grads(batch(n))
    model.loss(batch(n + 1))
    return [np.float64(loss).tobytes(), *(g.tobytes() for g in grads.values())]


CALLS: dict[str, Callable[[GPT2, int], object]] = {
    "texts": text,
    "losses": lambda model, n: model.loss(batch(n)),
    "gradients": gradients,
    "logits": lambda model, n: model.logits(batch(n), -1).tobytes(),
    "all": lambda model, n: (text, CALLS["losses"], gradients, CALLS["logits"])[n % 4](model, n),
}


def at_once(call: Callable[[int], object], count: int) -> list[object]:
    with ThreadPoolExecutor(CALLERS) as callers:
        return list(callers.map(call, range(count)))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *((name, 16) for name in ("texts", "losses", "gradients", "logits")),
        ("all", 32),
        *(pytest.param(name, 200, marks=pytest.mark.long) for name in CALLS),
    ],
)
def test_threads_share_a_model(model: GPT2, name: str, count: int) -> None:
    call = CALLS[name]
    alone = [call(model, n) for n in range(count)]
    assert at_once(lambda n: call(model, n), count) == alone


@pytest.mark.parametrize("shared", [False, True], ids=["own machines", "one machine"])
def test_models_in_threads(shared: bool) -> None:
    """Also on machines with other numbers of threads, and made meanwhile."""
    machine = backend.load("cpu", threads=2) if shared else None
    alone = [CALLS["all"](made(n % 3, 1 + n % 3, machine=machine), n) for n in range(12)]
    assert at_once(lambda n: CALLS["all"](made(n % 3, 1 + n % 3, machine=machine), n), 12) == alone


def test_streams_in_turns_and_in_other_threads(model: GPT2) -> None:
    """A server may take each piece of a text in another thread."""
    alone = ["".join(model.stream("ab", 20, temperature=1.0, seed=n + 1)) for n in range(4)]
    streams = [model.stream("ab", 20, temperature=1.0, seed=n + 1) for n in range(4)]
    texts = [""] * 4

    def take(n: int) -> None:
        texts[n] += next(streams[n], "")

    for _ in range(21):
        threads = [threading.Thread(target=take, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert texts == alone


def test_a_model_that_changes_ends_its_texts() -> None:
    model = made()
    stream = model.stream("ab", 20)
    next(stream)
    at_once(lambda _: model.store_weights(), 1)
    with refused("model.changed"):
        list(stream)
    assert text(model, 1) == text(model, 1)


def test_machines_made_at_once_hire_each_helper_once() -> None:
    at_once(lambda n: backend.load("cpu", threads=2 + n % 6), 24)
    names = [helper.name for helper in pool._helpers]
    assert len(set(names)) == len(names) >= 6


def test_hiring_joins_no_job() -> None:
    """The thread would be worker 0, as is the one that runs the job."""
    jit.hire(2)
    board = pool._memory[(pool.BOARD - pool._memory.ctypes.data) // 8 :]
    board[pool.KERNEL] = 1  # another thread runs a kernel
    try:
        hiring = threading.Thread(target=jit.hire, args=(2,), daemon=True)
        hiring.start()
        hiring.join(60)
        assert not hiring.is_alive()
    finally:
        board[pool.KERNEL] = 0


def test_quiet_trainers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """They keep the output of the other threads, and of the program afterwards."""
    monkeypatch.chdir(tmp_path)
    before = sys.stdout
    options = {"batch_size": 2, "sequence_length": 16, "steps": 2, "eval_batches": 1, "sample_tokens": 5}
    data = np.random.default_rng(0).integers(0, 50, 3000)

    def train(n: int) -> list[float]:
        run = Trainer("d1", data=data, out=f"run{n}", machine=Laptop(), vocab_size=50, **options)
        return run.run(verbose=False).curve()[1]

    curves = at_once(train, 3)
    assert curves[0] == curves[1] == curves[2]
    assert sys.stdout is before
    assert capsys.readouterr().out == ""


@pytest.fixture
def forked() -> Iterator[Callable[[Callable[[], bool]], bool]]:
    """A function that returns what a call returns in a forked process."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork")

    def run(call: Callable[[], bool]) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: the process has threads
            child = os.fork()
        if not child:
            code = 3
            try:
                signal.alarm(60)  # ends a child that hangs
                code = 0 if call() else 1
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    yield run


def test_a_forked_process_computes(model: GPT2, forked: Any) -> None:
    """With helpers of its own; and so does its child, and the parent afterwards."""
    alone = [CALLS["all"](model, n) for n in range(8)]

    def same() -> bool:
        again = [CALLS["all"](model, n) for n in range(8)]
        return again == alone and len(pool._helpers) >= 1 and all(h.is_alive() for h in pool._helpers)

    assert forked(same)
    assert forked(lambda: forked(same))
    assert forked(lambda: at_once(lambda n: CALLS["all"](model, n), 8) == alone)
    assert same()


def test_a_fork_while_other_threads_compute(model: GPT2, forked: Any) -> None:
    """Their locks, and the jobs of their kernels, do not exist in the child."""
    alone = [CALLS["losses"](model, n) for n in range(4)]
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            model.loss(batch(1))

    threads = [threading.Thread(target=compute) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            assert forked(lambda: [CALLS["losses"](model, n) for n in range(4)] == alone)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
