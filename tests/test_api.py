"""The names of `import llmpy`: what they give, and that what comes in is checked before any kernel sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.laptop import TINY, Laptop
from support.samples import WRITERS, in_memory, with_tokenizer

import llmpy
from llmpy import GPT2, LlmpyError, Tokenizer, Trainer
from llmpy.data.shards import write_shard
from llmpy.formats import open_model
from llmpy.generate.sampling import Choice
from llmpy.model.config import ModelConfig
from llmpy.options.train import TrainOptions
from llmpy.run import checkpoint
from llmpy.train.assemble import train

ROWS = np.array([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])


@pytest.fixture
def model() -> GPT2:
    return GPT2.new(TINY, machine=Laptop())


def test_importing_is_fast_and_complete() -> None:
    program = (
        "import sys, llmpy\n"
        "assert not {'numpy', 'numba', 'tokenizers'} & set(sys.modules)\n"
        "assert set(llmpy.__all__) <= set(dir(llmpy))\n"
        "print([getattr(llmpy, name) for name in llmpy.__all__])"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True).stdout
    assert "<class 'llmpy.api.GPT2'>" in told
    with pytest.raises(AttributeError, match="no attribute 'GPT3'"):
        llmpy.GPT3  # noqa: B018


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_a_model_of_every_format(tmp_path: Path, kind: str) -> None:
    source = with_tokenizer(in_memory(), tmp_path / "tokenizer.json")
    path = tmp_path / ("model.bin" if kind == "llmc" else "model")  # the tokenizer lies beside the file
    WRITERS[kind](path, source)
    model = GPT2.load(path, machine=Laptop())
    assert model.config.channels == TINY.channels
    for name, found in model.parameters.items():
        assert found.dtype == np.float32
        assert np.array_equal(found[:257], source.read(name)[:257])
    assert model.tokenizer is not None


def test_gradients_are_those_of_the_loss(model: GPT2) -> None:
    loss, grads = model.loss_and_grads(ROWS)
    assert loss == pytest.approx(model.loss(ROWS), rel=1e-6)
    assert loss == pytest.approx(model.loss(ROWS[:, :-1], ROWS[:, 1:]), rel=1e-6)
    assert {name: g.shape for name, g in grads.items()} == {name: p.shape for name, p in model.parameters.items()}
    # along the gradient the loss falls by its square, to first order
    step, square = 1e-3, sum(float((g.astype(np.float64) ** 2).sum()) for g in grads.values())
    for name, g in grads.items():
        model.parameters[name] -= step * g
    model.store_weights()
    assert loss - model.loss(ROWS) == pytest.approx(step * square, rel=0.02)


def test_what_does_not_count(model: GPT2) -> None:
    targets = ROWS.copy()
    targets[1] = -1
    assert model.loss(ROWS, targets) == pytest.approx(model.loss(ROWS[0], ROWS[0]), rel=1e-6)


def test_one_row_needs_no_brackets(model: GPT2) -> None:
    assert model.loss([1, 2, 3]) == model.loss([[1, 2, 3]])
    logits = model.logits([1, 2, 3])
    assert logits.shape == (1, TINY.vocab_size)
    assert np.allclose(model.logits([[1, 2, 3, 9]], 2), logits, atol=1e-6)  # a position sees none behind it


@pytest.mark.parametrize(
    ("tokens", "targets", "said"),
    [
        ([[1, 300]], None, "300 is no token of this model — ids go from 0 to 299"),
        ([[1, -1]], None, "-1 is no token"),
        ([[1, 2**40]], None, "is no token"),
        ([[1.0, 2.0]], None, "type float64"),
        ([[True, False]], None, "type bool"),
        ([[1, 2], [3]], None, "rows of different lengths"),
        (np.zeros((1, 2, 3), int), None, "of shape (1, 2, 3)"),
        (np.zeros((0, 4), int), None, "of shape (0, 4)"),
        ([7], None, "a row of one token has no target"),
        (np.zeros((1, 18), int), None, "rows of 18, and the model's context is 16"),
        (np.zeros((1, 17), int), np.zeros((1, 17), int), "rows of 17"),
        ([[1, 2]], [[1, 2, 3]], "targets (1, 3) for tokens (1, 2)"),
        ([[1, 2]], [[1, -2]], "targets: -2 is no token of this model — ids go from -1"),
    ],
)
def test_what_kernels_must_not_see(model: GPT2, tokens: Any, targets: Any, said: str) -> None:
    for call in (model.loss, model.loss_and_grads):
        with pytest.raises(LlmpyError) as caught:
            call(tokens, targets)
        assert said in str(caught.value)


def test_the_longest_row_has_its_targets(model: GPT2) -> None:
    model.loss(np.zeros((1, 17), np.int64))
    with pytest.raises(LlmpyError, match="position 3 of 3"):
        model.logits([1, 2, 3], 3)


def test_memory_is_that_of_one_shape(model: GPT2) -> None:
    for T in (4, 5, 6):
        model.loss_and_grads(np.zeros((2, T), int))
    assert len(model._net._acts) == 1


def test_text(tmp_path: Path) -> None:
    model = GPT2.new("d1", tokenizer=Tokenizer.bytes(), machine=Laptop())
    text = model.generate("ab", 12, temperature=0.9, seed=3)
    assert text.startswith("ab")
    assert text == model.generate("ab", 12, temperature=0.9, seed=3)
    assert "ab" + "".join(model.stream("ab", 12, temperature=0.9, seed=3)) == text
    if len(text) > 4:
        assert model.generate("ab", 12, temperature=0.9, seed=3, stop=text[3:5]) == text[:3]
    for wrong, said in (
        ({"topk": 3, "json": True}, "unknown choices ['json', 'topk'] — use min_p"),
        ({"top_p": 3}, "--top-p 3"),
        ({"temperature": "hot"}, "is no float"),
    ):
        with pytest.raises(LlmpyError) as caught:
            model.generate("ab", **wrong)
        assert said in str(caught.value)


def test_the_text_ends_at_its_end() -> None:
    model = GPT2.new("d1", tokenizer=Tokenizer.bytes(), machine=Laptop())
    assert model.tokenizer is not None
    model.parameters["wte"][...] = 0
    model.parameters["wte"][model.tokenizer.eot] = 1
    model.parameters["ln_f_w"][...] = 0
    model.parameters["ln_f_b"][...] = 1  # every logit is 0 but that of the end
    model.store_weights()
    assert model.generate("ab", 12, temperature=0) == "ab"


def test_text_needs_a_tokenizer_of_the_model(model: GPT2) -> None:
    with pytest.raises(LlmpyError, match="no tokenizer"):
        model.generate("ab")
    for V, call, said in (
        (256, lambda m: m.generate("ab"), "the tokenizer has 257 tokens but the model 256 — use the model's own"),
        (257, lambda m: next(m.continued([1, -1, 2], 1, Choice())), "ids: -1 is no token of this model"),
        (257, lambda m: next(m.continued([1, 257, 2], 1, Choice())), "257 is no token of this .* from 0 to 256"),
    ):
        small = GPT2.new(replace(TINY, vocab_size=V), tokenizer=Tokenizer.bytes(), machine=Laptop())
        with pytest.raises(LlmpyError, match=said):
            call(small)


def test_exports(tmp_path: Path) -> None:
    model = GPT2.new("d1", tokenizer=Tokenizer.bytes(), machine=Laptop())
    model.save(tmp_path / "native")
    model.export_hf(tmp_path / "hf")
    model.export_hf(tmp_path / "hf16", dtype="bfloat16")
    model.export(tmp_path / "model.bin")
    for path in ("native", "hf", "model.bin"):
        again = GPT2.load(tmp_path / path, machine=Laptop())
        assert all(np.array_equal(again.parameters[n], p) for n, p in model.parameters.items())
    assert open_model(tmp_path / "hf16").dtype == "bfloat16"
    assert json.loads((tmp_path / "hf" / "config.json").read_text("utf-8"))["eos_token_id"] == 256
    with pytest.raises(LlmpyError, match="exists"):
        model.export_hf(tmp_path / "hf")
    with pytest.raises(LlmpyError, match="--dtype float16 with --to hf"):
        model.export_hf(tmp_path / "hf8", dtype="float16")


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat and the dog ran to the sea\n" * 200, "utf-8")
    return path


SMALL = {"batch_size": 2, "sequence_length": 16, "steps": 3, "eval_batches": 2, "sample_tokens": 5}


def test_a_run(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer("d1", data=text, out="run", vocab_size=300, machine=Laptop(), **SMALL)
    with pytest.raises(LlmpyError, match="nothing was trained yet"):
        trainer.model  # noqa: B018
    assert trainer.run(verbose=False) is trainer
    assert capsys.readouterr().out == ""
    assert trainer.folder == Path("run")
    steps, losses = trainer.curve()
    assert steps == [1, 2, 3]
    assert 7 > losses[0] > losses[2]
    assert trainer.curve("val_loss")[0] == [0, 3]
    assert isinstance(trainer.model.generate("the", 3), str)


def test_a_model_is_trained_on(text: Path) -> None:
    model = GPT2.new("d1", tokenizer=Tokenizer.bytes(), machine=Laptop())
    before = model.parameters["mlp_fc_w"].copy()
    ids = model.require_tokenizer().encode("the cat sat on the mat")
    loss = model.loss(ids)
    trainer = Trainer(model, data=text, out="run", lr=1e-3, machine=Laptop(), **SMALL).run(verbose=False)
    assert trainer.model is model
    assert not np.array_equal(model.parameters["mlp_fc_w"], before)
    assert model.loss(ids) < loss
    saved = GPT2.load("run", machine=Laptop())
    assert all(np.array_equal(saved.parameters[n], p) for n, p in model.parameters.items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batchsize": 1}, "unknown option 'batchsize' — did you mean batch_size?"),
        ({"lr": "fast"}, "is no float"),
        ({"lr": -1}, "--lr -1"),
    ],
)
def test_options_that_there_are_not(options: dict[str, Any], said: str) -> None:
    with pytest.raises(LlmpyError) as caught:
        Trainer("d1", **options)
    assert said in str(caught.value)


def test_what_a_trainer_refuses(model: GPT2) -> None:
    with pytest.raises(LlmpyError, match="a model and init"):
        Trainer(model, init="gpt2")
    with pytest.raises(LlmpyError, match="a Trainer is one process"):
        Trainer(model, ranks=2)
    model.tokenizer = Tokenizer.bytes()
    with pytest.raises(LlmpyError, match="the tokenizer has 257 tokens but the model 300"):
        Trainer(model)


def test_a_shape_of_ones_own() -> None:
    config = ModelConfig(layers=1, heads=2, channels=16, context=8, vocab_size=50)
    assert GPT2.new(config, machine=Laptop()).parameters["wpe"].shape == (8, 16)


def test_a_run_of_a_model_in_memory_that_is_killed_at_once_goes_on(text: Path, tmp_path: Path) -> None:
    """From its start, which is kept with it; and it becomes the run that nobody killed."""

    class Killed(BaseException):
        pass

    class Dying(Laptop):
        def adamw(self, *arguments: Any) -> None:
            raise Killed

    def run(out: str, machine: Laptop, **more: Any) -> GPT2:
        model = GPT2.new("d1", tokenizer=Tokenizer.bytes(), machine=Laptop(), seed=3)
        told = {**SMALL, "lr": 1e-3, **more}
        Trainer(model, data=text, out=out, machine=machine, **told).run(verbose=False)
        return model

    for name in ("killed", "again"):
        with pytest.raises(Killed):
            run(name, Dying())
    whole = run("whole", Laptop())
    assert train(TrainOptions(resume=Path("killed")), Laptop()) == 0
    for name in ("whole", "killed"):
        assert not (tmp_path / name / "start.safetensors").exists()
        assert checkpoint.read_header(tmp_path / name / "model.safetensors").trained_length == SMALL["sequence_length"]
    assert whole.trained_length == SMALL["sequence_length"]
    again = run("again", Laptop(), auto_resume=True)
    for name, p in whole.parameters.items():
        assert np.array_equal(GPT2.load("killed", machine=Laptop()).parameters[name], p)
        assert np.array_equal(again.parameters[name], p)
    other = GPT2.new("d2", tokenizer=Tokenizer.bytes(), machine=Laptop())
    with pytest.raises(LlmpyError, match="a run of a model of another shape"):
        Trainer(other, data=text, out="again", auto_resume=True, machine=Laptop(), **SMALL).run(verbose=False)


def test_tokens_in_memory_are_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As shards of them are: a run of theirs can be resumed."""
    monkeypatch.chdir(tmp_path)
    ids = np.random.default_rng(0).integers(0, 300, 2000)
    told = {**SMALL, "vocab_size": 300, "machine": Laptop()}
    run = Trainer("d1", data=ids, out="memory", **told).run(verbose=False)
    assert Trainer("d1", data=ids.tolist(), out="list", **told).run(verbose=False).curve() == run.curve()
    write_shard(tmp_path / "all.bin", ids)
    assert Trainer("d1", data=tmp_path / "all.bin", out="file", **told).run(verbose=False).curve() == run.curve()
    (tmp_path / "all.bin").unlink()
    again = Trainer("d1", data=ids, resume="memory", **told | {"steps": 5}).run(verbose=False)
    assert again.curve()[0] == [1, 2, 3, 4, 5]
    with pytest.raises(LlmpyError, match="was not trained on these tokens"):
        Trainer("d1", data=ids[::-1], resume="memory", **told).run(verbose=False)
    for wrong, said in (
        (ids.reshape(2, -1), r"data of shape \(2, 1000\) and type int64"),
        (ids / 2, "and type float64"),
        (ids[:9], "data of negative tokens, or of too few"),
        (ids - 1, "data of negative tokens"),
    ):
        with pytest.raises(LlmpyError, match=said):
            Trainer("d1", data=wrong, **told)
    with pytest.raises(LlmpyError, match=r"token 300 at position .* is outside the vocabulary of 300"):
        Trainer("d1", data=ids + 1, out="beyond", **told).run(verbose=False)
    assert not (tmp_path / "beyond").exists()
