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

WORDS, DIGITS = "the cat sat on the mat and ran ", "7 1 3 9 "


@pytest.mark.parametrize(
    ("first", "last", "masked", "batches"),
    [
        (DIGITS, WORDS, False, 3), (DIGITS, WORDS, True, 3), (WORDS, DIGITS, False, 2),
        ("日本 語、水火 ", "the cat 🙂 ", False, 3),  # characters of several bytes, cut by batches
        (DIGITS, WORDS, True, -1), (DIGITS, WORDS, False, -1),  # all but what no batch holds
    ],
)  # fmt: skip
def test_bytes_of_the_measured_targets(first: str, last: str, masked: bool, batches: int, tmp_path: Path) -> None:
    """Not of the rest of the validation text, whose tokens may be longer or shorter."""
    texts = [(first if i < 190 else last) * 9 for i in range(200)]
    lines = [json.dumps({"prompt": text[:20], "completion": text[20:]} if masked else {"text": text}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    options = TrainOptions(
        data=(tmp_path / "a.jsonl",), out=tmp_path / "run", model="d1", batch_size=2, sequence_length=16, steps=1,
        eval_batches=batches, sample_tokens=1, vocab_size=300, checkpoint_every=0,
    )  # fmt: skip
    assert train(options, Laptop()) == 0
    tokenizer = Tokenizer.load(tmp_path / "run" / "tokenizer.json")
    val = open_shard(tmp_path / "run" / "val.bin", tokenizer.vocab_size)
    most = (len(val) - 1) // 32
    ids = val.tokens[: (most if batches < 0 else batches) * 32 + 1]
    assert batches < 0 or batches < most
    counted = np.ones(len(ids), bool) if val.mask is None else val.mask[: len(ids)] != 0
    targets = ids[1:][counted[1:]]
    size = tokenizer.byte_lengths()[targets].sum()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (row,) = (row for row in rows if row["step"] == 1 and "val_loss" in row)
    expected = row["val_loss"] * len(targets) / math.log(2) / size
    assert row["val_bits_per_byte"] == pytest.approx(expected, rel=1e-6)
