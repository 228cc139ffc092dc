"""Bits per byte count the bytes of the targets that were measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from support.laptop import Laptop

from llmpy.data.shards import open_shard
from llmpy.data.tokenizer import Tokenizer
from llmpy.options.train import TrainOptions
from llmpy.train.assemble import train


@pytest.mark.parametrize("messages", [False, True])
def test_bytes_of_the_measured_targets(messages: bool, tmp_path: Path) -> None:
    """Not of the rest of the validation text: here digits, then words with long tokens."""
    texts = ["7 1 3 9 " * 9 if i < 190 else "the cat sat on the mat and ran " * 9 for i in range(200)]
    lines = [
        json.dumps({"prompt": text[:20], "completion": text[20:]} if messages else {"text": text}) for text in texts
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    options = TrainOptions(
        data=(tmp_path / "a.jsonl",), out=tmp_path / "run", model="d1", batch_size=2, sequence_length=16, steps=1,
        eval_batches=3, sample_tokens=1, vocab_size=300, checkpoint_every=0,
    )  # fmt: skip
    assert train(options, Laptop()) == 0
    tokenizer = Tokenizer.load(tmp_path / "run" / "tokenizer.json")
    val = open_shard(tmp_path / "run" / "val.bin", tokenizer.vocab_size)
    ids = val.tokens[: 3 * 2 * 16 + 1]
    counted = np.ones(len(ids), bool) if val.mask is None else val.mask[: len(ids)] != 0
    targets = ids[1:][counted[1:]]
    size = tokenizer.byte_lengths()[targets].sum()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (row,) = (row for row in rows if row["step"] == 1 and "val_loss" in row)
    expected = row["val_loss"] * len(targets) / math.log(2) / size
    assert row["val_bits_per_byte"] == pytest.approx(expected, rel=1e-6)
