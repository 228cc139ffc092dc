"""Hugging Face's GPT-2 folders: config.json, model.safetensors (or shards with an index), tokenizer.json.

Its linear layers are "Conv1D": their weights are (in, out), the transpose of ours. The head is tied to wte; files
that repeat it as lm_head.weight must repeat it exactly. wte has the V rows of the vocabulary, without padding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ..errors import LlmpyError
from ..model.config import ModelConfig
from ..run.checkpoint import opened
from ..run.folder import MODEL_FILE, TOKENIZER_FILE
from ..system.durable import write_whole
from ..version import __version__
from .source import DTYPES, Source, cast, copy_tokenizer, damaged, padded, read_json, shapes

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", MODEL_FILE, f"{MODEL_FILE}.index.json"
# ours → theirs, and whether it is transposed; {} is the layer
NAMES = {
    "wte": ("wte.weight", False),
    "wpe": ("wpe.weight", False),
    "attn_qkv_w": ("h.{}.attn.c_attn.weight", True),
    "attn_proj_w": ("h.{}.attn.c_proj.weight", True),
    "mlp_fc_w": ("h.{}.mlp.c_fc.weight", True),
    "mlp_proj_w": ("h.{}.mlp.c_proj.weight", True),
    "ln_1_w": ("h.{}.ln_1.weight", False),
    "ln_1_b": ("h.{}.ln_1.bias", False),
    "attn_qkv_b": ("h.{}.attn.c_attn.bias", False),
    "attn_proj_b": ("h.{}.attn.c_proj.bias", False),
    "ln_2_w": ("h.{}.ln_2.weight", False),
    "ln_2_b": ("h.{}.ln_2.bias", False),
    "mlp_fc_b": ("h.{}.mlp.c_fc.bias", False),
    "mlp_proj_b": ("h.{}.mlp.c_proj.bias", False),
    "ln_f_w": ("ln_f.weight", False),
    "ln_f_b": ("ln_f.bias", False),
}
PREFIX = "transformer."  # of a model with a head; OpenAI's own upload has none
HEAD = "lm_head.weight"
BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks, which old files carry along
TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# What our GPT-2 is; a file that says otherwise is another model. Left out, each has this value.
TRAINED = "llmpy_trained_length"  # positions beyond are untrained; other programs pass it over
FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
}
JSON_AT_MOST = 1 << 22  # bytes of config.json and of an index: GPT-2 XL's has 50,000


def read_model(folder: Path, weights: str = WEIGHTS_FILE) -> Source:
    """Open a GPT-2 folder, checking every tensor's name, shape and type; `weights` is the file that has them.

    Raises LlmpyError for another kind of model, and for files that are missing or damaged.
    """
    config, trained_length = _read_config(folder / CONFIG_FILE)
    where = _find_tensors(folder, weights, config)
    prefix = PREFIX if PREFIX + NAMES["wte"][0] in where else ""
    expected = dict(_theirs(config, prefix))
    missing = sorted(expected.keys() - where.keys())
    unknown = sorted(n for n in where.keys() - expected.keys() if n != HEAD and not n.endswith(BUFFERS))
    if missing or unknown:
        which = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which GPT-2 has not"
        raise LlmpyError(f"{folder} {which}", "give a GPT-2 model with its head tied to the embedding")
    types = set()
    for name, shape in expected.items():
        found, kind = where[name][1:]
        if found != shape or kind not in TYPES:
            raise damaged(where[name][0], f"{name} is {kind} {found}, expected {shape} by {CONFIG_FILE}")
        types.add(kind)
    dtype = TYPES[types.pop()] if len(types) == 1 else "float32"

    def tensor(name: str) -> np.ndarray:
        with opened(where[name][0]) as file:
            found: np.ndarray = file.get_tensor(name)
        if found.shape != where[name][1]:
            raise damaged(where[name][0], f"{name} changed while it was read")
        return found

    def read(name: str) -> np.ndarray:
        theirs, transposed = NAMES[name]
        theirs = prefix + theirs
        if name == "wte":
            return padded(cast(tensor(theirs), dtype, name), config)
        if "{}" not in theirs:
            return cast(tensor(theirs), dtype, name)
        out = np.empty(shapes(config)[name], DTYPES[dtype])
        for l, layer in enumerate(out):
            x = tensor(theirs.format(l))
            layer[...] = x.T if transposed else x
        return out

    wte = prefix + NAMES["wte"][0]
    if HEAD in where and (where[HEAD][1:] != where[wte][1:] or not np.array_equal(tensor(HEAD), tensor(wte))):
        raise LlmpyError(f"{folder} has a head of its own ({HEAD} is not wte)", "only tied heads are known here")
    tokenizer = folder / TOKENIZER_FILE
    what = "GPT-2 of Hugging Face"
    return Source(folder, what, config, dtype, trained_length, read, tokenizer if tokenizer.is_file() else None)


def write_model(folder: Path, source: Source, dtype: str) -> None:
    """Write a folder that `transformers` loads as GPT2LMHeadModel; the weights come last.

    Raises LlmpyError if the disk refuses.
    """
    c = source.config
    tensors: dict[str, np.ndarray] = {}
    for name, (theirs, transposed) in NAMES.items():
        x = cast(source.read(name), dtype, name)
        if name == "wte":
            tensors[PREFIX + theirs] = x[: c.vocab_size]
        elif "{}" not in theirs:
            tensors[PREFIX + theirs] = x
        else:
            for l, layer in enumerate(x):
                tensors[PREFIX + theirs.format(l)] = np.ascontiguousarray(layer.T if transposed else layer)
    folder.mkdir(parents=True, exist_ok=True)
    eot = c.vocab_size - 1  # where GPT-2 has it
    if source.tokenizer is not None:
        tokenizer = copy_tokenizer(source.tokenizer, folder / TOKENIZER_FILE)
        eot = tokenizer.eot
        about = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": tokenizer.eot_text,
            "bos_token": tokenizer.eot_text,
        }
        _write_json(folder / "tokenizer_config.json", about | {"model_max_length": c.context})
    _write_json(
        folder / CONFIG_FILE,
        {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_layer": c.layers,
            "n_head": c.heads,
            "n_embd": c.channels,
            "n_positions": c.context,
            "n_ctx": c.context,
            "vocab_size": c.vocab_size,
            **{key: values[0] for key, values in FIXED.items()},
            "bos_token_id": eot,
            "eos_token_id": eot,
            "dtype": dtype,
            "llmpy_version": __version__,
            TRAINED: source.trained_length,
        },
    )

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, {"format": "pt"})  # as transformers writes and wants it
        except SafetensorError as fault:  # how the library reports a full disk
            raise OSError(str(fault)) from fault
        temporary.chmod((folder / CONFIG_FILE).stat().st_mode)  # the library makes files that only their owner may read

    write_whole(folder / WEIGHTS_FILE, write)


def _read_config(path: Path) -> tuple[ModelConfig, int]:
    """The shape that a config.json says, if it is our GPT-2, and the length that it was trained at."""
    about = read_json(path, JSON_AT_MOST)
    if about.get("model_type") != "gpt2":
        raise LlmpyError(f"{path} is of a model {about.get('model_type')!r}, not of gpt2", "give a GPT-2 model")
    context = about.get("n_positions", about.get("n_ctx"))
    shape = [about.get(k) for k in ("n_layer", "n_head", "n_embd")] + [context, about.get("vocab_size")]
    if not all(type(x) is int and 0 < x < 1 << 31 for x in shape):
        raise damaged(path, "n_layer, n_head, n_embd, n_positions and vocab_size are not five whole numbers")
    layers, heads, channels, context, vocab_size = shape
    for key, values in FIXED.items():
        if about.get(key, values[0]) not in values:
            raise LlmpyError(f"{path}: {key} is {about[key]!r}, and this GPT-2 has {values[0]!r}", "give another model")
    if about.get("n_inner") not in (None, 4 * channels):
        raise LlmpyError(f"{path}: n_inner is {about['n_inner']!r}, and GPT-2 has 4 * n_embd", "give another model")
    try:
        trained = about.get(TRAINED)
        known = type(trained) is int and 0 < trained <= context
        return ModelConfig(layers, heads, channels, context, vocab_size), trained if known else context
    except LlmpyError as fault:
        raise damaged(path, str(fault)) from fault


def _find_tensors(folder: Path, weights: str, config: ModelConfig) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """Name → the file that has it, its shape and type; of all files of the model."""
    files = [weights]
    weight_map: Any = None
    if not (folder / weights).is_file() and (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE, JSON_AT_MOST).get("weight_map")
        named = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not named or not all(isinstance(f, str) and Path(f).name == f for f in named):
            raise damaged(folder / INDEX_FILE, "its weight_map does not name files beside it")
        files = sorted(set(named))
    elif not (folder / weights).is_file():
        raise LlmpyError(f"{folder} has no {weights}", "save the model as safetensors (save_pretrained does)")
    where: dict[str, tuple[Path, tuple[int, ...], str]] = {}
    for path in (folder / name for name in files):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118, no dict
                if weight_map is None or weight_map.get(name) == path.name:
                    found = file.get_slice(name)
                    where[name] = path, tuple(found.get_shape()), found.get_dtype()
    if weight_map is not None and (lost := sorted(weight_map.keys() - where.keys())):
        raise damaged(folder / INDEX_FILE, f"{lost[0]} is not in {weight_map[lost[0]]}")
    if len(where) < config.layers:  # before a lying n_layer is counted up to
        raise damaged(folder / CONFIG_FILE, f"{config.layers:,} layers, but the files have {len(where)} tensors")
    return where


def _theirs(config: ModelConfig, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor by their name, with the shape it must have."""
    for name, shape in shapes(config).items():
        theirs, transposed = NAMES[name]
        if name == "wte":
            yield prefix + theirs, (config.vocab_size, config.channels)
        elif "{}" not in theirs:
            yield prefix + theirs, shape
        else:
            one = shape[:0:-1] if transposed else shape[1:]
            yield from ((prefix + theirs.format(l), one) for l in range(config.layers))


def _write_json(path: Path, about: dict[str, Any]) -> None:
    text = json.dumps(about, indent=2) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
