"""Hugging Face's GPT-2 folders: config.json, model.safetensors (or shards with an index), tokenizer files.

The linear layers are "Conv1D": weights are (in, out), the transpose of ours. The head is tied to wte; an
lm_head.weight, if present, must equal it. wte has the V rows of the vocabulary, without padding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ..data import pretrained
from ..data.tokenizer import Tokenizer
from ..errors import LlmpyError
from ..model.config import ModelConfig
from ..run.checkpoint import damaged, opened
from ..run.folder import MODEL_FILE, TOKENIZER_FILE
from ..system.durable import write_whole
from ..version import __version__
from .source import DTYPES, HUGGING_FACE, Source, by_name, cast, read_json, shapes

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", MODEL_FILE, f"{MODEL_FILE}.index.json"
# ours → theirs, see `by_name`
NAMES = {
    "wte": "wte",
    "wpe": "wpe",
    "attn_qkv": "h.{}.attn.c_attn",
    "attn_proj": "h.{}.attn.c_proj",
    "mlp_fc": "h.{}.mlp.c_fc",
    "mlp_proj": "h.{}.mlp.c_proj",
    "ln_1": "h.{}.ln_1",
    "ln_2": "h.{}.ln_2",
    "ln_f": "ln_f",
}
PREFIX = "transformer."  # of models with a head; OpenAI's upload has none
EMBEDDING, HEAD = "wte.weight", "lm_head.weight"
BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks in old files
TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
TRAINED = "llmpy_trained_length"  # positions beyond are untrained; other programs ignore it
SHAPE = "n_layer", "n_head", "n_embd", "n_positions", "vocab_size"
# Required values of a GPT-2, the first one the default.
FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
}


def read_model(folder: Path, weights: str = WEIGHTS_FILE) -> Source:
    """Open a GPT-2 folder with its tensors in `weights`. Raises LlmpyError for another model or corrupt files."""
    config, trained_length = _read_config(folder / CONFIG_FILE)
    where = _find_tensors(folder, weights, config)
    prefix = PREFIX if PREFIX + EMBEDDING in where else ""
    expected = {
        prefix + theirs: x.shape
        for name, shape in shapes(config).items()
        for theirs, x in _theirs(name, np.broadcast_to(np.int8(0), shape), config)
    }
    missing = sorted(expected.keys() - where.keys())
    unknown = sorted(n for n in where.keys() - expected.keys() if n != HEAD and not n.endswith(BUFFERS))
    if missing or unknown:
        which = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which is not in GPT-2"
        raise LlmpyError("model.not-gpt2", f"{folder} {which}", "Use a GPT-2 with its head tied to the embedding")
    for name, shape in expected.items():
        path, found, kind = where[name]
        if found != shape or kind not in TYPES:
            raise damaged(path, f"{name} is {kind} {found}, {CONFIG_FILE} requires {shape}")
    types = {TYPES[where[name][2]] for name in expected}
    dtype = types.pop() if len(types) == 1 else "float32"

    def tensor(name: str) -> np.ndarray:
        with opened(where[name][0]) as file:
            return np.asarray(file.get_tensor(name))

    def read(name: str) -> np.ndarray:
        out = np.zeros(shapes(config)[name], DTYPES[dtype])
        for theirs, x in _theirs(name, out, config):
            x[...] = tensor(prefix + theirs)
        return out

    wte = prefix + EMBEDDING
    if HEAD in where and (where[HEAD][1:] != where[wte][1:] or not np.array_equal(tensor(HEAD), tensor(wte))):
        what = f"{folder} has an untied head ({HEAD} differs from wte)"
        raise LlmpyError("model.not-gpt2", what, "Use a GPT-2 with its head tied to the embedding")
    return Source(folder, HUGGING_FACE, config, dtype, trained_length, read, pretrained.find(folder))


def write_model(folder: Path, source: Source, dtype: str) -> None:
    """Write a folder that `transformers` loads as GPT2LMHeadModel, the weights last."""
    c = source.config
    tensors: dict[str, np.ndarray] = {}
    for name in shapes(c):
        for theirs, x in _theirs(name, cast(source.read(name), dtype, name), c):
            tensors[PREFIX + theirs] = np.ascontiguousarray(x)
    folder.mkdir(parents=True, exist_ok=True)
    roles = dict.fromkeys(("bos_token", "eos_token"), c.vocab_size - 1)  # as in GPT-2
    if source.tokenizer is not None:
        tokenizer = Tokenizer.load(source.tokenizer)
        tokenizer.save(folder / TOKENIZER_FILE)
        roles = tokenizer.roles
        about = {"tokenizer_class": pretrained.FAST, **tokenizer.names, "model_max_length": c.context}
        _write_json(folder / pretrained.CONFIG, about)
        if tokenizer.template is not None:
            (folder / pretrained.TEMPLATE).write_text(tokenizer.template.source, "utf-8", newline="\n")
            _write_json(folder / pretrained.ENDS, {"eos_token_id": sorted(tokenizer.stops)})
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **dict(zip(SHAPE, (c.layers, c.heads, c.channels, c.context, c.vocab_size), strict=True)),
        "n_ctx": c.context,
        **{key: values[0] for key, values in FIXED.items()},
        **{f"{role}_id": i for role, i in roles.items() if role in ("bos_token", "eos_token", "pad_token")},
        "dtype": dtype,
        "llmpy_version": __version__,
        TRAINED: source.trained_length,
    }
    _write_json(folder / CONFIG_FILE, config)

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, {"format": "pt"})  # required by transformers
        except SafetensorError as error:  # also for a full disk
            raise OSError(str(error)) from error
        temporary.chmod((folder / CONFIG_FILE).stat().st_mode)  # the library writes mode 0600

    write_whole(folder / WEIGHTS_FILE, write)


def _read_config(path: Path) -> tuple[ModelConfig, int]:
    """Return the shape in a config.json and the trained length. Raises LlmpyError unless it is GPT-2."""
    about = read_json(path)
    if about.get("model_type") != "gpt2":
        raise LlmpyError("model.not-gpt2", f"{path}: model_type is {about.get('model_type')!r}", "Use a GPT-2 model")
    shape = [about.get(key) for key in SHAPE]
    if not all(type(x) is int and 0 < x < 1 << 31 for x in shape):
        raise damaged(path, f"{', '.join(SHAPE)} must be positive integers")
    layers, heads, channels, context, vocab_size = shape
    for key, values in {**FIXED, "n_inner": (4 * channels, None)}.items():
        if about.get(key, values[0]) not in values:
            raise LlmpyError("model.not-gpt2", f"{path}: {key} is {about[key]!r}, not {values[0]!r}", "Use a GPT-2")
    trained = about.get(TRAINED)
    try:
        config = ModelConfig(layers, heads, channels, context, vocab_size)
    except LlmpyError as error:
        raise damaged(path, str(error)) from error
    return config, trained if type(trained) is int and 0 < trained <= context else context


def _find_tensors(folder: Path, weights: str, config: ModelConfig) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """Return tensor name → (file, shape, type) over all weight files."""
    files, index = [weights], folder / INDEX_FILE
    if not (folder / weights).is_file():
        if not index.is_file():
            raise LlmpyError("model.missing", f"{folder} has no {weights}", "Save it with save_pretrained")
        weight_map = read_json(index).get("weight_map")
        files = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not files or not all(isinstance(f, str) and f.isprintable() and Path(f).name == f for f in files):
            raise damaged(index, "its weight_map must name files in the same folder")
    where: dict[str, tuple[Path, tuple[int, ...], str]] = {}
    for path in (folder / name for name in sorted(set(files))):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118, not a dict
                found = file.get_slice(name)
                where[name] = path, tuple(found.get_shape()), found.get_dtype()
    if len(where) < config.layers:  # before a huge n_layer costs time
        raise damaged(folder / CONFIG_FILE, f"{config.layers:,} layers, but the files have {len(where)} tensors")
    return where


def _theirs(name: str, x: np.ndarray, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yield views of tensor x under their names, in their layout: layer matrices are (in, out)."""
    for theirs, view in by_name(NAMES, name, x, config.vocab_size):
        yield theirs, view.T if x.ndim == 3 else view


def _write_json(path: Path, about: dict[str, Any]) -> None:
    text = json.dumps(about, indent=2) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
