"""Hugging Face's folders: config.json, model.safetensors (or shards with an index), tokenizer files, README.md.

GPT-2's linear layers are "Conv1D": weights are (in, out), the transpose of ours. The matrices of queries, keys and
values, and of gate and up, are the rows of one of ours; tensors are read one at a time into their part of it. If the
head is tied to the embedding, an lm_head.weight must equal it. Both have V rows, without padding.

Source: transformers 5.24, `models/{gpt2,llama,qwen2,qwen3}` and `modeling_rope_utils.py`; versions 4 have rope_theta
and rope_scaling instead of rope_parameters.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data import pretrained
from ..data.tokenizer import Tokenizer
from ..errors import LlmpyError
from ..model.arena import Arena
from ..model.config import LlamaConfig, ModelConfig, RopeScaling
from ..run.checkpoint import check_finite, damaged, opened
from ..run.folder import MODEL_FILE, TOKENIZER_FILE
from ..version import __version__
from .source import (
    DTYPES,
    HUGGING_FACE,
    Source,
    by_name,
    cast,
    clear_padding,
    elements,
    read_json,
    shapes,
    write_json,
    write_tensors,
)

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", MODEL_FILE, f"{MODEL_FILE}.index.json"
TOKENIZER_FILES = (pretrained.WHOLE, "vocab.json", "merges.txt", *pretrained.SETTINGS[:3])
HEAD = "lm_head.weight"
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # causal masks and RoPE in old files
TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
TRAINED = "llmpy_trained_length"  # positions beyond are untrained; other programs ignore it
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Family(NamedTuple):
    """A class of `transformers`."""

    name: str
    architecture: str
    shape: Mapping[str, str]  # field of our config → theirs
    fixed: Mapping[str, tuple[Any, ...]]  # required values, the first one the default
    names: Mapping[str, str]  # see `by_name`
    prefix: str = ""  # of all names; absent in files of models without a head
    transposed: bool = False  # the matrices of layers
    head_size: int = 0  # default; 0: channels / heads

    def theirs(self, name: str, x: np.ndarray, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
        """Yield views of tensor x under their names, in their layout."""
        for theirs, view in by_name(self.names, name, x, config):
            yield theirs, view.T if self.transposed and x.ndim == 3 else view


SHAPE = {
    "layers": "num_hidden_layers", "heads": "num_attention_heads", "channels": "hidden_size",
    "context": "max_position_embeddings", "vocab_size": "vocab_size", "ffn": "intermediate_size",
    "kv_heads": "num_key_value_heads", "head_size": "head_dim",
}  # fmt: skip
OPTIONAL = {"kv_heads", "head_size"}
FIXED = {
    "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (False,),
    "is_causal": (None, True), "partial_rotary_factor": (None, 1), "quantization_config": (None,),
    "tie_word_embeddings": (False, True),
}  # fmt: skip
BLOCK = "model.layers.{}."
NAMES = {
    "wte": "model.embed_tokens", "head": "lm_head", "attn_qkv": " ".join(f"{BLOCK}self_attn.{x}_proj" for x in "qkv"),
    "attn_proj": f"{BLOCK}self_attn.o_proj", "mlp_gate_up": f"{BLOCK}mlp.gate_proj {BLOCK}mlp.up_proj",
    "mlp_down": f"{BLOCK}mlp.down_proj", "norm_1": f"{BLOCK}input_layernorm", "q_norm": f"{BLOCK}self_attn.q_norm",
    "k_norm": f"{BLOCK}self_attn.k_norm", "norm_2": f"{BLOCK}post_attention_layernorm", "norm_f": "model.norm",
}  # fmt: skip
FAMILIES = {
    "gpt2": Family(
        "GPT-2", "GPT2LMHeadModel",
        dict(zip(SHAPE, ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"), strict=False)),
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "layer_norm_epsilon": (1e-5,),
            "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "tie_word_embeddings": (True,),
            "add_cross_attention": (False,),
        },
        {
            "wte": "wte", "wpe": "wpe", "attn_qkv": "h.{}.attn.c_attn", "attn_proj": "h.{}.attn.c_proj",
            "mlp_fc": "h.{}.mlp.c_fc", "mlp_proj": "h.{}.mlp.c_proj", "ln_1": "h.{}.ln_1", "ln_2": "h.{}.ln_2",
            "ln_f": "ln_f",
        },
        "transformer.", transposed=True,
    ),
    "llama": Family("Llama", "LlamaForCausalLM", SHAPE, FIXED | {"sliding_window": (None,)}, NAMES),
    "qwen2": Family("Qwen2", "Qwen2ForCausalLM", SHAPE, FIXED | {"attention_bias": (False, True)}, NAMES),  # unused
    "qwen3": Family("Qwen3", "Qwen3ForCausalLM", SHAPE, FIXED, NAMES, head_size=128),
}  # fmt: skip


def kind_of(config: ModelConfig) -> str:
    """Return the model_type of a config. Raises LlmpyError if `transformers` has no such model."""
    if not isinstance(config, LlamaConfig):
        return "gpt2"
    if config.qk_norm and config.qkv_bias:
        what = "the model has a bias and a norm of queries and keys, unlike Qwen2 and Qwen3"
        raise LlmpyError("convert.unsupported-model", what, "Use --to native")
    return "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"


def named(name: str, x: np.ndarray, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the names of Hugging Face for parts of our tensor, and the views."""
    yield from FAMILIES[kind_of(config)].theirs(name, x, config)


