"""`llmpy train --init`: a run that starts from a file and then follows llm.c's algorithm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.laptop import TINY, Laptop
from support.refused import refused
from support.samples import WRITERS, in_memory, training_state, with_tokenizer

from llmpy import formats
from llmpy.backend.reference import Reference
from llmpy.cli.sample import sample
from llmpy.data.loader import Loader
from llmpy.data.shards import open_shard, write_shard
from llmpy.data.tokenizer import Tokenizer
from llmpy.errors import LlmpyError
from llmpy.formats import huggingface, llmc, llmc_state, native, resolve
from llmpy.formats.source import Source
from llmpy.generate.generation import open_run
from llmpy.model.gpt2 import GPT2
from llmpy.options.sample_chat import SampleOptions
from llmpy.options.train import TrainOptions
from llmpy.run import checkpoint
from llmpy.train import assemble

Options = Callable[..., TrainOptions]


@pytest.fixture
def options(tmp_path: Path) -> Options:
    """llm.c's settings on the CPU (`train_gpt2.c`), on shards of random tokens."""
    rng = np.random.default_rng(0)
    for name in ("train.bin", "val.bin"):
        write_shard(tmp_path / name, rng.integers(0, TINY.vocab_size, 500))

    def make(**changes: Any) -> TrainOptions:
        settings: dict[str, Any] = {
            "data": (tmp_path / "train.bin", tmp_path / "val.bin"), "out": tmp_path / "run", "batch_size": 2,
            "sequence_length": 8, "steps": 5, "lr": 1e-2, "schedule": "constant", "weight_decay": 0.0,
            "beta2": 0.999, "clip": 0.0, "eval_batches": 5, "sample_tokens": 4, "vocab_size": TINY.vocab_size,
        }  # fmt: skip
        return TrainOptions(**settings | changes)

    return make


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    return [row["loss"] for line in lines if "loss" in (row := json.loads(line))]


def llm_c(source: Source, shard: Path, steps: int, lr: float) -> list[float]:
    """Run train_gpt2.c's loop in float64: shuffled loader of seed 42, AdamW 0.9, 0.999, no decay, no clip."""
    model = GPT2(source.config, Reference())
    source.fill(model.params)
    model.reserve(2, 8, training=True)
    assert model.grads is not None
    loader = Loader([open_shard(shard, source.config.vocab_size)], 2, 8, shuffle=True, seed=42)
    m, v = np.zeros((2, model.params.size))
    found = []
    for t in range(1, steps + 1):
        found.append(model.loss_and_grads(*loader.next()))
        g = model.grads.buffer
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        model.params.buffer[...] -= lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return found


@pytest.mark.parametrize("form", WRITERS)
def test_a_run_from_every_format_follows_llm_c(options: Options, tmp_path: Path, form: str) -> None:
    source = in_memory(seed=4)
    WRITERS[form](tmp_path / "start", source)
    assert assemble.train(options(init=str(tmp_path / "start")), Laptop()) == 0
    # float32 against float64 over five updates
    assert losses(tmp_path / "run") == pytest.approx(llm_c(source, tmp_path / "train.bin", 5, 1e-2), rel=2e-5)
    header = checkpoint.read_header(tmp_path / "run" / "model.safetensors")
    assert header == checkpoint.Header(TINY, TINY.context)  # positions beyond -T are already trained


def test_a_checkpoint_of_llm_c_starts_from_its_master_weights(options: Options, tmp_path: Path) -> None:
    state = replace(training_state(TINY), master=None)
    weights = in_memory(seed=4)
    flat = np.concatenate([weights.read(t.name).reshape(-1) for t in GPT2(TINY, Laptop()).params.table])
    coarse = in_memory(dtype="bfloat16", seed=8)
    llmc_state.write_checkpoint(tmp_path / "log", coarse, replace(state, master=flat), "bfloat16")
    assert assemble.train(options(init=str(tmp_path / "log")), Laptop()) == 0
    assert losses(tmp_path / "run") == pytest.approx(llm_c(weights, tmp_path / "train.bin", 5, 1e-2), rel=2e-5)


