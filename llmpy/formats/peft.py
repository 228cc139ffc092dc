"""Adapters in the files of the library peft: adapter_config.json and adapter_model.safetensors.

An adapter is opened on its base model. A merged model is base + scale·B·A. GPT-2's layers are "Conv1D", with weights
(in, out), which peft calls `fan_in_fan_out`; A and B have the same shapes for both.
Source: peft 0.21, `tuners/lora/config.py` and `utils/save_and_load.py`.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data import pretrained
from ..errors import LlmpyError
from ..model.arena import Arena
from ..model.config import ModelConfig
from ..model.families import modules, trained_table
from ..model.lora import A, B, LoraConfig, chosen
from ..run.checkpoint import check_finite, damaged, opened
from .source import Source, read_json, write_json, write_tensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = {"gpt2": "base_model.model.transformer.h.{}.", "llama": "base_model.model.model.layers.{}."}
ALL = "all-linear"
# Required values of an adapter, the first one the default. A field that is not listed must be empty.
FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "task_type": (None, "CAUSAL_LM"), "bias": ("none",), "fan_in_fan_out": (False, True),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),  # others change the base model
}  # fmt: skip
READ = {
    "base_model_name_or_path", "r", "lora_alpha", "target_modules", "use_rslora", "lora_dropout", "inference_mode",
    "auto_mapping", "peft_version", "revision", "megatron_core", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
HASHED_ROWS = 64  # of the embedding


def base_hash(source: Source) -> str:
    """Return a hash of a base model's shape, vectors and first rows of the embedding, which is read whole."""
    config = replace(source.config, lora=None)
    found = hashlib.sha256(repr(config).encode())
    for t in trained_table(config):
        if t.name == "wte" or not t.decay:
            rows = source.read(t.name)[: HASHED_ROWS if t.name == "wte" else None]
            found.update(f"{t.name} {t.shape}".encode() + np.ascontiguousarray(rows, np.float32).tobytes())
    return found.hexdigest()[:16]


def on_base(source: Source, base: Source) -> Source:
    """Return an adapter's source with the parameters of its base model. Raises LlmpyError if they do not fit."""
    lora = source.config.lora
    assert lora is not None
    fits = replace(source.config, lora=None) == base.config and lora.base_hash in ("", base_hash(base))
    if not fits or base.config.lora is not None:
        what = f"{source.path} is an adapter of another model than {base.path}"
        raise LlmpyError(
            "lora.other-base",
            what,
            "Restore the model that it was trained on. Resumed runs keep older ones in checkpoints/",
        )
    tokenizer, what = source.tokenizer or base.tokenizer, f"adapter of {base.path}"
    return replace(source, read=base.read, load=base.fill, dtype=base.dtype, tokenizer=tokenizer, what=what)


def read_adapter(folder: Path, open_base: Callable[[str], Source]) -> Source:
    """Open peft's folder on its base model. Raises LlmpyError for another kind of adapter or corrupt files."""
    path = folder / CONFIG_FILE
    about = read_json(path)
    for key, value in about.items():
        if value not in FIXED[key] if key in FIXED else key not in READ and value:
            what = f"{path}: {key} is {value!r}, which is not supported"
            raise LlmpyError("lora.unsupported", what, "Use a plain LoRA adapter of linear layers")
    name, rank, alpha = (about.get(key) for key in ("base_model_name_or_path", "r", "lora_alpha"))
    number = type(alpha) in (int, float) and math.isfinite(alpha)
    if not isinstance(name, str) or type(rank) is not int or rank < 1 or not number:
        raise damaged(path, "it needs base_model_name_or_path, r and lora_alpha")
    there = next((p for p in (Path(name), folder / name) if p.exists()), None)  # may be relative to the adapter
    called = name if there is None else os.path.abspath(there)  # else on the hub
    base = open_base(called)
    names = chosen_by(path, about.get("target_modules"), base.config)
    lora = LoraConfig(rank, float(alpha), names, called, stabilized=about.get("use_rslora") is True)
    config, weights = replace(base.config, lora=lora), folder / WEIGHTS_FILE
    table = trained_table(config)
    shapes = {k: x.shape for t in table for k, x in named(t.name, np.broadcast_to(np.int8(0), t.shape), config)}
    with opened(weights) as file:
        keys = set(file.keys())
        for theirs, shape in shapes.items():
            found = tuple(file.get_slice(theirs).get_shape()) if theirs in keys else None
            if found != shape:
                raise damaged(weights, f"{theirs} is {found}, {CONFIG_FILE} and the base model require {shape}")
        if extra := sorted(keys - shapes.keys()):
            what = f"{weights} has {extra[0]}, which is no adapter of its target modules"
            raise LlmpyError("lora.unsupported", what, "Use a plain LoRA adapter of linear layers")

    def load(params: Arena) -> None:
        with opened(weights) as file:
            for tensor, stack in params.items():
                for theirs, x in named(tensor.name, stack, config):
                    check_finite(weights, theirs, found := np.asarray(file.get_tensor(theirs)))
                    x[...] = found

    own = pretrained.find(folder) or base.tokenizer  # peft's users often save theirs, with a chat template
    return on_base(replace(base, path=folder, config=config, adapters=load, tokenizer=own), base)


