"""Verified steps: every flipped bit that changes a gradient is reported, and nothing else."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from support.laptop import TINY, AtOnce, Laptop, tiny_model
from support.models import batch, build
from support.refused import refused

from llmpy import backend
from llmpy.data.shards import write_shard
from llmpy.model.families import with_adapters
from llmpy.options.train import TrainOptions
from llmpy.run import checkpoint_writer
from llmpy.run.folder import RunFolder
from llmpy.run.journal import Journal
from llmpy.train import assemble
from llmpy.train.nonfinite import computed, parameters
from llmpy.train.single_process import SingleProcess
from llmpy.train.trainer import Trainer
from llmpy.train.verification import Verification, hashes

OPERATIONS = (
    "embedding_forward", "layernorm_forward", "residual_layernorm_forward", "linear_forward", "attention_forward",
    "activation_forward", "classifier", "zero", "layernorm_backward", "linear_backward", "attention_backward",
    "embedding_backward", "digest",
)  # fmt: skip
FLIPS = int(os.environ.get("LLMPY_FLIPS", 10_000))
SCRATCH = ("_gemm_scratch", "_attention_scratch", "_partial", "_packed", "_sums", "_logits")


def options(folder: Path, **changes: Any) -> TrainOptions:
    """Return options of a run on random tokens; a step has two micro-batches."""
    for name in ("train.bin", "val.bin"):
        write_shard(folder / name, np.random.default_rng(0).integers(0, 300, 2000))
    given: dict[str, Any] = {
        "data": (folder / "train.bin", folder / "val.bin"), "out": folder / "run", "model": "d1", "vocab_size": 300,
        "batch_size": 2, "sequence_length": 8, "total_batch": 32, "steps": 4, "eval_every": 0, "eval_batches": 1,
        "sample_tokens": 1, "checkpoint_every": 2, "schedule": "constant",
    }  # fmt: skip
    return TrainOptions(**given | changes)


class Shaken:
    """A trainer whose machine flips one bit at the n-th operation of a verified step.

    `within`: by another thread, some time during the operation, to reach scratch memory; else before it.
    """

    def __init__(self, made: Trainer, machine: Any, within: bool) -> None:
        self.within = within
        self.made, self.model, self.machine = made, made.model, machine
        self.shape = made.options.batch_size, made.options.sequence_length
        self.ticks, self.moment, self.flip = 0, -1, (np.zeros(1, np.uint8), 0, 0)
        for name in OPERATIONS:
            setattr(machine, name, self._counted(getattr(machine, name)))
        made.update = made.data.read()
        made.agree(loss=0.0)
        self.step()
        self.step()
        # From the first hash of the parameters to the last of the gradients: what is compared.
        first = sum(1 for _ in parameters(self.model))
        last = self.ticks - first - sum(1 for _ in computed(self.model, *self.shape, wide=True))
        self.moments, self.gradient = (first, last + 1), self.hash_of_gradients()

    def _counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.ticks += 1
            if self.ticks - 1 != self.moment:
                return operation(*arguments, **named)
            flip = Thread(target=self.turn, args=(self.delay if self.within else 0.0,))
            flip.start()
            if not self.within:
                flip.join()
            result = operation(*arguments, **named)
            flip.join()
            return result

        return call

    def turn(self, delay: float = 0.0) -> None:
        time.sleep(delay)
        raw, byte, bit = self.flip
        raw[byte] ^= 1 << bit

    def hash_of_gradients(self) -> int:
        assert self.model.grads is not None
        return Laptop().digest(self.model.grads.buffer)

    def step(self) -> str:
        """Return what a verified step reports."""
        self.ticks = 0
        with np.errstate(all="ignore"):
            return self.made.verification.compare(self.made.accumulate)[1]

    def buffers(self) -> dict[str, list[np.ndarray]]:
        optimizer, grads = self.made.optimizer, self.model.grads
        assert grads is not None
        return {
            "weights": [self.model.trained.buffer],
            "activations": self.model.reserve(*self.shape, training=True).buffers,
            "gradients": [grads.buffer],
            "moments": [optimizer.m, optimizer.v],
            "scratch": [x for name in SCRATCH if (x := getattr(self.machine, name, None)) is not None and x.size],
        }

    def trial(self, rng: np.random.Generator) -> tuple[str, bool, bool]:
        """Flip one bit; return where, whether the gradient changed, and whether that was reported."""
        buffers = {name: found for name, found in self.buffers().items() if found}
        kind = str(rng.choice(list(buffers)))
        arrays = buffers[kind]
        raw = arrays[rng.integers(len(arrays))].reshape(-1).view(np.uint8)
        # Mostly the start of scratch memory: small products do not use the rest.
        self.flip = raw, int(raw.size * rng.random() ** (3 if kind == "scratch" else 1)), int(rng.integers(8))
        self.moment, self.delay = int(rng.integers(*self.moments)), float(rng.uniform(0, 2e-4))
        reported = self.step() != ""
        self.moment = -1
        changed = self.hash_of_gradients() != self.gradient
        if kind in ("weights", "moments"):  # others are computed again
            self.turn()
        return kind, changed, reported


def shaken(folder: Path, machine: Any, within: bool = False, **changes: Any) -> Shaken:
    run = RunFolder.open(folder / "run", "d1")
    with Journal() as journal:
        journal.quiet = True
        made = assemble.assemble(options(folder, verify_every=1, **changes), run, journal, machine)
        return Shaken(made, machine, within)


def campaign(made: Shaken, flips: int, clean: int) -> dict[str, list[int]]:
    """Return the flips, those that changed the gradient, and those reported, by kind of memory."""
    counts: dict[str, list[int]] = {}
    rng = np.random.default_rng(7)
    for _ in range(flips):
        kind, changed, reported = made.trial(rng)
        row = counts.setdefault(kind, [0, 0, 0])
        row[:] = row[0] + 1, row[1] + changed, row[2] + reported
        assert reported or not changed, f"not reported: {kind}, moment {made.moment}, {made.flip[1:]}"
        assert reported == {"weights": True, "moments": False}.get(kind, reported)
    for _ in range(clean):
        assert made.step() == ""
    assert made.hash_of_gradients() == made.gradient
    return counts


def test_every_flip_that_changes_a_gradient_is_reported(tmp_path: Path) -> None:
    counts = campaign(shaken(tmp_path, Laptop(), total_batch=16), flips=60, clean=3)
    assert counts["weights"][1] > 2 and counts["activations"][1] > 0


@pytest.mark.long
def test_ten_thousand_flips(tmp_path: Path) -> None:
    machine = backend.load("cpu", dtype="float32")
    made = shaken(tmp_path, machine, within=True, model="d4", batch_size=1, total_batch=8)
    counts = campaign(made, FLIPS, FLIPS)
    print(counts)
    # Every operation writes its scratch memory before it reads it, within microseconds: flips there rarely matter.
    assert all(counts[kind][1] for kind in ("weights", "activations", "gradients"))


class Flipping(Laptop):
    """Adds 2⁻²⁰ to the first number of the n-th product."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.calls, self.number = 0, number

    def linear_forward(self, out: Any, *arguments: Any) -> None:
        super().linear_forward(out, *arguments)
        self.calls += 1
        if self.calls == self.number:
            out.reshape(-1)[0] += 2**-20


