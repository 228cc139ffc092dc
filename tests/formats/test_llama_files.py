"""Files of Llama, Qwen2 and Qwen3: round trips, spellings of config.json, what is refused, GGUF."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import chats
from support.laptop import Laptop
from support.models import build
from support.refused import refused
from support.samples import in_memory, llama_tokenizer, same, sharded

from llmpy.cli.main import main
from llmpy.data.tokenizer import Tokenizer
from llmpy.formats import huggingface, native, open_model, resolve
from llmpy.formats.convert import write
from llmpy.formats.gguf import write_model as write_gguf
from llmpy.formats.source import Source, shapes
from llmpy.generate.generation import Generation, Text
from llmpy.model.arena import Arena
from llmpy.model.config import LlamaConfig, RopeScaling
from llmpy.model.families import params_table
from llmpy.model.rope import frequencies
from llmpy.rng import Xorshift64Star

LLAMA = LlamaConfig(layers=2, heads=4, channels=16, context=64, vocab_size=300, kv_heads=2, ffn=24)
CONFIGS = {
    "Llama": LLAMA,
    "untied": replace(LLAMA, tied=False, rope_theta=5e5, norm_eps=1e-6),
    "stretched": replace(LLAMA, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32), kv_heads=1),
    "Qwen2": replace(LLAMA, qkv_bias=True),
    "Qwen3": replace(LLAMA, qk_norm=True, head_size=10, tied=False),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trips_are_exact(tmp_path: Path, name: str, dtype: str) -> None:
    source = in_memory(CONFIGS[name], dtype)
    sharded(tmp_path / "a", source)
    assert same(found := open_model(tmp_path / "a"), source)
    assert found.what == f"{name if name in huggingface_names() else 'Llama'} of Hugging Face"
    log: list[str] = []
    write(found, tmp_path / "b", "hf", None, log.append)
    write(found, tmp_path / "c", "native", None, log.append)
    assert open_model(tmp_path / "c").config == source.config
    write(open_model(tmp_path / "c"), tmp_path / "d", "hf", "float32", log.append)
    for folder in ("b", "c", "d"):
        again = open_model(tmp_path / folder)
        for tensor in shapes(source.config):
            assert np.array_equal(again.read(tensor), source.read(tensor).astype(np.float32)), (folder, tensor)
    assert "llm.py" in (tmp_path / "b" / "README.md").read_text("utf-8")


def huggingface_names() -> list[str]:
    return [family.name for family in huggingface.FAMILIES.values()]


def test_names_and_shapes_are_those_of_transformers(tmp_path: Path) -> None:
    source = in_memory(CONFIGS["Qwen3"])
    huggingface.write_model(tmp_path, source, "float32")
    tensors = load_file(tmp_path / "model.safetensors")
    qkv, gate_up = source.read("attn_qkv_w")[1], source.read("mlp_gate_up_w")[1]
    layer = "model.layers.1."
    for x, rows in {"q": slice(40), "k": slice(40, 60), "v": slice(60, 80)}.items():
        assert np.array_equal(tensors[f"{layer}self_attn.{x}_proj.weight"], qkv[rows])
    assert np.array_equal(tensors[f"{layer}mlp.gate_proj.weight"], gate_up[:24])
    assert np.array_equal(tensors[f"{layer}mlp.up_proj.weight"], gate_up[24:])
    assert tensors[f"{layer}self_attn.q_norm.weight"].shape == (10,)
    assert tensors["lm_head.weight"].shape == tensors["model.embed_tokens.weight"].shape == (300, 16)
    assert len(tensors) == 3 + 11 * 2


def change_config(folder: Path, change: dict[str, Any]) -> None:
    """Change fields of config.json; ... removes one."""
    path = folder / "config.json"
    about = json.loads(path.read_text("utf-8")) | change
    path.write_text(json.dumps({key: value for key, value in about.items() if value is not ...}), "utf-8")


FIVE = {"rope_theta": ..., "rope_scaling": ...}  # transformers 5 has neither
SCALED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"head_dim": ..., "tie_word_embeddings": True}, {}),
        ({"head_dim": None, "rope_scaling": None, "architectures": ...}, {}),
        ({"rms_norm_eps": ..., "rope_theta": ...}, {"norm_eps": 1e-6}),
        ({**FIVE, "rope_parameters": {"rope_type": "default", "rope_theta": 100000}}, {"rope_theta": 1e5}),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 3e5}, {"rope_theta": 3e5}),
        ({"rope_scaling": {"rope_type": "llama3", **SCALED}}, {"rope_scaling": RopeScaling(8, 1, 4, 32)}),
        (
            {**FIVE, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **SCALED}},
            {"rope_scaling": RopeScaling(8, 1, 4, 32), "rope_theta": 5e5},
        ),
        ({"sliding_window": None, "layer_types": ["full_attention"] * 2, "num_experts": 0}, {}),
    ],
)
def test_spellings_of_config(tmp_path: Path, change: dict[str, Any], expected: dict[str, Any]) -> None:
    huggingface.write_model(tmp_path, in_memory(LLAMA), "float32")
    change_config(tmp_path, change)
    assert open_model(tmp_path).config == replace(LLAMA, **expected)


@pytest.mark.parametrize(
    ("change", "code", "name"),
    [
        ({"model_type": "mistral"}, "model.unsupported", "model_type is 'mistral'"),
        ({"model_type": ["llama"]}, "model.unsupported", "['llama']"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "model.unsupported", "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "model.unsupported", "hidden_act is 'gelu'"),
        ({"is_causal": False}, "model.unsupported", "is_causal is False"),
        ({"mlp_bias": True}, "model.unsupported", "mlp_bias is True"),
        ({"attention_bias": True}, "model.unsupported", "attention_bias is True"),
        ({"sliding_window": 4096}, "model.unsupported", "sliding_window is 4096"),
        ({"use_sliding_window": True}, "model.unsupported", "use_sliding_window is True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "model.unsupported", "sliding_attention"),
        ({"num_local_experts": 8}, "model.unsupported", "num_local_experts is 8"),
        ({"quantization_config": {"bits": 4}}, "model.unsupported", "quantization_config is {'bits': 4}"),
        ({"partial_rotary_factor": 0.5}, "model.unsupported", "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "model.unsupported", "rope_type is 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "model.unsupported", "rope_type is 'yarn'"),
        ({"rope_scaling": {"rope_type": "default", "x": 2}}, "model.unsupported", "x of RoPE is 2"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "file.corrupt", "low_freq_factor is None"),
        ({"rope_scaling": [1]}, "file.corrupt", "rope_scaling is [1]"),
        ({"rope_theta": "1e4"}, "file.corrupt", "rope_theta is '1e4'"),
        ({"rms_norm_eps": -1}, "file.corrupt", "rms_norm_eps is -1"),
        ({"tie_word_embeddings": 2}, "model.unsupported", "tie_word_embeddings is 2"),
        ({"tie_word_embeddings": False}, "model.unsupported", "lacks lm_head.weight"),
        ({"num_key_value_heads": 3}, "file.corrupt", "3 key/value heads"),
        ({"head_dim": 6}, "file.corrupt", "q_proj.weight is F32 (16, 16)"),
        ({"intermediate_size": 1 << 30, "hidden_size": 1 << 30}, "file.corrupt", ""),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path: Path, change: dict[str, Any], code: str, name: str) -> None:
    huggingface.write_model(tmp_path, in_memory(LLAMA), "float32")
    change_config(tmp_path, change)
    with refused(code, tmp_path, name):
        open_model(tmp_path)


def test_tensors_must_be_those_of_the_config(tmp_path: Path) -> None:
    huggingface.write_model(tmp_path, in_memory(LLAMA), "float32")
    path, norm = tmp_path / "model.safetensors", "model.layers.1.input_layernorm.weight"
    good = load_file(path)
    embedding = good["model.embed_tokens.weight"]
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}  # of old files
    save_file(good | buffer | {"lm_head.weight": embedding.copy()}, path)
    assert same(open_model(tmp_path), in_memory(LLAMA))
    for change, code, name in (
        ({"lm_head.weight": embedding + 1}, "model.unsupported", "lm_head.weight differs from model.embed_tokens"),
        ({norm: np.ones(8, np.float32)}, "file.corrupt", f"{norm} is F32 (8,)"),
        ({"model.layers.0.self_attn.q_proj.bias": np.ones(16, np.float32)}, "model.unsupported", "q_proj.bias"),
        ({norm: None}, "model.unsupported", f"lacks {norm}"),
    ):
        save_file({key: x for key, x in (good | change).items() if x is not None}, path)
        with refused(code, tmp_path, name):
            open_model(tmp_path)


def bfloat16_arena(config: LlamaConfig) -> Arena:
    """Return an arena of NaN as a model that is not trained has it."""
    table = [replace(t, wide=not t.decay) for t in params_table(config)]
    arena = Arena(table, np.empty, np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))
    for buffer in arena.buffers:
        buffer[:] = np.nan
    return arena


def test_reading_holds_one_tensor_besides_the_model(tmp_path: Path) -> None:
    config = LlamaConfig(8, 4, 64, 64, 300, kv_heads=2, ffn=1024, tied=False)
    source = in_memory(config, "bfloat16")
    huggingface.write_model(tmp_path, source, "bfloat16")
    arena, found = bfloat16_arena(config), open_model(tmp_path)
    tracemalloc.start()
    found.fill(arena)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 64 * 1024 * 2 < arena.mlp_down_w.nbytes  # layers have 64 · 1024 elements
    for name in shapes(config):
        assert np.array_equal(getattr(arena, name), source.read(name))


@pytest.mark.parametrize("kind", ["hf", "native"])
def test_rows_beyond_the_tokenizer_are_kept(tmp_path: Path, kind: str) -> None:
    """They count in the loss, as in transformers, but are not sampled."""
    source = in_memory(replace(LLAMA, tied=False), "bfloat16")
    write(source, tmp_path / "m", kind, None, [].append)
    Tokenizer.bytes().save(tmp_path / "m" / "tokenizer.json")
    found = resolve(str(tmp_path / "m"), [].append)
    assert found.config == source.config
    arena = bfloat16_arena(source.config)  # type: ignore[arg-type]
    found.fill(arena)
    for name in ("wte", "head"):
        assert np.array_equal(getattr(arena, name), source.read(name))
    model = build(found.config, Laptop())
    model.params.norm_f_w[...], model.params.head[...] = 0, 0
    model.params.norm_f_w[0], model.params.head[300, 0] = 1, 1e3  # the likeliest or the least likely
    texts = [Text([5 + seed], 9, Xorshift64Star(seed)) for seed in (1, 2)]
    generation = Generation.of(model, texts, 9, 30, tokens=257)
    while generation.texts:
        assert all(text.ids[-1] < 257 for text, _ in generation.step())
    shutil.rmtree(tmp_path / "m")
    write(in_memory(replace(LLAMA, vocab_size=256)), tmp_path / "m", kind, None, [].append)
    Tokenizer.bytes().save(tmp_path / "m" / "tokenizer.json")
    with refused("tokenizer.vocab-mismatch", "257", "256"):
        resolve(str(tmp_path / "m"), [].append)


def with_files(folder: Path, words: str = "llama") -> Source:
    """Write a Llama with the files of a model for chats; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    V = llama_tokenizer(folder / "tokenizer.json").get_vocab_size()
    huggingface.write_model(folder, in_memory(replace(LLAMA, vocab_size=V)), "float32")
    settings = {"eos_token": "<|end_of_text|>", "bos_token": "<|begin_of_text|>", "model_max_length": 99, "x": 1}
    for name, about in {
        "tokenizer_config.json": settings,
        "generation_config.json": {"eos_token_id": [V - 2, V - 1], "temperature": 0.6},
    }.items():
        (folder / name).write_text(json.dumps(about), "utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
    change_config(folder, {"bos_token_id": V - 3, "eos_token_id": [V - 2, V - 1]})
    return open_model(folder)


def test_files_that_accompany_a_model_stay(tmp_path: Path) -> None:
    source = with_files(tmp_path / "a")
    write(source, tmp_path / "b", "hf", None, [].append)
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "config.json")
    for name in names[:-1]:
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes(), name
    write(open_model(tmp_path / "b"), tmp_path / "run", "native", None, [].append)  # its tokenizer.json keeps them
    write(open_model(tmp_path / "run"), tmp_path / "c", "hf", None, [].append)
    assert (tmp_path / "c" / "chat_template.jinja").read_text("utf-8") == "{{ messages }}"
    stops = json.loads((tmp_path / "c" / "generation_config.json").read_text("utf-8"))["eos_token_id"]
    assert stops == [source.config.vocab_size - 2, source.config.vocab_size - 1]
    a, b = (json.loads((tmp_path / folder / "config.json").read_text("utf-8")) for folder in "ab")
    assert a == b
    assert same(open_model(tmp_path / "b"), source)


