"""Runs that train adapters: exact resume, every verb on their files, refusals that leave nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fellows import Fellows
from support.heard import lines
from support.laptop import Laptop, in_place_of_the_cpu
from support.models import batch, build
from support.network import network
from support.refused import refused
from support.samples import in_memory, with_tokenizer

from llmpy import Model
from llmpy.cli import main as cli
from llmpy.cli.chat import chat
from llmpy.cli.sample import sample
from llmpy.distributed.zero import Zero
from llmpy.formats import config_of, huggingface, open_model, peft, resolve
from llmpy.model.config import LlamaConfig, ModelConfig
from llmpy.model.families import trained_table, with_adapters
from llmpy.options.sample_chat import ChatOptions, SampleOptions
from llmpy.options.train import TrainOptions
from llmpy.run import checkpoint
from llmpy.train import assemble
from llmpy.train.optimizer import AdamW

LLAMA = LlamaConfig(layers=2, heads=4, channels=16, context=64, vocab_size=300, kv_heads=2, ffn=24, tied=False)
GPT2 = ModelConfig(layers=2, heads=2, channels=16, context=64, vocab_size=257)
MODELS = {"llama": LLAMA, "gpt2": GPT2}
TEXT = "".join(f"user: What is {i}?\n\nassistant: It is {i}.<|endoftext|>" for i in range(60))
every = pytest.mark.parametrize("kind", MODELS)


def base(folder: Path, kind: str = "llama", seed: int = 1) -> Path:
    """Write a model of Hugging Face and a text; return its path. The Llama has 43 tokens more than its tokenizer."""
    whole = with_tokenizer(in_memory(MODELS[kind], seed=seed), folder / "bytes.json")
    shutil.rmtree(folder / kind, ignore_errors=True)
    huggingface.write_model(folder / kind, whole, "float32")
    (folder / "text.txt").write_text(TEXT, "utf-8")
    return folder / kind


def options(start: Path, **changes: Any) -> TrainOptions:
    folder = start.parent
    settings: dict[str, Any] = {
        "data": (folder / "text.txt",), "init": str(start), "lora": 3, "out": folder / "run", "batch_size": 2,
        "sequence_length": 16, "steps": 6, "lr": 1e-2, "schedule": "constant", "eval_batches": 2, "eval_every": 2,
        "sample_tokens": 4, "checkpoint_every": 3, "keep": 0, "prompt": "us",
    }  # fmt: skip
    return TrainOptions(**settings | changes)


def trained(start: Path, **changes: Any) -> Path:
    """Train adapters; return the run."""
    given = options(start, **changes)
    assert assemble.train(given, Laptop(), quiet=True) == 0
    assert given.out is not None
    return given.out


def rows(run: Path, name: str = "loss") -> list[float]:
    found = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    return [row[name] for row in found if name in row]


@every
def test_it_learns_and_resumes_bitwise(kind: str, tmp_path: Path) -> None:
    run, cut = trained(base(tmp_path, kind)), tmp_path / "cut"
    assert rows(run, "val_loss")[-1] < rows(run, "val_loss")[0]
    shutil.copytree(run, cut, ignore=shutil.ignore_patterns("step-00000006"))
    assert assemble.train(TrainOptions(resume=cut), Laptop(), quiet=True) == 0
    assert (cut / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    assert (rows(cut), rows(cut, "val_loss")) == (rows(run), rows(run, "val_loss"))
    header = checkpoint.read_header(run / "best.safetensors")
    best = Model.load(run / "best.safetensors", machine=Laptop())
    assert header.score is not None and header.score.val_loss == min(rows(run, "val_loss")[1:])
    assert best.config == header.config and best.config.lora is not None
    assert (run / "model.safetensors").stat().st_size < 4 * sum(t.size for t in trained_table(best.config)) + 5000


def text_of(model: Path) -> str:
    pieces: list[str] = []
    sample(SampleOptions(model, prompt=("user: What",), tokens=12), pieces.append, Laptop())
    return "".join(pieces)


@every
def test_every_verb_on_a_run(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmpy.backend.cpu.CPU", in_place_of_the_cpu)
    init = base(tmp_path, kind)
    run = trained(init)
    for to, *more in (("peft",), ("merged", "--merge"), ("merged.safetensors", "--merge")):
        assert cli.main(["convert", str(run), str(tmp_path / to), *more]) == 0
    if find_spec("gguf"):
        assert cli.main(["convert", str(run), str(tmp_path / "m.gguf"), "--merge"]) == 0
    about = json.loads((tmp_path / "peft" / "adapter_config.json").read_text("utf-8"))
    assert (about["r"], about["lora_alpha"], about["base_model_name_or_path"]) == (3, 6, str(init))
    tokens = [[1, 5, 9, 2, 7, 7, 1]]
    logits = {name: Model.load(tmp_path / name, machine=Laptop()).logits(tokens) for name in ("run", "peft", "merged")}
    assert np.array_equal(logits["peft"], logits["run"])
    assert np.abs(logits["merged"] - logits["run"]).max() < 1e-5
    assert np.abs(Model.load(init, machine=Laptop()).logits(tokens)[..., :257] - logits["run"][..., :257]).max() > 1e-3
    assert text_of(run) == text_of(tmp_path / "peft") == text_of(tmp_path / "merged.safetensors")
    chat(ChatOptions(run, tokens=4), lines("2?", ""), Laptop())
    capsys.readouterr()
    for to in ("m.bin", "native.safetensors", "m.gguf.gguf"):
        assert cli.main(["convert", str(run), str(tmp_path / "no" / to)]) == 1
        assert "--merge" in capsys.readouterr().err
    if kind == "llama":
        assert cli.main(["convert", str(run), str(tmp_path / "no" / "m.bin"), "--merge"]) == 1
        assert "Llama" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_adapters_can_be_trained_further(tmp_path: Path) -> None:
    """From the run, its best model or peft's folder: with the learning rate of adapters."""
    run = trained(base(tmp_path), steps=2)
    assert cli.main(["convert", str(run), str(tmp_path / "peft")]) == 0
    last = rows(run, "val_loss")[-1]
    for init in (run, run / "best.safetensors", tmp_path / "peft"):
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        more = {"lora": None, "out": tmp_path / "again", "lr": None, "data": (tmp_path / "text.txt",), "steps": 2}
        again = trained(tmp_path / "llama", **{**more, "init": str(init)})
        assert rows(again, "val_loss")[0] == pytest.approx(last, rel=1e-6)
        assert rows(again, "lr")[0] == pytest.approx(1e-3 * 768 / 16)
        lora = checkpoint.read_header(again / "model.safetensors").config.lora
        assert lora is not None and (lora.rank, lora.base) == (3, str(tmp_path / "llama"))
    with refused("option.conflict", "--lora 4", "convert --merge"):
        trained(tmp_path / "llama", lora=4, init=str(run), out=tmp_path / "no")
    with refused("resume.fixed-option", "--lora"):
        assemble.train(TrainOptions.gather({"resume": run, "lora": 4}), Laptop())