def read_model(folder: Path, weights: str = WEIGHTS_FILE) -> Source:
    """Open a folder with its tensors in `weights`. Raises LlmpyError for another model or corrupt files."""
    family, config, trained_length = read_config(folder / CONFIG_FILE)
    where = _find_tensors(folder, weights, config)
    if elements(config) >> 62:
        raise damaged(folder / CONFIG_FILE, f"{elements(config):,} parameters")
    (embedding, _), *_ = family.theirs("wte", np.empty((0, 0)), config)
    prefix = family.prefix if family.prefix + embedding in where else ""
    expected = {
        prefix + theirs: x.shape
        for name, shape in shapes(config).items()
        for theirs, x in family.theirs(name, np.broadcast_to(np.int8(0), shape), config)
    }
    missing = sorted(expected.keys() - where.keys())
    unknown = sorted(n for n in where.keys() - expected.keys() if n != HEAD and not n.endswith(BUFFERS))
    if missing or unknown:
        which = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which is not in {family.name}"
        raise _unsupported(f"{folder} {which}")
    for name, shape in expected.items():
        path, found, kind = where[name]
        if found != shape or kind not in TYPES:
            raise damaged(path, f"{name} is {kind} {found}, {CONFIG_FILE} requires {shape}")
    types = {TYPES[where[name][2]] for name in expected}
    dtype = types.pop() if len(types) == 1 else "float32"

    def tensor(name: str) -> np.ndarray:
        with opened(where[name][0]) as file:
            return np.asarray(file.get_tensor(name))

    def fill(name: str, out: np.ndarray, check: bool = False) -> None:
        for theirs, x in family.theirs(name, out, config):
            found = tensor(prefix + theirs)
            if check:
                check_finite(folder, theirs, found)
            x[...] = found[: len(x)]  # fewer rows: see `cut`

    def read(name: str) -> np.ndarray:
        out = np.zeros(shapes(config)[name], DTYPES[dtype])
        fill(name, out)
        return out

    def load(params: Arena) -> None:
        clear_padding(params, config.vocab_size)
        for t, view in params.items():
            fill(t.name, view, check=True)

    wte = prefix + embedding
    tied = HEAD in where.keys() - expected.keys()
    if tied and (where[HEAD][1:] != where[wte][1:] or not np.array_equal(tensor(HEAD), tensor(wte))):
        raise _unsupported(f"{folder} has tie_word_embeddings, but {HEAD} differs from {wte}")
    what = f"{family.name} {HUGGING_FACE}"
    return Source(folder, what, config, dtype, trained_length, read, pretrained.find(folder), load)


