"""The choice of an ending, and the accuracy that a run reports."""

import json
import math
import signal

import numpy as np
import pytest
from support.laptop import TINY, Laptop, tiny_model
from support.refused import refused

from llmpy.data.hellaswag import Example, read_examples, write_examples
from llmpy.data.shards import write_shard
from llmpy.options.train import TrainOptions
from llmpy.train import assemble
from llmpy.train.multiple_choice import MultipleChoice


@pytest.fixture
def path(tmp_path):
    return tmp_path / "hellaswag_val.bin"


def example(*lengths):
    parts = [np.arange(n) for n in lengths]
    return Example(parts[0], tuple(parts[1:]), 1)


def of(rng, right):
    lengths = rng.integers(1, 6, 5)
    context, *endings = (rng.integers(0, 300, n) for n in lengths)
    return Example(context, tuple(endings), right)


def likeliest(model, example):
    """Return the ending of least mean -log p, each token from the logits of its prefix."""
    means = []
    for ending in example.endings:
        text = [*example.context.tolist(), *ending.tolist()]
        nats = []
        for at in range(len(example.context), len(text)):
            logits = model.logits(np.array([text[:at]], np.int32))[0].astype(np.float64)
            nats.append(math.log(np.exp(logits).sum()) - logits[text[at]])
        means.append(sum(nats) / len(nats))
    return int(np.argmin(means))


def test_the_ending_of_least_mean_loss_is_chosen(path):
    rng = np.random.default_rng(0)
    examples = [of(rng, int(rng.integers(4))) for _ in range(40)]
    write_examples(path, examples)
    model = tiny_model()
    model.params.buffer[...] = rng.normal(size=model.params.size) * 0.5
    choices = MultipleChoice(read_examples(path, 300), TINY)
    right = [choices.right(model, i) for i in range(40)]
    assert right == [likeliest(model, example) == example.label for example in examples]
    assert 0 < sum(right) < 40


def test_longer_than_the_context(path):
    write_examples(path, [example(8, 1, 9, 1, 1), example(8, 1, 10, 1, 1)])
    with refused("hellaswag.too-long", "--hellaswag", 18, 16):
        MultipleChoice(read_examples(path, 300), TINY)
    write_examples(path, [example(8, 1, 9, 1, 1)])
    MultipleChoice(read_examples(path, 300), TINY).right(tiny_model(), 0)


def test_a_run_reports_the_accuracy(tmp_path, path, capsys):
    rng = np.random.default_rng(1)
    write_examples(path, [of(rng, 1) for _ in range(5)])
    for name in ("train.bin", "val.bin"):
        write_shard(tmp_path / name, rng.integers(0, 300, 500))
    given = {
        "data": (tmp_path / "train.bin", tmp_path / "val.bin"), "model": "d1", "vocab_size": 300, "batch_size": 2,
        "sequence_length": 16, "steps": 4, "eval_every": 2, "eval_batches": 1, "sample_tokens": 1, "hellaswag": path,
    }  # fmt: skip

    class Stopping(Laptop):
        losses = 0

        def classifier(self, *arguments):
            super().classifier(*arguments)
            self.losses += arguments[-2] == 0.0  # evaluation
            if self.losses == 9 and arguments[-2] == 0.0:  # 1 + 5, then amid the next
                signal.raise_signal(signal.SIGTERM)

    assert assemble.train(TrainOptions(**given, out=tmp_path / "whole"), Laptop()) == 0
    assert assemble.train(TrainOptions(**given, out=tmp_path / "run"), Stopping()) == 143
    assert assemble.train(TrainOptions(resume=tmp_path / "run"), Laptop()) == 0
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text("utf-8").splitlines()]
    found = {row["step"]: row["hellaswag"] for row in rows if "hellaswag" in row}
    assert list(found) == [0, 2, 4]
    assert all(5 * share in range(6) for share in found.values())
    log = (tmp_path / "whole" / "main.log").read_text("utf-8")
    assert f"\ns:2 eval:{found[2]:.4f}\n" in log
    assert (tmp_path / "run" / "main.log").read_text("utf-8") == log
    assert f"step 2: HellaSwag accuracy {found[2]:.4f} ({round(5 * found[2])} of 5)\n" in capsys.readouterr().out
    with refused("file.missing", tmp_path / "none"):
        assemble.train(TrainOptions(**given | {"hellaswag": tmp_path / "none"}, out=tmp_path / "bad"), Laptop())
    assert not (tmp_path / "bad").exists()