def test_a_base_that_moved_or_changed(tmp_path: Path) -> None:
    init = base(tmp_path)
    run = trained(init, steps=3)
    assert cli.main(["convert", str(run), str(tmp_path / "peft")]) == 0
    base(tmp_path, seed=2)
    for act in (lambda: resolve(str(run), print), lambda: assemble.train(TrainOptions(resume=run, steps=6), Laptop())):
        with refused("lora.other-base", init):
            act()
    init.rename(tmp_path / "moved")
    for model in (run, run / "best.safetensors", tmp_path / "peft"):
        with refused("lora.other-base", init):
            open_model(model)
    with refused("lora.other-base", init):
        assemble.train(TrainOptions(resume=run, steps=6), Laptop())
    assert len(rows(run)) == 3
    about = json.loads((tmp_path / "peft" / peft.CONFIG_FILE).read_text("utf-8"))
    (tmp_path / "peft" / peft.CONFIG_FILE).write_text(
        json.dumps(about | {"base_model_name_or_path": str(base(tmp_path, "gpt2"))}), "utf-8"
    )
    with refused("lora.unsupported", tmp_path / "peft", "target_modules"):
        open_model(tmp_path / "peft")


@pytest.mark.parametrize(
    ("changes", "code", "names"),
    [
        ({"init": None}, "option.missing", "--init"),
        ({"lora": None, "lora_alpha": 2.0}, "option.missing", "--lora 16"),
        ({"lora_targets": ("q_prj",)}, "lora.unknown-target", "q_proj"),
        ({"model": "llama:d6"}, "option.conflict", "--model llama:d6"),
        ({"sequence_length": 65}, "model.context-exceeded", "-T 64"),
    ],
)
def test_bad_options_leave_nothing(tmp_path: Path, changes: dict[str, Any], code: str, names: str) -> None:
    init = base(tmp_path)
    with refused(code, names):
        trained(init, **changes)
    assert not (tmp_path / "run").exists()


def test_a_gated_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    with network({"/meta-llama/Llama-3.2-1B/resolve/main/config.json": 403}, tmp_path / "hub", monkeypatch):
        for words in ("train --lora 4 --out run --init", "plan --model", "sample"):
            assert cli.main([*words.split(), "meta-llama/Llama-3.2-1B"]) == 1
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert "meta-llama/Llama-3.2-1B" in error and "license" in error and error.endswith("[download.failed]")
    assert not (tmp_path / "run").exists()