def test_the_run_prints_its_initial_model(options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llmc.write_model(tmp_path / "m.bin", in_memory(), "float32")
    assemble.train(options(init=str(tmp_path / "m.bin"), steps=1), Laptop())
    out = capsys.readouterr().out
    assert "m.bin: " in out
    assert "model    d2: " in out


@pytest.mark.parametrize(
    ("changes", "code", "name"),
    [
        ({"model": "d2"}, "option.conflict", "--model d2"),
        ({"sequence_length": 17}, "model.context-exceeded", "-T 16"),
        ({"vocab_size": 301}, "tokenizer.vocab-mismatch", "301"),
        ({"init": "nowhere"}, "model.missing", "nowhere"),
    ],
)
def test_a_mismatch_is_refused_and_leaves_nothing(
    options: Options, tmp_path: Path, changes: dict[str, Any], code: str, name: str
) -> None:
    llmc.write_model(tmp_path / "m.bin", in_memory(), "float32")
    with refused(code, name):
        assemble.train(options(**{"init": str(tmp_path / "m.bin")} | changes), Laptop())
    assert not (tmp_path / "run").exists()


TEXT = "".join(f"Line {i} of a text that a model continues.\n" for i in range(60))
WORDS = replace(TINY, vocab_size=257)  # of the byte tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model in Hugging Face's format, with its tokenizer, next to text.txt."""
    huggingface.write_model(tmp_path / "small", with_tokenizer(in_memory(WORDS), tmp_path / "bytes.json"), "float32")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "small"


def on_text(folder: Path, **changes: Any) -> TrainOptions:
    settings: dict[str, Any] = {
        "data": (folder.parent / "text.txt",), "init": str(folder), "out": folder.parent / "run", "batch_size": 2,
        "sequence_length": 8, "steps": 4, "eval_batches": 2, "sample_tokens": 4, "checkpoint_every": 2, "keep": 0,
    }  # fmt: skip
    return TrainOptions(**settings | changes)


def test_text_is_read_with_the_tokenizer_of_the_model(folder: Path) -> None:
    assert assemble.train(on_text(folder), Laptop()) == 0
    run = folder.parent / "run"
    train = open_shard(run / "train.bin", 257)
    assert bytes(train.tokens[1:40].tolist()) == TEXT.encode()[:39]  # after end-of-text; a token is a byte
    header, tokenizer = open_run(run)
    assert (header.config, header.trained_length) == (WORDS, WORDS.context)
    assert tokenizer.same_tokens(Tokenizer.bytes())


def test_a_run_from_a_model_resumes_without_it(folder: Path) -> None:
    assert assemble.train(on_text(folder), Laptop()) == 0
    run, cut = folder.parent / "run", folder.parent / "cut"
    shutil.copytree(run, cut, ignore=shutil.ignore_patterns("step-00000004"))
    shutil.rmtree(folder)
    assert assemble.train(TrainOptions(resume=cut), Laptop()) == 0
    for name in ("model.safetensors", "main.log"):
        assert (cut / name).read_bytes() == (run / name).read_bytes()
    assert losses(cut) == losses(run)


def test_a_run_without_a_checkpoint_restarts_from_the_model(folder: Path) -> None:
    assert assemble.train(on_text(folder), Laptop()) == 0
    run, cut = folder.parent / "run", folder.parent / "cut"
    cut.mkdir()
    shutil.copy(run / "config.json", cut)
    assert assemble.train(TrainOptions(resume=cut), Laptop()) == 0
    assert (cut / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_text_for_a_model_without_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(LlmpyError, match=r"small\b.* tokenizer"):
        assemble.train(on_text(folder), Laptop())
    assert not (folder.parent / "run").exists()


def test_tokens_of_another_tokenizer_are_refused(folder: Path) -> None:
    tokens = folder.parent / "tokens"
    tokens.mkdir()
    write_shard(tokens / "train.bin", np.arange(250))
    Tokenizer.train([TEXT], 257).save(tokens / "tokenizer.json")  # as many tokens, other ids
    with pytest.raises(LlmpyError, match=str(tokens)):
        assemble.train(on_text(folder, data=(tokens,)), Laptop())


def test_the_option_e_of_llm_c_takes_a_file_too() -> None:
    for model in ("gpt2_124M.bin", "runs/NAME"):
        found = TrainOptions.gather({"model": model})
        assert (found.model, found.init, found.given) == ("", model, {"init"})
        assert found.called == Path(model).stem
    found = TrainOptions.gather({"model": "gpt3:c768"})
    assert (found.model, found.init) == ("gpt3:c768", None)


def test_a_padded_vocabulary_is_cut_to_that_of_the_tokenizer(tmp_path: Path) -> None:
    wide = replace(WORDS, vocab_size=384)
    whole = with_tokenizer(in_memory(wide), tmp_path / "bytes.json")
    huggingface.write_model(tmp_path / "wide", whole, "float32")
    lines: list[str] = []
    source = resolve(str(tmp_path / "wide"), lines.append)
    assert (source.config, len(lines)) == (WORDS, 1)
    assert "384" in lines[0] and "257" in lines[0]
    wte = source.read("wte")
    assert wte.shape == (WORDS.padded_vocab_size, WORDS.channels)
    np.testing.assert_array_equal(wte[:257], whole.read("wte")[:257])
    assert not wte[257:].any()
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    assert assemble.train(on_text(tmp_path / "wide"), Laptop()) == 0
    assert open_run(tmp_path / "run")[0].config == WORDS
    Tokenizer.bytes().save(tmp_path / "wide" / "tokenizer.json")
    narrow = with_tokenizer(in_memory(replace(WORDS, vocab_size=200)), tmp_path / "bytes.json")
    native.write_model(tmp_path / "narrow", narrow)
    with pytest.raises(LlmpyError, match=r"257 tokens.* 200\b"):
        resolve(str(tmp_path / "narrow"), lines.append)


def test_a_missing_model_and_missing_data_are_reported_together(folder: Path) -> None:
    wrong = on_text(folder, init="none.bin", data=(folder / "none.txt",))
    with refused("run.refused", "2 problems", "none.bin", folder / "none.txt"):
        assemble.train(wrong, Laptop())


def test_a_folder_without_safetensors_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(LlmpyError, match=r"small\b.* model\.safetensors"):
        resolve(str(folder), print)


@pytest.mark.parametrize(
    ("form", "own"), [("llmc", False), ("llmc", True), ("hf", True), ("hf sharded", True), ("native", True)]
)
def test_sample_takes_every_format(form: str, own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gives the same text; a .bin without a tokenizer uses GPT-2's if the vocabulary matches."""
    model = with_tokenizer(in_memory(WORDS), tmp_path / "bytes.json")
    path = tmp_path / ("m.bin" if form == "llmc" else "m")
    WRITERS[form](path, model)
    if form == "llmc":
        with pytest.raises(LlmpyError, match=r"m\.bin\b.* tokenizer"):
            open_run(path)
        if own:
            Tokenizer.bytes().save(tmp_path / "tokenizer.json")
        else:
            monkeypatch.setattr(formats.source, "GPT2_VOCAB", WORDS.vocab_size)
            monkeypatch.setattr(Tokenizer, "gpt2", classmethod(lambda cls, log: cls.bytes()))
    native.write_model(tmp_path / "run", model)
    texts: dict[Path, list[str]] = {tmp_path / "run": [], path: []}
    for run, pieces in texts.items():
        sample(SampleOptions(run, prompt=("ab",), tokens=12), pieces.append, Laptop())
    assert "".join(texts[path]) == "".join(texts[tmp_path / "run"])
    assert len("".join(texts[path])) > 2
