"""Hugging Face folders written by llmpy and by `transformers`, read by each other. Requires PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.laptop import Laptop
from support.samples import in_memory, with_tokenizer

from llmpy.data.tokenizer import Tokenizer
from llmpy.formats import huggingface, open_model
from llmpy.formats.gguf import write_model as write_gguf
from llmpy.model.config import ModelConfig
from llmpy.model.gpt2 import GPT2
from llmpy.tools.selftest import all_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")  # of transformers

CONFIG = ModelConfig(layers=3, heads=3, channels=48, context=40, vocab_size=301)
TOKENS = np.random.default_rng(0).integers(0, 301, (2, 33), dtype=np.int32)


def ours(path: Path) -> np.ndarray:
    """Return the float32 logits of a model on disk."""
    source = open_model(path)
    model = GPT2(source.config, Laptop())
    source.fill(model.params)
    return all_logits(model, TOKENS)


def theirs(model: Any) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model.eval()(torch.from_numpy(TOKENS.astype(np.int64))).logits.numpy()
    return found


def random_model() -> Any:
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=301, n_positions=40, n_embd=48, n_layer=3, n_head=3, initializer_range=0.2, resid_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Compare to 1e-5 of their scale: both are float32."""
    return float(np.abs(a - b).max()) <= 1e-5 * float(np.abs(b).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_ours(tmp_path: Path, dtype: str) -> None:
    source = with_tokenizer(in_memory(CONFIG, dtype), tmp_path / "t.json")
    huggingface.write_model(tmp_path / "m", source, dtype)
    model, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert close(ours(tmp_path / "m"), theirs(model.float()))
    text = "Hello, wörld <|endoftext|> 你"
    their = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert their(text)["input_ids"] == Tokenizer.load(tmp_path / "t.json").encode(text)
    assert their.eos_token_id == model.config.eos_token_id == 256


@pytest.mark.parametrize("size", ["10GB", "50KB"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_we_load_theirs(tmp_path: Path, dtype: str, size: str) -> None:
    model = random_model().to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / huggingface.INDEX_FILE).exists() == (size == "50KB")
    source = open_model(tmp_path)
    model.float()
    assert (source.dtype, source.config) == (dtype, CONFIG)
    assert close(ours(tmp_path), theirs(model))


def test_round_trip_is_exact(tmp_path: Path) -> None:
    model = random_model()
    model.save_pretrained(tmp_path / "theirs")
    huggingface.write_model(tmp_path / "ours", open_model(tmp_path / "theirs"), "float32")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_transformers_reads_our_gguf(tmp_path: Path) -> None:
    for needed in ("gguf", "accelerate"):
        pytest.importorskip(needed)
    source = with_tokenizer(in_memory(replace(CONFIG, context=1024)), tmp_path / "t.json")
    write_gguf(tmp_path / "m.gguf", source, "float32")
    huggingface.write_model(tmp_path / "hf", source, "float32")
    # transformers ignores the file's context and assumes 1024; llama.cpp reads it
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert close(ours(tmp_path / "hf"), theirs(model))
