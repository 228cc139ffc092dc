"""A model in a file of any format: its shape at once, its tensors when asked for.

Readers check everything a header says against the file's size before they allocate anything, and hand tensors
out one at a time under the names of our table, in the type they are stored in. Writers take them the same way,
so that a conversion never holds a second copy of the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..data.rank_tables import LLMC_FILE
from ..data.tokenizer import Tokenizer
from ..errors import LlmpyError, unreadable
from ..model.arena import Arena
from ..model.config import PAD_VOCAB_TO, ModelConfig
from ..model.gpt2 import params_table
from ..run.checkpoint import check_finite, damaged
from ..run.folder import TOKENIZER_FILE

DTYPES = {"float32": np.dtype("<f4"), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype("<f2")}


@dataclass(frozen=True)
class Source:
    """A model that was opened and checked.

    `read(name)` gives a tensor of our table in the table's shape, padding rows 0, in the type that the file has
    it in; it raises LlmpyError if the file was changed since.
    """

    path: Path
    what: str  # what it was recognised as
    config: ModelConfig
    dtype: str  # of its matrices: a key of DTYPES
    trained_length: int  # the T beyond which positions are untrained
    read: Callable[[str], np.ndarray]
    tokenizer: Path | None = None  # a tokenizer.json that belongs to it
    load: Callable[[Arena], None] | None = None  # `fill`, where there is a faster way

    def fill(self, params: Arena) -> None:
        """params := the tensors. Raises LlmpyError for numbers that are not finite."""
        if self.load is not None:
            self.load(params)
            return
        for tensor, view in params.items():
            x = self.read(tensor.name)
            check_finite(self.path, tensor.name, x)
            view[...] = x

    def describe(self) -> str:
        """One line for the user."""
        return f"{self.path}: {self.what}, {self.dtype}, {self.config}"


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of our table."""
    return {t.name: t.shape for t in params_table(config)}


def elements(config: ModelConfig) -> int:
    """Return the number of elements of all tensors of our table."""
    return sum(t.size for t in params_table(config))


def cast(x: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """x in another type, rounded to nearest even. Raises LlmpyError where what is finite becomes infinite."""
    if x.dtype == DTYPES[dtype]:
        return x
    with np.errstate(over="ignore", invalid="ignore"):
        out = x.astype(DTYPES[dtype])
    if DTYPES[dtype].itemsize < x.dtype.itemsize and not np.array_equal(np.isfinite(out), np.isfinite(x)):
        raise LlmpyError("formats.x", f"{name} holds numbers too large for {dtype}", "Use --dtype float32 or bfloat16")
    return out


def by_name(names: Mapping[str, str], name: str, x: np.ndarray, V: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield views of tensor x under the `names` of another program, where {} is the layer; of wte the V rows in use.

    The names are without _w and _b, and theirs without .weight and .bias.
    """
    theirs = names[name.removesuffix("_w").removesuffix("_b")] + (".bias" if name.endswith("_b") else ".weight")
    if "{}" in theirs:
        yield from ((theirs.format(l), layer) for l, layer in enumerate(x))
    else:
        yield theirs, x[:V] if name == "wte" else x


def read_json(path: Path) -> Any:
    """Return the object of a JSON file. Raises LlmpyError if it is missing or not that."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:  # ValueError: also bytes that are not UTF-8, and endless digits
        raise damaged(path, f"it is not JSON ({str(error)[:80]})") from error
    if not isinstance(found, dict):
        raise damaged(path, "it holds no JSON object")
    return found


def tokenizer_named(path: Path) -> Path:
    """Where the tokenizer of a model that is one file lies, others beside it or not: d3.tokenizer.json of d3.bin."""
    return path.with_name(f"{path.name.removesuffix('.bin').removesuffix('.safetensors')}.{TOKENIZER_FILE}")


def tokenizer_beside(path: Path, V: int) -> Path | None:
    """The tokenizer of a model that is one file: that of its name, else the folder's tokenizer.json or llm.c's table.

    The folder's may be another model's: it has V tokens, or is a tokenizer.json of somewhat fewer, as some pad them.
    """
    own, folders, table = tokenizer_named(path), path.with_name(TOKENIZER_FILE), path.with_name(LLMC_FILE)
    if own.is_file():
        return own
    fits = table.is_file() and np.fromfile(table, "<u4", 3)[2:].tolist() == [V]
    missing = -1
    if folders.is_file():
        try:
            missing = V - Tokenizer.load(folders).vocab_size
        except LlmpyError:
            missing = 1  # whoever reads text with it reports what is wrong
    return folders if missing == 0 or (0 < missing < PAD_VOCAB_TO and not fits) else table if fits else None


def padded(read: Callable[[str], np.ndarray], config: ModelConfig) -> Callable[[str], np.ndarray]:
    """Return a `read` that gives the first rows of wte (≥Vp, C), those beyond the vocabulary := 0: (Vp, C)."""

    def fitted(name: str) -> np.ndarray:
        x = read(name)
        if name == "wte":
            x = x[: config.padded_vocab_size]
            x[config.vocab_size :] = 0
        return x

    return fitted
