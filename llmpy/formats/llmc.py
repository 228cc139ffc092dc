"""llm.c's model files (`gpt2_124M.bin`, `model_00010000.bin`) and debug states, little-endian.

model   256 int32: 20240326, version, context, V, L, NH, C, Vp, 0 …;  then the 16 tensors of ORDER, dense
        version 3 float32, 5 bfloat16
debug   256 int32: 20240327, 2, B, T, 0 …;  tokens, targets int32 (B, T);  logits (B, T, V);  the mean loss;
        gradients of the 16 tensors: all float32, one batch, by PyTorch

Source: llm.c, `train_gpt2.py` and `train_gpt2.cu`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data.magic import DEBUG, MODEL, magic_of
from ..errors import LlmpyError, unreadable
from ..model.config import ModelConfig
from ..run.checkpoint import damaged
from ..system.durable import write_whole
from .source import DTYPES, Source, cast, find_tokenizer, padded, shapes

HEADER = np.dtype(("<i4", 256))
# llm.c's order of the tensors; the shapes are ours.
ORDER = (
    "wte", "wpe", "ln_1_w", "ln_1_b", "attn_qkv_w", "attn_qkv_b", "attn_proj_w", "attn_proj_b", "ln_2_w", "ln_2_b",
    "mlp_fc_w", "mlp_fc_b", "mlp_proj_w", "mlp_proj_b", "ln_f_w", "ln_f_b",
)  # fmt: skip
VERSIONS = {3: "float32", 5: "bfloat16"}


class Place(NamedTuple):
    """The position of a tensor in a file."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def read_model(path: Path) -> Source:
    """Open a model of version 3 or 5. Raises LlmpyError for any other file or a wrong size."""
    header, size = read_header(path, MODEL, "an llm.c model")
    version, context, V, L, NH, C, Vp = (int(x) for x in header[1:8])
    if version not in VERSIONS:
        raise LlmpyError("model.unsupported-version", f"{path} has version {version}", "Write it as version 3 or 5")
    try:
        config = ModelConfig(L, NH, C, context, V)
    except LlmpyError as error:
        raise damaged(path, str(error)) from error
    if Vp != config.padded_vocab_size:
        raise damaged(path, f"its vocabulary of {V:,} tokens is padded to {Vp:,}")
    makes = f"{L} layers, {C} channels and {Vp:,} rows of wte"
    places = layout(config, VERSIONS[version], HEADER.itemsize, path, size, makes)
    read = padded(lambda name: read_at(path, places[name]), config)
    what = f"model of llm.c, version {version}"
    return Source(path, what, config, VERSIONS[version], context, read, find_tokenizer(path, V))


def write_model(path: Path, source: Source, dtype: str) -> None:
    """Write version 3 (`dtype` float32) or 5 (bfloat16), atomically. Raises LlmpyError if the write fails."""
    c = source.config
    header = np.zeros(256, "<i4")
    version = next(version for version, written in VERSIONS.items() if written == dtype)
    header[:8] = MODEL, version, c.context, c.vocab_size, c.layers, c.heads, c.channels, c.padded_vocab_size

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(header.tobytes())
            for name in ORDER:
                cast(source.read(name), dtype, name).tofile(file)

    write_whole(path, write)


class DebugState(NamedTuple):
    """One batch with PyTorch's logits, loss and gradients."""

    tokens: np.ndarray  # int32 (B, T)
    targets: np.ndarray
    logits: np.ndarray  # float32 (B, T, V)
    loss: float  # mean
    gradient: Callable[[str], np.ndarray]  # by tensor name: float32 in the table's shape


def read_debug(path: Path, config: ModelConfig) -> DebugState:
    """Read the debug state of a model of this shape. Raises LlmpyError for another or corrupt file."""
    header, size = read_header(path, DEBUG, "an llm.c debug state")
    version, B, T = (int(x) for x in header[1:4])
    if version != 2 or B < 1 or not 1 <= T <= config.context:
        raise damaged(path, f"version {version} (must be 2), batches of {B} x {T}")
    V = config.vocab_size
    tokens = Place(HEADER.itemsize, (2, B, T), np.dtype("<i4"))
    logits = Place(tokens.end, (B, T, V), DTYPES["float32"])
    loss = Place(logits.end, (1,), DTYPES["float32"])
    gradients = layout(config, "float32", loss.end, path, size, f"this model and a batch of {B} x {T}")
    x = read_at(path, tokens)
    if x.min() < 0 or x.max() >= V:
        raise damaged(path, f"it has tokens outside the vocabulary of {V:,}")
    value = float(read_at(path, loss)[0])
    return DebugState(x[0], x[1], read_at(path, logits), value, lambda name: read_at(path, gradients[name]))


def read_header(path: Path, magic: int, what: str) -> tuple[np.ndarray, int]:
    """Return the 256 int32 of a file that must start with `magic`, and the file size in bytes."""
    try:
        with path.open("rb") as file:
            start = file.read(HEADER.itemsize)
            size = file.seek(0, 2)
    except OSError as error:
        raise unreadable(path, error) from error
    if magic_of(start) != magic:
        found = start[:8].hex(" ") or "nothing"
        raise LlmpyError("file.wrong-type", f"{path} is not {what}: it starts with {found}", "Check the path")
    if size < HEADER.itemsize:
        raise damaged(path, f"its header is cut off after {size:,} bytes")
    return np.frombuffer(start, "<i4"), size


def read_at(path: Path, place: Place) -> np.ndarray:
    """Read an array. Raises LlmpyError if the file has become shorter."""
    try:
        return np.fromfile(path, place.dtype, math.prod(place.shape), offset=place.offset).reshape(place.shape)
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise damaged(path, "it became shorter while being read") from error


def wrong_size(path: Path, size: int, expected: int, why: str) -> LlmpyError:
    """Return the error for a file that is shorter or longer than its header implies."""
    what = f"{path} is {'cut off' if size < expected else 'too long'}: {why} require {expected:,} bytes, not {size:,}"
    return LlmpyError("file.wrong-size", what, "Download or write it again")


def layout(config: ModelConfig, dtype: str, start: int, path: Path, size: int, why: str) -> dict[str, Place]:
    """Return the place of each tensor from `start`. Raises LlmpyError with `why` if `size` does not match."""
    ours, places = shapes(config), dict[str, Place]()
    for name in ORDER:
        places[name] = place = Place(start, ours[name], DTYPES[dtype])
        start = place.end
    if size != start:
        raise wrong_size(path, size, start, why)
    return places
