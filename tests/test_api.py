"""The public API of `import llmpy`, and its checks of arguments before any kernel runs."""

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
from support.refused import refused
from support.samples import WRITERS, in_memory, with_tokenizer

import llmpy
from llmpy import GPT2, Tokenizer, Trainer
from llmpy.data.shards import write_shard
from llmpy.errors import LlmpyError
from llmpy.formats import open_model
from llmpy.generate.sampling import Choice
from llmpy.model.config import ModelConfig
from llmpy.model.families import model_memory
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
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True).stdout
    assert "<class 'llmpy.api.Model'>" in out
    with pytest.raises(AttributeError, match="no attribute 'GPT3'"):
        llmpy.GPT3  # noqa: B018


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_a_model_of_every_format(tmp_path: Path, kind: str) -> None:
    source = with_tokenizer(in_memory(), tmp_path / "tokenizer.json")
    path = tmp_path / ("model.bin" if kind == "llmc" else "model")  # with its tokenizer in the same folder
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
    # to first order a step against the gradient lowers the loss by step · |gradient|²
    step, square = 1e-3, sum(float((g.astype(np.float64) ** 2).sum()) for g in grads.values())
    for name, g in grads.items():
        model.parameters[name] -= step * g
    model.store_weights()
    assert loss - model.loss(ROWS) == pytest.approx(step * square, rel=0.02)


def test_ignored_targets(model: GPT2) -> None:
    targets = ROWS.copy()
    targets[1] = -1
    assert model.loss(ROWS, targets) == pytest.approx(model.loss(ROWS[0], ROWS[0]), rel=1e-6)


def test_one_row_needs_no_brackets(model: GPT2) -> None:
    assert model.loss([1, 2, 3]) == model.loss([[1, 2, 3]])
    logits = model.logits([1, 2, 3], -1)
    assert logits.shape == (1, TINY.vocab_size)
    assert np.allclose(model.logits([[1, 2, 3, 9]], 2), logits, atol=1e-6)  # positions see no later ones


@pytest.mark.parametrize(
    ("tokens", "targets", "code", "name"),
    [
        ([[1, 300]], None, "tokens.range", "300 is not a token id. Use 0 to 299"),
        ([[1, -1]], None, "tokens.range", "-1"),
        ([[1, 2**40]], None, "tokens.range", 2**40),
        ([[1.0, 2.0]], None, "tokens.shape", "type float64"),
        ([[True, False]], None, "tokens.shape", "type bool"),
        ([[1, 2], [3]], None, "tokens.shape", "tokens"),
        (np.zeros((1, 2, 3), int), None, "tokens.shape", (1, 2, 3)),
        (np.zeros((0, 4), int), None, "tokens.shape", (0, 4)),
        ([7], None, "tokens.no-target", ""),
        (np.zeros((1, 18), int), None, "model.context-exceeded", "18 exceed 17"),
        (np.zeros((1, 17), int), np.zeros((1, 17), int), "model.context-exceeded", "17 exceed 16"),
        ([[1, 2]], [[1, 2, 3]], "tokens.shape", "targets (1, 3) for tokens (1, 2)"),
        ([[1, 2]], [[1, -2]], "tokens.range", "targets: -2 is not a token id. Use -1"),
    ],
)
def test_invalid_tokens(model: GPT2, tokens: Any, targets: Any, code: str, name: object) -> None:
    for call in (model.loss, model.loss_and_grads):
        with refused(code, name):
            call(tokens, targets)


def test_the_longest_row_has_its_targets(model: GPT2) -> None:
    model.loss(np.zeros((1, 17), np.int64))
    with refused("tokens.position", "3 of 3"):
        model.logits([1, 2, 3], 3)


def test_only_one_shape_is_kept(model: GPT2) -> None:
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
    for wrong, code, name in (
        ({"topk": 3, "json": True}, "option.unknown", "'json'. Use min_p"),
        ({"top_p": 3}, "option.invalid", "--top-p 3"),
        ({"temperature": "hot"}, "option.invalid", "hot is not a number"),
    ):
        with refused(code, name):
            model.generate("ab", **wrong)


def test_text_ends_at_end_of_text() -> None:
    model = GPT2.new("d1", tokenizer=Tokenizer.bytes(), machine=Laptop())
    assert model.tokenizer is not None
    model.parameters["wte"][...] = 0
    model.parameters["wte"][model.tokenizer.eot] = 1
    model.parameters["ln_f_w"][...] = 0
    model.parameters["ln_f_b"][...] = 1  # every logit is 0 except end-of-text's
    model.store_weights()
    assert model.generate("ab", 12, temperature=0) == "ab"