def write_model(folder: Path, source: Source, dtype: str) -> None:
    """Write a folder that `transformers` loads for causal language modeling, the weights last."""
    c = source.config
    kind = kind_of(c)
    family = FAMILIES[kind]
    tensors: dict[str, np.ndarray] = {}
    for name in shapes(c):
        for theirs, x in family.theirs(name, cast(source.read(name), dtype, name), c):
            tensors[family.prefix + theirs] = np.ascontiguousarray(x)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [family.architecture],
        "model_type": kind,
        **{theirs: getattr(c, ours) for ours, theirs in family.shape.items()},
        **{key: values[0] for key, values in family.fixed.items() if values[0] is not None},
        **(_llama(c) if isinstance(c, LlamaConfig) else {"n_ctx": c.context}),
        **_write_tokenizer(folder, source),
        "dtype": dtype,
        "llmpy_version": __version__,
        TRAINED: source.trained_length,
    }
    write_json(folder / CONFIG_FILE, config)

    write_tensors(folder / WEIGHTS_FILE, tensors)


def _write_tokenizer(folder: Path, source: Source) -> dict[str, Any]:
    """Write the tokenizer, chat template and generation settings; return the ids of special tokens for config.json.

    Files that came with a Llama or Qwen are copied, else a complete tokenizer.json is written.
    """
    c = source.config
    there = home(source.tokenizer) or source.path
    names: tuple[str, ...] = pretrained.TEMPLATE, pretrained.ENDS
    ids = dict.fromkeys(IDS[:2], c.vocab_size - 1 if c.family == "gpt2" else None)  # as in GPT-2
    if source.tokenizer is not None:
        tokenizer = Tokenizer.load(source.tokenizer)
        ids = {f"{role}_id": i for role, i in tokenizer.roles.items() if f"{role}_id" in IDS}
        if c.family != "gpt2" and (there / pretrained.CONFIG).is_file():
            names += TOKENIZER_FILES
        else:
            tokenizer.save(folder / TOKENIZER_FILE)
            about = {"tokenizer_class": pretrained.FAST, **tokenizer.names, "model_max_length": c.context}
            write_json(folder / pretrained.CONFIG, about)
            if tokenizer.template is not None:
                (folder / pretrained.TEMPLATE).write_text(tokenizer.template.source, "utf-8", newline="\n")
        if tokenizer.template is not None or len(tokenizer.stops) > 1:
            write_json(folder / pretrained.ENDS, {"eos_token_id": sorted(tokenizer.stops)})
    for name in names:
        if (there / name).is_file():
            shutil.copyfile(there / name, folder / name)
    if c.family != "gpt2" and source.what.endswith(HUGGING_FACE):
        about = read_json(there / CONFIG_FILE)
        ids |= {key: about[key] for key in IDS if key in about}
    return ids


def home(tokenizer: Path | None) -> Path | None:
    """Return the folder whose files accompany a tokenizer; None if its name is not that of Hugging Face."""
    return tokenizer.parent if tokenizer is not None and tokenizer.name in TOKENIZER_FILES else None


def _llama(c: LlamaConfig) -> dict[str, Any]:
    """Return the fields of a Llama's config.json that are neither shape nor fixed."""
    scaling = c.rope_scaling
    return {
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "rope_theta": c.rope_theta,  # in the spelling of transformers 4, which 5 reads too
        "rope_scaling": scaling and {
            "rope_type": "llama3", **{theirs: getattr(scaling, ours) for ours, theirs in SCALING.items()}
        },
    }  # fmt: skip


SCALING = {
    "factor": "factor", "low": "low_freq_factor", "high": "high_freq_factor",
    "original": "original_max_position_embeddings",
}  # fmt: skip


