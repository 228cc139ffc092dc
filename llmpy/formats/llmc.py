"""llm.c's model files (`gpt2_124M.bin`, `model_00010000.bin`) and its debug state, little-endian.

model   256 int32: 20240326, version, context, V, L, NH, C, Vp, 0 …;  then the 16 tensors of ORDER, dense
        version 3 float32, 5 bfloat16
debug   256 int32: 20240327, 2, B, T, 0 …;  tokens, targets int32 (B, T);  logits (B, T, V);  the mean loss;
        the gradients of the 16 tensors: all float32, of one batch by PyTorch

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
from .source import DTYPES, Source, cast, padded, shapes, tokenizer_beside

HEADER = np.dtype(("<i4", 256))
# llm.c's order of our tensors; the shapes are the same.
ORDER = (
    "wte", "wpe", "ln_1_w", "ln_1_b", "attn_qkv_w", "attn_qkv_b", "attn_proj_w", "attn_proj_b", "ln_2_w", "ln_2_b",
    "mlp_fc_w", "mlp_fc_b", "mlp_proj_w", "mlp_proj_b", "ln_f_w", "ln_f_b",
)  # fmt: skip
VERSIONS = {3: "float32", 5: "bfloat16"}


class Place(NamedTuple):
    """Where a tensor lies in a file."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def read_model(path: Path) -> Source:
    """Open a model of version 3 or 5. Raises LlmpyError for any other file, or one that is cut or too long."""
    header, size = read_header(path, MODEL, "a model of llm.c")
    version, context, V, L, NH, C, Vp = (int(x) for x in header[1:8])
    if version not in VERSIONS:
        raise LlmpyError(
            "formats.x", f"{path} is of version {version}", "Write it as version 3 or 5, which llm.c itself reads"
        )
    try:
        config = ModelConfig(L, NH, C, context, V)
    except LlmpyError as error:
        raise damaged(path, str(error)) from error
    if Vp != config.padded_vocab_size:
        raise damaged(path, f"a vocabulary of {V:,} tokens padded to {Vp:,}")
    makes = f"{L} layers of {C} channels and {Vp:,} rows of wte make"
    places = layout(config, VERSIONS[version], HEADER.itemsize, path, size, makes)
    read = padded(lambda name: read_at(path, places[name]), config)
    what = f"model of llm.c, version {version}"
    return Source(path, what, config, VERSIONS[version], context, read, tokenizer_beside(path, V))


def write_model(path: Path, source: Source, dtype: str) -> None:
    """Write version 3 (`dtype` float32) or 5 (bfloat16), whole or not at all. Raises LlmpyError if the disk refuses."""
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
    """One batch and what PyTorch made of it."""

    tokens: np.ndarray  # int32 (B, T)
    targets: np.ndarray
    logits: np.ndarray  # float32 (B, T, V)
    loss: float  # mean
    gradient: Callable[[str], np.ndarray]  # of a tensor by name, float32 in the table's shape


def read_debug(path: Path, config: ModelConfig) -> DebugState:
    """The debug state of a model of this shape. Raises LlmpyError if it is not that, or damaged."""
    header, size = read_header(path, DEBUG, "a debug state of llm.c")
    version, B, T = (int(x) for x in header[1:4])
    if version != 2 or B < 1 or not 1 <= T <= config.context:
        raise damaged(path, f"version {version}, not 2, or batches of {B} x {T}")
    V = config.vocab_size
    tokens = Place(HEADER.itemsize, (2, B, T), np.dtype("<i4"))
    logits = Place(tokens.end, (B, T, V), DTYPES["float32"])
    loss = Place(logits.end, (1,), DTYPES["float32"])
    gradients = layout(config, "float32", loss.end, path, size, f"for this model a batch of {B} x {T} makes")
    x = read_at(path, tokens)
    if x.min() < 0 or x.max() >= V:
        raise damaged(path, f"its tokens are not all in the vocabulary of {V:,}")
    value = float(read_at(path, loss)[0])
    return DebugState(x[0], x[1], read_at(path, logits), value, lambda name: read_at(path, gradients[name]))


def read_header(path: Path, magic: int, what: str) -> tuple[np.ndarray, int]:
    """The 256 int32 of a file that must begin with `magic`, and the file's size in bytes."""
    try:
        with path.open("rb") as file:
            start = file.read(HEADER.itemsize)
            size = file.seek(0, 2)
    except OSError as error:
        raise unreadable(path, error) from error
    if magic_of(start) != magic:
        raise LlmpyError(
            "formats.x", f"{path} is not {what}: it begins with {start[:8].hex(' ') or 'nothing'}", "Check the path"
        )
    if size < HEADER.itemsize:
        raise damaged(path, f"it ends inside its header, after {size:,} bytes")
    return np.frombuffer(start, "<i4"), size


def read_at(path: Path, place: Place) -> np.ndarray:
    """A new array with what lies there. Raises LlmpyError if the file is shorter now."""
    try:
        return np.fromfile(path, place.dtype, math.prod(place.shape), offset=place.offset).reshape(place.shape)
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise damaged(path, "it became shorter while it was read") from error


def wrong_size(path: Path, size: int, expected: int, why: str) -> LlmpyError:
    """What to raise for a file that is shorter or longer than its header says."""
    what = "is cut off" if size < expected else "is longer than it says"
    return LlmpyError(
        "formats.x", f"{path} {what}: {why} {expected:,} bytes, it has {size:,}", "Download or write it again"
    )


def layout(config: ModelConfig, dtype: str, start: int, path: Path, size: int, why: str) -> dict[str, Place]:
    """Return where each tensor lies in a file. Raises LlmpyError, which says `why`, if it does not end there."""
    ours, places = shapes(config), dict[str, Place]()
    for name in ORDER:
        places[name] = place = Place(start, ours[name], DTYPES[dtype])
        start = place.end
    if size != start:
        raise wrong_size(path, size, start, why)
    return places
