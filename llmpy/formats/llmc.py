"""llm.c's model files (`gpt2_124M.bin`, `model_00010000.bin`) and its debug state, little-endian.

model   256 int32: 20240326, version, context, V, L, NH, C, Vp, 0 …;  then the 16 tensors of ORDER, dense
        version 3 float32, 5 bfloat16; 4 bfloat16 but LayerNorm's float32; 1 and 2 are 3 and 4 with V rows, not Vp
debug   256 int32: 20240327, 2, B, T, 0 …;  tokens, targets int32 (B, T);  logits (B, T, V);  the mean loss;
        the gradients of the 16 tensors: all float32, of one batch by PyTorch

Source: llm.c, `train_gpt2.py` and `train_gpt2.cu`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data.magic import DEBUG, MODEL
from ..errors import LlmpyError, unreadable
from ..model.config import ModelConfig
from ..system.durable import write_whole
from .source import DTYPES, Source, cast, damaged, padded, shapes, tokenizer_beside

HEADER = np.dtype(("<i4", 256))
# llm.c's order of our tensors; the shapes are the same.
ORDER = (
    "wte", "wpe", "ln_1_w", "ln_1_b", "attn_qkv_w", "attn_qkv_b", "attn_proj_w", "attn_proj_b", "ln_2_w", "ln_2_b",
    "mlp_fc_w", "mlp_fc_b", "mlp_proj_w", "mlp_proj_b", "ln_f_w", "ln_f_b",
)  # fmt: skip
NARROW = {1: "float32", 2: "bfloat16", 3: "float32", 4: "bfloat16", 5: "bfloat16"}  # version → dtype
UNPADDED = (1, 2)
WIDE_NORMS = (2, 4)
WRITTEN = {"float32": 3, "bfloat16": 5}


class Place(NamedTuple):
    """Where a tensor lies in a file."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def read_model(path: Path) -> Source:
    """Open a model of version 1 … 5. Raises LlmpyError for any other file, or one that is cut or too long."""
    header, size = read_header(path, MODEL, "a model of llm.c")
    version, context, V, L, NH, C, Vp = (int(x) for x in header[1:8])
    if version not in NARROW:
        raise LlmpyError(
            f"{path} is a model of llm.c of version {version}", "versions 1 to 5 are known: write it as 3 or 5"
        )
    rows = V if version in UNPADDED else Vp
    try:
        config = ModelConfig(L, NH, C, context, V)
    except LlmpyError as fault:
        raise damaged(path, str(fault)) from fault
    if rows < V:
        raise damaged(path, f"a vocabulary of {V:,} tokens padded to {rows:,}")
    places = layout(config, rows, version)
    end = places[ORDER[-1]].end
    if size != end:
        raise wrong_size(path, size, end, f"{L} layers of {C} channels and {rows:,} rows of wte make")

    def read(name: str) -> np.ndarray:
        x = read_at(path, places[name])
        return padded(x, config) if name == "wte" else x

    return Source(
        path, f"model of llm.c, version {version}", config, NARROW[version], context, read, tokenizer_beside(path, V)
    )


def write_model(path: Path, source: Source, dtype: str) -> None:
    """Write version 3 (`dtype` float32) or 5 (bfloat16), whole or not at all. Raises LlmpyError if the disk refuses."""
    c = source.config
    header = np.zeros(256, "<i4")
    header[:8] = (
        MODEL, WRITTEN[dtype], c.context, c.vocab_size, c.layers, c.heads, c.channels, c.padded_vocab_size
    )  # fmt: skip

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(header.tobytes())
            for name in ORDER:
                cast(source.read(name), dtype, name).tofile(file)

    write_whole(path, write)


@dataclass(frozen=True)
class DebugState:
    """One batch and what PyTorch made of it: tokens, targets int32 (B, T), logits float32 (B, T, V), the mean loss,
    and `gradient(name)`, float32 in the table's shape.
    """

    tokens: np.ndarray
    targets: np.ndarray
    logits: np.ndarray
    loss: float
    gradient: Callable[[str], np.ndarray]


def read_debug(path: Path, config: ModelConfig) -> DebugState:
    """The debug state of a model of this shape. Raises LlmpyError if it is not that, or damaged."""
    header, size = read_header(path, DEBUG, "a debug state of llm.c")
    version, B, T = (int(x) for x in header[1:4])
    if version != 2:
        raise LlmpyError(f"{path} is a debug state of version {version}, not 2", "write it with a current llm.c")
    if B < 1 or not 1 <= T <= config.context:
        raise damaged(path, f"batches of {B} x {T}")
    integer, single = np.dtype("<i4"), DTYPES["float32"]
    V, Vp = config.vocab_size, config.padded_vocab_size
    tokens = Place(HEADER.itemsize, (B, T), integer)
    targets = Place(tokens.end, (B, T), integer)
    logits = Place(targets.end, (B, T, V), single)
    loss = Place(logits.end, (1,), single)
    gradients = layout(config, Vp, 3, start=loss.end)
    end = gradients[ORDER[-1]].end
    if size != end:
        raise wrong_size(path, size, end, f"for this model a batch of {B} x {T} makes")
    x, y = read_at(path, tokens), read_at(path, targets)
    if min(x.min(), y.min()) < 0 or max(x.max(), y.max()) >= V:
        raise damaged(path, f"its tokens are not all in the vocabulary of {V:,}")
    value = float(read_at(path, loss)[0])
    return DebugState(x, y, read_at(path, logits), value, lambda name: read_at(path, gradients[name]))


def read_header(path: Path, magic: int, what: str) -> tuple[np.ndarray, int]:
    """The 256 int32 of a file that must begin with `magic`, and the file's size in bytes."""
    try:
        with path.open("rb") as file:
            start = file.read(HEADER.itemsize)
            size = file.seek(0, 2)
    except OSError as fault:
        raise unreadable(path, fault) from fault
    header = np.frombuffer(start[: len(start) // 4 * 4], "<i4")
    if not header.size or header[0] != magic:
        raise LlmpyError(f"{path} is not {what}: it begins with {start[:8].hex(' ') or 'nothing'}", "check the path")
    if header.size < 256:
        raise damaged(path, f"it ends inside its header, after {size:,} bytes")
    return header, size


def read_at(path: Path, place: Place) -> np.ndarray:
    """A new array with what lies there. Raises LlmpyError if the file is shorter now."""
    count = math.prod(place.shape)
    try:
        found = np.fromfile(path, place.dtype, count, offset=place.offset)
    except OSError as fault:
        raise unreadable(path, fault) from fault
    if found.size != count:
        raise damaged(path, "it became shorter while it was read")
    return found.reshape(place.shape)


def wrong_size(path: Path, size: int, expected: int, why: str) -> LlmpyError:
    """What to raise for a file that is shorter or longer than its header says."""
    what = "is cut off" if size < expected else "is longer than it says"
    return LlmpyError(f"{path} {what}: {why} {expected:,} bytes, it has {size:,}", "download or write it again")


def layout(config: ModelConfig, rows: int, version: int, start: int = HEADER.itemsize) -> dict[str, Place]:
    """Where each tensor lies in a file whose wte has `rows` rows."""
    ours = shapes(config) | {"wte": (rows, config.channels)}
    places: dict[str, Place] = {}
    for name in ORDER:
        wide = version in WIDE_NORMS and name.startswith("ln_")
        places[name] = place = Place(start, ours[name], DTYPES["float32" if wide else NARROW[version]])
        start = place.end
    return places