def test_shapes_without_weights(tmp_path: Path) -> None:
    folder = base(tmp_path)
    (folder / "model.safetensors").unlink()
    assert config_of(str(folder)) == LLAMA
    assert config_of("llama:d6", lora=4) == with_adapters(ModelConfig.from_dial("llama:d6"), 4)
    for name, code in (("llamma:d6", "model.unknown"), (str(tmp_path / "none"), "model.missing")):
        with refused(code, name):
            config_of(name)


@pytest.mark.parametrize("config", [LLAMA, with_adapters(LLAMA, 3), with_adapters(GPT2, 2)], ids=str)
def test_ranks_train_like_one(config: ModelConfig) -> None:
    """Bitwise the AdamW of one process on the mean gradient."""
    batches = [[batch(config, 2, 8, 10 * step + rank) for rank in range(2)] for step in range(3)]

    def act(fellow: Any) -> np.ndarray:
        model = build(config, Laptop())
        model.reserve(2, 8, training=True)
        optimizer = Zero(model, fellow, 0.9, 0.95, 0.1, 0.0, limit=500)
        for step in batches:
            optimizer.expect()
            model.loss_and_grads(*step[fellow.rank], micro_steps=2)
            optimizer.update(1e-2, optimizer.norm())
        optimizer.settle()
        return np.array(model.trained.buffer)

    model = build(config, Laptop())
    model.reserve(2, 8, training=True)
    assert model.grads is not None
    alone = AdamW(model, 0.9, 0.95, 0.1, 0.0)
    for step in batches:
        total: Any = 0
        for rows_ in step:
            model.loss_and_grads(*rows_, micro_steps=2)
            total = total + model.grads.buffer
        model.grads.buffer[...] = total
        alone.update(1e-2, 1.0)
    for found in Fellows(2).run(act):
        assert np.array_equal(found, model.trained.buffer)


def test_a_peft_adapter_of_another_size_is_refused(tmp_path: Path) -> None:
    run = trained(base(tmp_path), steps=1)
    assert cli.main(["convert", str(run), str(tmp_path / "peft")]) == 0
    huggingface.write_model(tmp_path / "wide", in_memory(replace(LLAMA, ffn=40)), "float32")
    path = tmp_path / "peft" / peft.CONFIG_FILE
    about = json.loads(path.read_text("utf-8")) | {"base_model_name_or_path": str(tmp_path / "wide")}
    path.write_text(json.dumps(about), "utf-8")
    with refused("file.corrupt", "adapter_model.safetensors", "mlp."):
        open_model(tmp_path / "peft")


def test_a_peft_folder_with_its_own_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base is found from anywhere once it was found, and merging into float32 rounds nothing to bfloat16."""
    init = base(tmp_path)
    huggingface.write_model(tmp_path / "low", open_model(init), "bfloat16")
    run = trained(tmp_path / "low", steps=2)
    assert cli.main(["convert", str(run), str(tmp_path / "peft")]) == 0
    path = tmp_path / "peft" / peft.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"base_model_name_or_path": "low"}), "utf-8")
    monkeypatch.chdir(tmp_path)
    found = open_model(Path("peft"))
    assert found.config.lora is not None and found.config.lora.base == str(tmp_path / "low")
    assert found.tokenizer == tmp_path / "low" / "tokenizer.json"
    shutil.copy(found.tokenizer, "peft")
    assert open_model(Path("peft")).tokenizer == Path("peft") / "tokenizer.json"
    assert cli.main(["convert", "peft", "high", "--merge", "--dtype", "float32"]) == 0
    tokens = [[1, 5, 9, 2, 7, 7, 1]]
    logits = [Model.load(Path(name), machine=Laptop()).logits(tokens) for name in ("peft", "high")]
    assert np.abs(logits[0] - logits[1]).max() < 1e-5


def test_a_base_on_the_hub_keeps_its_name(tmp_path: Path) -> None:
    """Its folder in the hub's cache is not written into other files."""
    run = trained(base(tmp_path), steps=1)
    assert cli.main(["convert", str(run), str(tmp_path / "peft")]) == 0
    path = tmp_path / "peft" / peft.CONFIG_FILE
    about = json.loads(path.read_text("utf-8")) | {"base_model_name_or_path": "owner/name"}
    path.write_text(json.dumps(about), "utf-8")
    lora = peft.read_adapter(tmp_path / "peft", lambda _: open_model(tmp_path / "llama")).config.lora
    assert lora is not None and lora.base == "owner/name"
    path.write_text(json.dumps(about | {"lora_alpha": float("nan")}), "utf-8")
    with refused("file.corrupt", path, "lora_alpha"):
        open_model(tmp_path / "peft")
