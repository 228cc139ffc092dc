"""Parameters that stand still are named within 100 steps; those that cannot have a gradient are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fellows import Fellow, Fellows
from support.laptop import TINY, Laptop, tiny_model
from support.models import batch, build

from llmpy.data.shards import write_shard
from llmpy.distributed.zero import Zero
from llmpy.model.config import LlamaConfig
from llmpy.model.families import with_adapters
from llmpy.options.train import TrainOptions
from llmpy.train import assemble
from llmpy.train.movement import ENOUGH, Movement
from llmpy.train.optimizer import AdamW

LLAMA = LlamaConfig(layers=2, heads=4, channels=8, context=16, vocab_size=300, kv_heads=2, ffn=12, qkv_bias=True)
CONFIGS = {"gpt2": TINY, "llama": LLAMA, "gpt2 lora": with_adapters(TINY, 2)}


def warnings(folder: Path, machine: Laptop, **changes: Any) -> list[str]:
    """Train 100 steps; return the warnings."""
    for name in ("train.bin", "val.bin"):
        write_shard(folder / name, np.random.default_rng(0).integers(0, 200, 2000))
    given: dict[str, Any] = {
        "data": (folder / "train.bin", folder / "val.bin"), "out": folder / "run", "model": "d1", "vocab_size": 300,
        "batch_size": 2, "sequence_length": 8, "steps": ENOUGH, "eval_every": 0, "eval_batches": 1, "sample_tokens": 1,
        "checkpoint_every": 0,
    }  # fmt: skip
    assert assemble.train(TrainOptions(**given | changes), machine, quiet=True) == 0
    lines = (folder / "run" / "console.log").read_text("utf-8").splitlines()
    return [line for line in lines if line.startswith("warning: ")]


class Unwritten(Laptop):
    """Does not write one number of the bias gradient of products with 256 outputs, nor bias gradients of norms."""

    def linear_backward(self, dinp: Any, dweight: Any, dbias: Any, *arguments: Any) -> None:
        kept = None if dbias is None else dbias[3]
        super().linear_backward(dinp, dweight, dbias, *arguments)
        if dbias is not None and len(dbias) == 256:
            dbias[3] = kept

    def layernorm_backward(self, dinp: Any, dweight: Any, dbias: Any, *arguments: Any) -> None:
        super().layernorm_backward(dinp, dweight, dbias.copy(), *arguments)


class UpdatesMatrices(Laptop):
    """Updates the moments of vectors, but not the vectors."""

    def adamw(self, param: Any, grad: Any, m: Any, v: Any, lr: float, *arguments: Any) -> None:
        super().adamw(param if arguments[3] else param.copy(), grad, m, v, lr, *arguments)


def test_nothing_stands_still(tmp_path: Path) -> None:
    """Not even positions and tokens that never occur."""
    assert warnings(tmp_path, Laptop()) == []


def test_unwritten_gradients_are_named(tmp_path: Path) -> None:
    (line,) = warnings(tmp_path, Unwritten())
    names = [f"64 of 64 numbers of {name}" for name in ("ln_1_b of layer 0", "ln_2_b of layer 0", "ln_f_b")]
    names.insert(2, "1 of 256 numbers of mlp_fc_b of layer 0")
    assert line == "warning: without a gradient in 100 updates: " + ", ".join(names)


def test_vectors_without_updates_are_named(tmp_path: Path) -> None:
    """Also in a shorter run, once."""
    (line,) = warnings(tmp_path, UpdatesMatrices(), steps=20, checkpoint_every=5)
    assert (
        line == "warning: unchanged since the start: ln_1_w of layer 0, ln_1_b of layer 0, attn_qkv_b of layer 0, "
        "attn_proj_b of layer 0 and 6 more"
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_family_moves(kind: str) -> None:
    config = CONFIGS[kind]
    model = build(config, Laptop())
    model.reserve(2, 8, training=True)
    optimizer = AdamW(model)
    movement = Movement(model, optimizer)
    for step in range(20):
        model.loss_and_grads(*batch(config, 2, 8, step))
        optimizer.step(1e-3)
        movement.updates += 1
    assert movement.without_gradient() == movement.unmoved() == []
    name = next(t.name for t in reversed(model.trained.table))
    place = movement.places[-1][-1]
    optimizer.m[place] = optimizer.v[place] = 0
    assert [name in line for line in movement.without_gradient()] == [True]


def test_each_rank_watches_its_part() -> None:
    def act(fellow: Fellow) -> tuple[list[str], int]:
        model = build(TINY, Laptop())
        model.reserve(2, 8, training=True)
        optimizer = Zero(model, fellow, 0.9, 0.95, 0.1, 1.0, limit=700)
        movement, found = Movement(model, optimizer), []
        for step in range(10):
            optimizer.expect()
            model.loss_and_grads(*batch(TINY, 2, 8, step))
            optimizer.update(1e-3, optimizer.norm())
            movement.updates += 1
        found += movement.without_gradient() + movement.unmoved()
        name, place = next((name, place) for t, name, _, place in movement.places if t.per_layer)
        optimizer.m[place] = optimizer.v[place] = 0
        (line,) = movement.without_gradient()
        assert line.endswith(f"numbers of {name}")
        return found, sum(place.stop - place.start for *_, place in movement.places)

    ranks = Fellows(3).run(act)
    assert [found for found, _ in ranks] == [[], [], []]
    assert sum(size for _, size in ranks) == tiny_model().params.size