def test_text_needs_a_tokenizer_of_the_model(model: GPT2) -> None:
    with refused("tokenizer.missing"):
        model.generate("ab")
    for V, call, code, name in (
        (256, lambda m: m.generate("ab"), "tokenizer.vocab-mismatch", "257 tokens, the model 256"),
        (257, lambda m: next(m.continued([1, -1, 2], 1, Choice())), "tokens.range", "-1"),
        (257, lambda m: next(m.continued([1, 257, 2], 1, Choice())), "tokens.range", "257"),
    ):
        small = GPT2.new(replace(TINY, vocab_size=V), tokenizer=Tokenizer.bytes(), machine=Laptop())
        with refused(code, name):
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
    with refused("file.exists", tmp_path / "hf"):
        model.export_hf(tmp_path / "hf")
    with refused("convert.unsupported-dtype", "--dtype float16", "--to hf"):
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
    with refused("run.not-started", "run()"):
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
    ("options", "code", "name"),
    [
        ({"batchsize": 1}, "option.unknown", "'batchsize'. Did you mean batch_size?"),
        ({"lr": "fast"}, "option.invalid", "fast is not a number"),
        ({"lr": -1}, "option.invalid", "--lr -1"),
    ],
)
def test_invalid_options(options: dict[str, Any], code: str, name: str) -> None:
    with refused(code, name):
        Trainer("d1", **options)


def test_invalid_trainers(model: GPT2) -> None:
    with refused("option.conflict", "init"):
        Trainer(model, init="gpt2")
    with refused("option.unsupported", "--ranks"):
        Trainer(model, ranks=2)
    model.tokenizer = Tokenizer.bytes()
    with refused("tokenizer.vocab-mismatch", 257, 300):
        Trainer(model)


def test_a_model_of_any_shape() -> None:
    config = ModelConfig(layers=1, heads=2, channels=16, context=8, vocab_size=50)
    assert GPT2.new(config, machine=Laptop()).parameters["wpe"].shape == (8, 16)


def test_a_killed_run_of_a_model_in_memory_resumes(text: Path, tmp_path: Path) -> None:
    """From its stored start, to the result of an uninterrupted run."""

    class Killed(BaseException):
        pass

    class Dying(Laptop):
        def adamw(self, *arguments: Any) -> None:
            raise Killed

    def run(out: str, machine: Laptop, **more: Any) -> GPT2:
        model = GPT2.new("d1", tokenizer=Tokenizer.bytes(), machine=Laptop(), seed=3)
        options = {**SMALL, "lr": 1e-3, **more}
        Trainer(model, data=text, out=out, machine=machine, **options).run(verbose=False)
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
    with refused("resume.model-mismatch", "again"):
        Trainer(other, data=text, out="again", auto_resume=True, machine=Laptop(), **SMALL).run(verbose=False)


def test_tokens_in_memory_are_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like shards, they allow resuming."""
    monkeypatch.chdir(tmp_path)
    ids = np.random.default_rng(0).integers(0, 300, 2000)
    options = {**SMALL, "vocab_size": 300, "machine": Laptop()}
    run = Trainer("d1", data=ids, out="memory", **options).run(verbose=False)
    assert Trainer("d1", data=ids.tolist(), out="list", **options).run(verbose=False).curve() == run.curve()
    write_shard(tmp_path / "all.bin", ids)
    assert Trainer("d1", data=tmp_path / "all.bin", out="file", **options).run(verbose=False).curve() == run.curve()
    (tmp_path / "all.bin").unlink()
    again = Trainer("d1", data=ids, resume="memory", **options | {"steps": 5}).run(verbose=False)
    assert again.curve()[0] == [1, 2, 3, 4, 5]
    with refused("data.changed", "memory"):
        Trainer("d1", data=ids[::-1], resume="memory", **options).run(verbose=False)
    for wrong, code, name in (
        (ids.reshape(2, -1), "tokens.shape", "(2, 1000) and type int64"),
        (ids / 2, "tokens.shape", "float64"),
        (ids[:9], "tokens.range", "data"),
        (ids - 1, "tokens.range", "data"),
    ):
        with refused(code, name):
            Trainer("d1", data=wrong, **options)
    with refused("shard.outside-vocabulary", "token 300"):
        Trainer("d1", data=ids + 1, out="beyond", **options).run(verbose=False)
    assert not (tmp_path / "beyond").exists()


def test_int8(text: Path, tmp_path: Path) -> None:
    """Text, losses and logits close to float32's; nothing that needs whole matrices; predicted memory."""
    Trainer("d1", data=text, out="run", vocab_size=300, machine=Laptop(), **SMALL).run(verbose=False)
    whole, model = (llmpy.load("run", dtype=dtype, threads=2) for dtype in ("float32", "int8"))
    tokens = np.arange(32).reshape(2, 16)
    assert model.loss(tokens) == pytest.approx(whole.loss(tokens), rel=1e-2)
    error = np.abs(model.logits(tokens) - whole.logits(tokens)).max() / np.abs(whole.logits(tokens)).max()
    assert 0 < error < 0.05
    assert model.generate("The ", 8, temperature=0).startswith("The ")
    for name, call in {
        "loss_and_grads": lambda: model.loss_and_grads(tokens),
        "save": lambda: model.save(tmp_path / "saved"),
        "Trainer": lambda: Trainer(model, text),
        "new": lambda: llmpy.Model.new("d1", dtype="int8", threads=1),
    }.items():
        with pytest.raises(LlmpyError, match="generation") as caught:
            call()
        assert caught.value.code == "model.no-gradients", name
    with refused("model.no-gradients", "saved"):
        llmpy.load("run", machine=Laptop(), trainable=False).save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    net = model._net
    held = sum(buffer.nbytes for arena in (net.params, net.weights) for buffer in arena.buffers)
    assert model_memory(net.config, net.ops) == held < 0.5 * model_memory(net.config, whole._net.ops)