def chosen_by(path: Path, targets: Any, config: ModelConfig) -> tuple[str, ...]:
    """Return the names of the modules that `target_modules` selects: a list of names, "all-linear", or a pattern."""
    every = modules(config)
    if targets == ALL:
        return chosen(every, ())
    names = [targets] if isinstance(targets, str) else targets
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise damaged(path, f"target_modules is {targets!r}")
    listed = "|".join(rf"(.*\.)?{re.escape(name)}" for name in names)
    try:
        pattern = re.compile(targets if isinstance(targets, str) else listed)
    except re.error:
        raise damaged(path, f"target_modules is {targets!r}") from None
    block = PREFIX[config.family].removeprefix("base_model.model.")
    found = [{m.name for m in every if pattern.fullmatch(block.format(l) + m.name)} for l in range(config.layers)]
    if not found[0] or any(names != found[0] for names in found):
        what = f"{path}: target_modules selects nothing, or other modules in some layers"
        raise LlmpyError("lora.unsupported", what, "Use an adapter of the same modules in all layers")
    return tuple(m.name for m in every if m.name in found[0])


def write_adapter(folder: Path, source: Source) -> None:
    """Write peft's folder of an adapter, in float32."""
    lora, config = source.config.lora, source.config
    assert lora is not None and source.adapters is not None
    params = Arena(trained_table(config), np.empty, np.float32)
    source.adapters(params)
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        **{key: values[0] for key, values in FIXED.items()},
        "task_type": "CAUSAL_LM", "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0,
        "use_rslora": lora.stabilized, "target_modules": sorted(lora.modules), "inference_mode": True,
        "fan_in_fan_out": config.family == "gpt2", "base_model_name_or_path": lora.base, "init_lora_weights": True,
    }  # fmt: skip
    write_json(folder / CONFIG_FILE, about)
    write_tensors(folder / WEIGHTS_FILE, {k: x for t, stack in params.items() for k, x in named(t.name, stack, config)})


def merged(source: Source) -> Source:
    """Return the model base + scale·B·A of an adapter's source."""
    lora, config = source.config.lora, source.config
    assert lora is not None and source.adapters is not None
    params = Arena(trained_table(config), np.empty, np.float32)
    source.adapters(params)

    def read(name: str) -> np.ndarray:
        x = source.read(name)
        adapted = [m for m in modules(config) if m.name in lora.modules and f"{m.layer}_w" == name]
        if not adapted:
            return x
        out = np.asarray(x, np.float32)
        for m in adapted:
            a, b = getattr(params, f"{m.name}.{A}"), getattr(params, f"{m.name}.{B}")
            out[:, m.start : m.start + m.size] += np.float32(lora.scale) * (b @ a)
        return out  # float32: rounded once, when it is written

    return replace(source, config=replace(config, lora=None), read=read, load=None, adapters=None)


def named(name: str, stack: np.ndarray, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yield peft's names of an adapter's matrix (L, …), and its layers."""
    yield from ((f"{PREFIX[config.family].format(l)}{name}.weight", x) for l, x in enumerate(stack))