def test_stops_stay_without_a_template(tmp_path: Path) -> None:
    with_files(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").unlink()
    for name, to in ("a", "native"), ("native", "hf"):
        write(open_model(tmp_path / name), tmp_path / to, to, None, [].append)
    tokenizers = [Tokenizer.load(tmp_path / name) for name in ("a", "hf")]
    assert tokenizers[0].stops == tokenizers[1].stops and len(tokenizers[0].stops) == 2


def gguf_read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)
    tensors = {t.name: t.data.reshape(tuple(reversed(t.shape))) for t in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


@pytest.mark.parametrize("name", CONFIGS)
def test_gguf(tmp_path: Path, name: str) -> None:
    source, c = in_memory(CONFIGS[name]), CONFIGS[name]
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "m.gguf", source, "float32")
    value, tensors = gguf_read(tmp_path / "m.gguf")
    kind = huggingface.kind_of(c)
    expected = {
        "block_count": 2, "context_length": 64, "embedding_length": 16, "feed_forward_length": 24, "vocab_size": 300,
        "attention.head_count": 4, "attention.head_count_kv": c.kv_heads, "attention.key_length": c.head_size,
        "attention.value_length": c.head_size, "rope.dimension_count": c.head_size, "rope.freq_base": c.rope_theta,
        "attention.layer_norm_rms_epsilon": pytest.approx(c.norm_eps),
    }  # fmt: skip
    assert value["general.architecture"] == kind
    assert {key: value[f"{kind}.{key}"] for key in expected} == expected
    assert ("output.weight" in tensors, "rope_freqs.weight" in tensors) == (not c.tied, c.rope_scaling is not None)
    assert ("blk.0.attn_q.bias" in tensors, "blk.1.attn_k_norm.weight" in tensors) == (c.qkv_bias, c.qk_norm)
    if c.rope_scaling is not None:
        plain = frequencies(replace(c, rope_scaling=None))
        assert np.array_equal(tensors["rope_freqs.weight"], plain / frequencies(c))
        assert tensors["rope_freqs.weight"].max() > tensors["rope_freqs.weight"].min() == 1
    rows = c.heads * c.head_size
    ours, theirs = source.read("attn_qkv_w")[1][:rows], tensors["blk.1.attn_q.weight"]
    for head, i in ((0, 0), (3, c.head_size // 2 - 1)):  # channels i and i + HS/2 are rotated together
        first, half = head * c.head_size, c.head_size // 2
        at = (first + 2 * i, first + 2 * i + 1) if kind == "llama" else (first + i, first + i + half)
        assert np.array_equal(theirs[list(at)], ours[[first + i, first + i + half]])
    assert np.array_equal(tensors["blk.0.ffn_up.weight"], source.read("mlp_gate_up_w")[0][24:])


def test_gguf_of_a_model_for_chats(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    source = with_files(tmp_path / "a")
    V = source.config.vocab_size
    write_gguf(tmp_path / "m.gguf", source, "float16")
    value, _ = gguf_read(tmp_path / "m.gguf")
    keys = ("pre", "bos_token_id", "eos_token_id", "eot_token_id", "add_bos_token")
    assert [value[f"tokenizer.ggml.{key}"] for key in keys] == ["llama-bpe", V - 3, V - 2, V - 1, True]
    assert value["tokenizer.chat_template"] == "{{ messages }}"


def test_words_that_llama_cpp_knows(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from tokenizers import Regex, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Library

    from llmpy.formats.gguf import QWEN2

    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2, digits = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Digits
    qwen = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), spelling])
    for words, name in (
        (pre_tokenizers.Sequence([digits(individual_digits=True), gpt2]), "smollm"),
        (pre_tokenizers.Sequence([digits(individual_digits=False), gpt2]), None),
        (qwen, "qwen2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "merged_with_next"), spelling]), None),
        (gpt2, "gpt-2"),
    ):
        source = with_files(tmp_path / "a")
        path = tmp_path / "a" / "tokenizer.json"
        library = Library.from_file(str(path))
        library.pre_tokenizer = words
        library.model.ignore_merges = False
        library.normalizer = normalizers.NFC() if name == "qwen2" else None
        library.save(str(path))
        if name is None:
            with refused("tokenizer.unsupported", path):
                write_gguf(tmp_path / "m.gguf", source, "float32")
        else:
            write_gguf(tmp_path / "m.gguf", source, "float32")
            assert gguf_read(tmp_path / "m.gguf")[0]["tokenizer.ggml.pre"] == name


def test_formats_without_llamas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native.write_model(tmp_path / "run", in_memory(LLAMA))
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "m.bin")]) == 1
    assert "no Llama models" in (err := capsys.readouterr().err) and "[convert.unsupported-model]" in err
    both = in_memory(replace(LLAMA, qk_norm=True, qkv_bias=True))
    with refused("convert.unsupported-model", "Qwen3"):
        write(both, tmp_path / "m", "hf", None, [].append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_sentencepiece_in_gguf(tmp_path: Path) -> None:
    """llama.cpp merges the pair with the best score; it gives the same ids (dev/LOG.md)."""
    pytest.importorskip("gguf")
    library, _ = chats.sentencepiece()
    library.save(str(tmp_path / "tokenizer.json"))
    about, V = json.loads(library.to_str()), library.get_vocab_size()
    source = replace(in_memory(replace(LLAMA, vocab_size=V + 1)), tokenizer=tmp_path / "tokenizer.json")
    write_gguf(tmp_path / "m.gguf", source, "float32")
    value, _ = gguf_read(tmp_path / "m.gguf")
    names = ("model", "add_space_prefix", "add_bos_token", "bos_token_id")
    ids, kinds = about["model"]["vocab"], value["tokenizer.ggml.token_type"]
    assert [value[f"tokenizer.ggml.{name}"] for name in names] == ["llama", True, True, ids["<s>"]]
    assert (kinds[ids["<unk>"]], kinds[ids["<s>"]], kinds[ids["<0x0A>"]], kinds[V]) == (2, 3, 6, 5)
    made = [ids["".join(pair)] for pair in about["model"]["merges"]]
    scores = [value["tokenizer.ggml.scores"][i] for i in dict.fromkeys(made)]
    assert scores == sorted(set(scores), reverse=True)
    assert len(scores) > 10
    chats.sentencepiece("first")[0].save(str(tmp_path / "tokenizer.json"))
    with refused("tokenizer.unsupported", tmp_path):
        write_gguf(tmp_path / "n.gguf", source, "float32")