def read_config(path: Path) -> tuple[Family, ModelConfig, int]:
    """Return family, shape and trained length of a config.json. Raises LlmpyError unless all of it is supported."""
    about = read_json(path)
    family = FAMILIES.get(kind) if isinstance(kind := about.get("model_type"), str) else None
    if family is None:
        raise _unsupported(f"{path}: model_type is {kind!r}")
    classes = about.get("architectures")
    if family.name != "GPT-2" and classes and (not isinstance(classes, list) or family.architecture not in classes):
        raise _unsupported(f"{path}: architectures is {classes!r}, not {family.architecture}")
    shape: dict[str, Any] = {ours: about.get(theirs) or 0 for ours, theirs in family.shape.items()}
    if not all(type(x) is int and (ours not in OPTIONAL) <= x < 1 << 31 for ours, x in shape.items()):
        raise damaged(path, f"{', '.join(family.shape.values())} must be positive integers")
    types = about.get("layer_types")
    full = ["full_attention"] * len(types) if isinstance(types, list) else None
    more = {"n_inner": (4 * shape["channels"], None), "layer_types": (None, full)}
    for key, values in {**family.fixed, **more, **{key: (None, 0) for key in about if "expert" in key}}.items():
        if about.get(key, values[0]) not in values:
            raise _unsupported(f"{path}: {key} is {about[key]!r:.80}, not {values[0]!r}")
    try:
        config = ModelConfig(**shape) if family.name == "GPT-2" else LlamaConfig(**shape | _rest(path, family, about))
    except LlmpyError as error:
        if error.code != "model.invalid-shape":
            raise
        raise damaged(path, str(error)) from error
    trained, context = about.get(TRAINED), config.context
    return family, config, trained if type(trained) is int and 0 < trained <= context else context


def _rest(path: Path, family: Family, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a LlamaConfig that have defaults or several spellings."""
    rope = about.get("rope_scaling") or about.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise damaged(path, f"rope_scaling is {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaled = kind == "llama3"
    known = {"rope_type", "type", "rope_theta", *(SCALING.values() if scaled else ())}
    if not scaled and kind != "default":
        raise _unsupported(f"{path}: rope_type is {kind!r}, neither 'default' nor 'llama3'")
    for key, value in rope.items():
        if key not in known and (key, value) not in (("partial_rotary_factor", 1), ("factor", 1)):
            raise _unsupported(f"{path}: {key} of RoPE is {value!r}")

    def number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
        value = values.get(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise damaged(path, f"{key} is {value!r}, not a positive number")
        return float(value)

    original = SCALING["original"]
    if scaled and (original in about or original not in rope):  # the former counts in transformers
        rope = rope | {original: about.get(original, about.get("max_position_embeddings"))}
    scaling = None
    if scaled:
        factor, low, high, length = (number(rope, SCALING[f.name]) for f in fields(RopeScaling))
        scaling = RopeScaling(factor, low, high, int(length))
    return {
        "head_size": about.get("head_dim") or family.head_size,
        "rope_theta": number(rope if "rope_theta" in rope else about, "rope_theta", 10_000.0),
        "rope_scaling": scaling,
        "norm_eps": number(about, "rms_norm_eps", 1e-6),
        "tied": bool(about.get("tie_word_embeddings", False)),
        "qkv_bias": family.name == "Qwen2",
        "qk_norm": family.name == "Qwen3",
    }


def _unsupported(what: str) -> LlmpyError:
    known = ", ".join(family.name for family in FAMILIES.values())
    return LlmpyError("model.unsupported", what, f"Use a model that llmpy implements: {known}")


def weight_files(folder: Path, weights: str = WEIGHTS_FILE) -> list[Path]:
    """Return the files of a folder's tensors. Raises LlmpyError if there is neither `weights` nor an index of files."""
    files, index = [weights], folder / INDEX_FILE
    if not (folder / weights).is_file():
        if not index.is_file():
            raise LlmpyError("model.missing", f"{folder} has no {weights}", "Save it with save_pretrained")
        weight_map = read_json(index).get("weight_map")
        files = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not files or not all(isinstance(f, str) and f.isprintable() and Path(f).name == f for f in files):
            raise damaged(index, "its weight_map must name files in the same folder")
    return [folder / name for name in sorted(set(files))]


def _find_tensors(folder: Path, weights: str, config: ModelConfig) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """Return tensor name → (file, shape, type) over all weight files."""
    where: dict[str, tuple[Path, tuple[int, ...], str]] = {}
    for path in weight_files(folder, weights):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118, not a dict
                found = file.get_slice(name)
                where[name] = path, tuple(found.get_shape()), found.get_dtype()
    if len(where) < config.layers:  # before a huge n_layer costs time
        raise damaged(folder / CONFIG_FILE, f"{config.layers:,} layers, but the files have {len(where)} tensors")
    return where
