"""A model in a file of any format: its shape at once, its tensors when asked for.

Readers check everything a header says against the file's size before they allocate anything, and hand tensors
out one at a time under the names of our table, in the type they are stored in. Writers take them the same way,
so that a conversion never holds a second copy of the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
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
from ..run.folder import TOKENIZER_FILE

DTYPES = {
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype("<f2"),
}

Look = Callable[[str, np.ndarray], None]  # is shown a tensor's name and numbers, and may raise


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
    load: Callable[[Arena, Look], None] | None = None  # all tensors at once, where that is faster

    def fill(self, params: Arena) -> None:
        """params := the tensors. Raises LlmpyError for numbers that are not finite: nothing comes of them."""
        if self.load is not None:
            self.load(params, self._look)
            return
        for tensor, view in params.items():
            x = self.read(tensor.name)
            self._look(tensor.name, x)
            view[...] = x

    def _look(self, name: str, x: np.ndarray) -> None:
        if not np.isfinite(x).all():
            raise LlmpyError(
                f"{self.path}: {name} holds numbers that are not finite",
                "the model was damaged or its training went wrong: use another file",
            )

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
    """x in another type, rounded to nearest even; the same array if it has that type.

    Raises LlmpyError where a finite number becomes infinite: float16 ends at 65504.
    """
    if x.dtype == DTYPES[dtype]:
        return x
    with np.errstate(over="ignore", invalid="ignore"):
        out = x.astype(DTYPES[dtype])
    if DTYPES[dtype].itemsize < x.dtype.itemsize and not np.array_equal(np.isfinite(out), np.isfinite(x)):
        raise LlmpyError(f"{name} holds numbers too large for {dtype}", "use --dtype float32 or bfloat16")
    return out


def read_json(path: Path, at_most: int) -> Any:
    """The object of a JSON file. Raises LlmpyError if it is missing, larger than `at_most` bytes, or no JSON."""
    try:
        size = path.stat().st_size
        if size > at_most:
            raise LlmpyError(f"{path} has {size:,} bytes, and such a file has at most {at_most:,}", "restore the file")
        found = json.loads(path.read_bytes())
    except OSError as fault:
        raise unreadable(path, fault) from fault
    except (ValueError, RecursionError) as fault:  # ValueError: also bytes that are no UTF-8, and endless digits
        raise damaged(path, f"it is no JSON ({str(fault)[:80]})") from fault
    if not isinstance(found, dict):
        raise damaged(path, "it holds no JSON object")
    return found


def tokenizer_named(path: Path) -> Path:
    """Where the tokenizer of a model that is one file lies, others beside it or not: d3.tokenizer.json of d3.bin."""
    return path.with_name(f"{path.name.removesuffix('.bin').removesuffix('.safetensors')}.{TOKENIZER_FILE}")


def tokenizer_beside(path: Path, V: int) -> Path | None:
    """The tokenizer of a model that is one file: that of its name, else the folder's tokenizer.json or llm.c's table.

    The folder's may be another model's: it is one of V tokens; or a tokenizer.json of somewhat fewer, for a vocabulary
    may be padded.
    """
    own, folders, table = tokenizer_named(path), path.with_name(TOKENIZER_FILE), path.with_name(LLMC_FILE)
    if own.is_file():
        return own
    try:
        fits = table.is_file() and int(np.fromfile(table, "<u4", 3)[2]) == V
    except (OSError, IndexError):
        fits = False
    missing = -1
    if folders.is_file():
        try:
            missing = V - Tokenizer.load(folders).vocab_size
        except LlmpyError:
            missing = 1  # whoever reads text with it will say what is wrong
    return folders if missing == 0 or (0 < missing < PAD_VOCAB_TO and not fits) else table if fits else None


def damaged(path: Path, why: str) -> LlmpyError:
    """What to raise for a file that is not what it claims to be."""
    return LlmpyError(f"{path} is damaged: {why}", "download or write it again")


def copy_tokenizer(source: Path, target: Path) -> Tokenizer:
    """Copy a tokenizer.json, and return it. Raises LlmpyError if it is not one of ours."""
    tokenizer = Tokenizer.load(source)
    tokenizer.save(target)
    return tokenizer


def padded(wte: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The V rows of the vocabulary from wte (≥V, C), and zeros up to our own padding: (Vp, C)."""
    V, Vp = config.vocab_size, config.padded_vocab_size
    out = wte if len(wte) == Vp else np.empty((Vp, config.channels), wte.dtype)
    out[:V] = wte[:V]
    out[V:] = 0
    return out