def test_a_run_stops_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "Thread", AtOnce)
    assert assemble.train(options(tmp_path, out=tmp_path / "whole"), Laptop(), quiet=True) == 0
    counting = Flipping(0)
    given = options(tmp_path, verify_every=3, steps=3)
    assert assemble.train(given, counting, quiet=True) == 0
    assert assemble.train(options(tmp_path, out=tmp_path / "other", verify_every=0, steps=3), Laptop(), quiet=True) == 0
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "other")]
    assert models[0] == models[1]
    # Step 4, of a resumed process: verified as its first. The products of evaluations come after those of its passes.
    more = TrainOptions(resume=tmp_path / "run", verify_every=1, steps=4, given=frozenset({"verify_every", "steps"}))
    with refused(
        "run.bits-differ", "step 4: the activation attn_stats of layer 0", "step 3 is from before", "--resume"
    ):
        assemble.train(more, Flipping(5), quiet=True)
    assert assemble.train(more, Laptop(), quiet=True) == 0
    last = [tmp_path / name / "model.safetensors" for name in ("run", "whole")]
    assert last[0].read_bytes() == last[1].read_bytes()


def test_ranks_with_other_data_stop(tmp_path: Path) -> None:
    class Two(SingleProcess):
        def gather_values(self, value: Any) -> list[Any]:
            return [value, json.loads(json.dumps(value).replace('"tokens": 2', '"tokens": 3'))]

    with refused("rank.data-differ", "rank 1: ", "same files"):
        assemble.train(options(tmp_path), Laptop(), world=Two(), quiet=True)
    assert not (tmp_path / "run").exists()


def test_which_steps_are_verified(tmp_path: Path) -> None:
    def verified(every: int, first: int, last: int) -> list[int]:
        made = Verification(tiny_model(), TrainOptions(verify_every=every))
        return [done for done in range(first, last) if made.due(done, last - done)]

    assert verified(100, 0, 350) == [0, 100, 200, 300]
    assert verified(100, 130, 350) == [130, 200, 300] and verified(100, 300, 350) == [300]
    assert verified(100, 0, 99) == [] and verified(100, 290, 350) == [300]
    assert verified(1, 0, 3) == [0, 1, 2]
    assert verified(0, 0, 200) == []


def test_a_frozen_weight_is_compared_with_the_start() -> None:
    """Both computations of a step read the same wrong weight."""
    config = with_adapters(TINY, 2)
    model = build(config, Laptop())
    model.reserve(2, 8, training=True)
    made = Verification(model, TrainOptions(batch_size=2, sequence_length=8))
    tokens, targets = batch(config, 2, 8)

    def compare() -> str:
        return made.compare(lambda _: model.loss_and_grads(tokens, targets))[1]

    assert compare() == compare() == ""
    model.trained.buffer[:] += 1
    assert compare() == ""
    model.params.mlp_fc_w[1, 2, 3] += 1
    assert compare() == "the frozen parameter mlp_fc_w of layer 1"


def test_kernels_in_reverse_order_compute_the_same(tmp_path: Path) -> None:
    given = options(tmp_path, verify_every=1, dtype="bfloat16", steps=2)
    assert assemble.train(given, backend.load("cpu", threads=3, dtype="bfloat16"), quiet=True) == 0


def test_names_and_hashes_cover_every_number() -> None:
    model = tiny_model()
    tokens, targets = batch(TINY, 2, 8)
    model.loss_and_grads(tokens, targets)
    named = {**dict(parameters(model)), **dict(computed(model, 2, 8))}
    assert sum(x.size for name, x in named.items() if "activation" not in name) == 2 * model.params.size
    before = hashes(model, named.items())
    for name, x in named.items():
        x.reshape(-1)[-1] += 1
        after = hashes(model, named.items())
        assert [other for other in named if before[other] != after[other]] == [name]
        before = after
