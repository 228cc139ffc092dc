"""A model on disk: `model.safetensors`, a tensor for each row of the table of parameters, under the same name.

The library lays them out in an order of its own; they are found by name. The metadata carry the model's shape
and the sequence length it was trained at, so the file needs no companion.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .arena import Arena
from .config import ModelConfig
from .durable import write_whole
from .errors import LlmpyError
from .gpt2 import GPT2, PARAMS

KEY, FORMAT = "llmpy", 1  # of the metadata
HEADER_AT_MOST = 1 << 22  # bytes; of GPT-2 XL by Hugging Face 70,000


@dataclass(frozen=True)
class Header:
    """What a model file says of itself. `trained_length` is the T beyond which positions are untrained."""

    config: ModelConfig
    trained_length: int


def save(path: Path, model: GPT2, trained_length: int) -> None:
    """Write the parameters to `path`. Raises LlmpyError if that fails; what was there stays."""
    write_model(path, model.config, trained_length, model.ops.to_host(model.params.buffer))


def write_model(path: Path, config: ModelConfig, trained_length: int, params: np.ndarray) -> None:
    """`save` for parameters that are in no model: flat, in the order of the table."""
    views = Arena(PARAMS(config), lambda *_: params, params.dtype)
    tensors = {t.name: np.asarray(x, np.float32) for t, x in views.items()}
    # One entry, because the library writes several in a random order: equal models make equal files.
    about = {"format": FORMAT, "config": asdict(config), "trained_length": trained_length}
    metadata = {KEY: json.dumps(about)}

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as fault:  # how the library reports a full disk
            raise OSError(str(fault)) from fault

    write_whole(path, write)


def read_header(path: Path) -> Header:
    """The header of a model file, checked against the table: names, shapes, float32.

    Raises LlmpyError for a file that is missing, damaged or not ours.
    """
    with opened(path) as file:
        metadata = file.metadata() or {}
        if KEY not in metadata:
            raise LlmpyError(f"{path} is not a model of llmpy", "train one with: llmpy train")
        try:
            about = json.loads(metadata[KEY])
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']}, this program reads {FORMAT}")
            header = Header(ModelConfig(**about["config"]), int(about["trained_length"]))
        except (KeyError, TypeError, ValueError, RecursionError, LlmpyError) as fault:
            raise _damaged(path, f"its header cannot be read: {fault}") from fault
        if not 1 <= header.trained_length <= header.config.context:
            raise _damaged(path, f"trained length {header.trained_length}")
        expected = {t.name: t.shape for t in PARAMS(header.config)}
        if set(file.keys()) != set(expected):
            raise _damaged(path, f"tensors {sorted(set(file.keys()) ^ set(expected))} are missing or unknown")
        for name, shape in expected.items():
            found = file.get_slice(name)
            if tuple(found.get_shape()) != shape or found.get_dtype() != "F32":
                is_there = f"{found.get_dtype()} {tuple(found.get_shape())}"
                raise _damaged(path, f"{name} is {is_there}, expected F32 {shape}")
        return header


def load_parameters(path: Path, params: Arena) -> None:
    """Copy the file's tensors into `params`, one at a time. `read_header` must have accepted the file."""
    with opened(path) as file:
        for tensor, view in params.items():
            view[...] = file.get_tensor(tensor.name)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An open safetensors file; whatever the library finds wrong becomes a LlmpyError."""
    try:
        _check_header(path)
        with safe_open(path, framework="numpy") as file:
            yield file
    except FileNotFoundError:
        raise LlmpyError(f"no model at {path}", "train one with: llmpy train") from None
    except (OSError, SafetensorError) as fault:
        raise _damaged(path, str(fault)) from fault


def _check_header(path: Path) -> None:
    """Raise LlmpyError for a header that the library would spend more memory on than a model's is worth."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > HEADER_AT_MOST:
        raise _damaged(path, f"a header of {length:,} bytes")


def _damaged(path: Path, why: str) -> LlmpyError:
    return LlmpyError(f"{path} is damaged or no model: {why}", "train again, or restore the file")
