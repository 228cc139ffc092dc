"""Hugging Face folders written by llmpy and by `transformers`, read by each other. Requires PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.laptop import Laptop
from support.samples import in_memory, llama_tokenizer, same, with_tokenizer

from llmpy.backend import cpu, load
from llmpy.data.tokenizer import Tokenizer
from llmpy.formats import huggingface, open_model
from llmpy.formats.gguf import write_model as write_gguf
from llmpy.model.config import ModelConfig
from llmpy.model.families import language_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")  # of transformers

CONFIG = ModelConfig(layers=3, heads=3, channels=48, context=40, vocab_size=301)
TOKENS = np.random.default_rng(0).integers(0, 301, (2, 33), dtype=np.int32)


def ours(path: Path) -> np.ndarray:
    """Return the float32 logits of a model on disk."""
    source = open_model(path)
    model = language_model(source.config, Laptop())
    source.load_into(model)
    return model.logits(TOKENS, None)


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


TWO = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 301}
STRETCHED = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LLAMAS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "untied, grouped": (
        "Llama",
        {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    ),
    "stretched": ("Llama", {"num_key_value_heads": 1, "rope_parameters": STRETCHED, "head_dim": 16}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 128}),
}  # fmt: skip


def random_llama(name: str, **others: Any) -> Any:
    """Return a random model of `transformers` whose norms and biases are not 1 and 0."""
    torch.manual_seed(3)
    kind, more = LLAMAS[name]
    about = TWO | {"num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2} | more | others
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**about))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return model


@pytest.mark.parametrize("size", ["10GB", "50KB"])
@pytest.mark.parametrize("name", LLAMAS)
def test_llamas_go_through_our_folders_unchanged(tmp_path: Path, name: str, size: str) -> None:
    model = random_llama(name)
    dtype = "bfloat16" if size == "50KB" else "float32"
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "theirs", max_shard_size=size)
    assert (tmp_path / "theirs" / huggingface.INDEX_FILE).exists() == (size == "50KB")
    source = open_model(tmp_path / "theirs")
    huggingface.write_model(tmp_path / "ours", source, dtype)
    assert same(open_model(tmp_path / "ours"), source)
    assert source.dtype == dtype
    found = []
    for folder in ("theirs", "ours"):  # the float32 model itself differs: `to` rounds the angles of RoPE as well
        again, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / folder, output_loading_info=True, dtype=torch.float32
        )
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(again) is type(model)
        found.append(theirs(again))
    assert np.array_equal(*found)
    assert close(ours(tmp_path / "theirs"), found[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2**-8), ("bfloat16", 2**-5)])
@pytest.mark.parametrize("name", LLAMAS)
def test_llama_cpp_computes_the_same(tmp_path: Path, name: str, dtype: str, tolerance: float) -> None:
    """Log-probabilities of llama.cpp, with a float32 cache, at each of 64 positions.

    It rounds the inputs of its 15 products to the type of the weights: eight times 2⁻¹¹ or 2⁻⁸ is allowed.
    """
    pytest.importorskip("xllamacpp")
    V = llama_tokenizer(tmp_path / "tokenizer.json").get_vocab_size()
    model = random_llama(name, vocab_size=V)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype)).float()
    model.save_pretrained(tmp_path)
    write_gguf(tmp_path / "m.gguf", open_model(tmp_path), dtype)
    ids = np.random.default_rng(0).integers(0, V - 3, 64).tolist()
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0].double()
    compare_with_llama_cpp(tmp_path / "m.gguf", ids, logits.numpy(), tolerance)


def test_llama_cpp_computes_the_same_in_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both round weights and inputs in the same blocks; llama.cpp also the embedding, and scales of inputs.

    Measured: 0.033 apart, while both are 0.09 to 0.10 from float32: the weights are ten times those of trained models.
    """
    pytest.importorskip("xllamacpp")
    gguf = pytest.importorskip("gguf")
    V = llama_tokenizer(tmp_path / "tokenizer.json").get_vocab_size()
    model = random_llama("untied, grouped", vocab_size=V, hidden_size=64, intermediate_size=96)
    embedding, kind = model.model.embed_tokens.weight, gguf.GGMLQuantizationType.Q8_0
    embedding.data = torch.tensor(gguf.dequantize(gguf.quantize(embedding.detach().numpy(), kind), kind))
    model.save_pretrained(tmp_path)
    source = open_model(tmp_path)
    write_gguf(tmp_path / "m.gguf", source, "q8_0")
    monkeypatch.setattr(cpu, "native_dtype", lambda: "float32")
    ours = language_model(source.config, load("cpu", dtype="int8"), trainable=False)
    source.load_into(ours)
    ids = np.random.default_rng(0).integers(0, V - 3, 64)
    logits = ours.logits(ids.astype(np.int32)[None], None)[0]
    compare_with_llama_cpp(tmp_path / "m.gguf", ids.tolist(), logits, 0.05)


def compare_with_llama_cpp(file: Path, ids: list[int], logits: np.ndarray, tolerance: float) -> None:
    """Compare log-probabilities with those of logits (n, V), relative to the largest of these."""
    cpp = pytest.importorskip("xllamacpp")
    V = logits.shape[1]
    p = cpp.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.warmup, p.cpuparams.n_threads = str(file), 64, 1, False, 1
    p.cache_type_k = p.cache_type_v = cpp.ggml_type.GGML_TYPE_F32
    p.flash_attn_type = cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = cpp.Server(p)
    expected = torch.log_softmax(torch.tensor(logits).double(), -1).numpy()
    seen, worst, largest = 0, 0.0, np.abs(logits).max()
    for n in range(1, 64):
        settings = {"n_predict": 1, "n_probs": V, "temperature": 0.0, "cache_prompt": False}
        found = server.handle_completions({"prompt": ids[:n], **settings})["choices"][0]["logprobs"]
        if found is not None:  # of a token that is no whole character
            for token in found["content"][0]["top_logprobs"]:
                worst = max(worst, abs(token["logprob"] - expected[n - 1][token["id"]]) / largest)
            seen += len(found["content"][0]["top_logprobs"]) == V
    assert seen > 32
    assert worst < tolerance
