"""A model file of any format: its shape is read at once, its tensors on demand.

Readers check the header against the file size before they allocate anything. Tensors are read one at a time, under
the names of the parameter table, in the stored dtype. A conversion thus never holds a second copy of the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ..data import pretrained
from ..data.rank_tables import LLMC_FILE
from ..data.tokenizer import Tokenizer
from ..errors import LlmpyError, unreadable
from ..model.arena import Arena
from ..model.config import GPT2_VOCAB, PAD_VOCAB_TO, ModelConfig
from ..model.families import params_table
from ..model.language_model import LanguageModel
from ..run.checkpoint import check_finite, damaged
from ..run.folder import TOKENIZER_FILE
from ..system.durable import write_whole

DTYPES = {"float32": np.dtype("<f4"), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype("<f2")}
HUGGING_FACE = "of Hugging Face"  # ends `Source.what`
VOCABULARY = ("wte", "head")  # tensors with a row for each token, and padding


@dataclass(frozen=True)
class Source:
    """An opened and checked model file.

    `read(name)` returns a tensor in the table's shape and the stored dtype, or raises LlmpyError if the file changed.
    """

    path: Path
    what: str  # the detected format
    config: ModelConfig
    dtype: str  # of the matrices: a key of DTYPES
    trained_length: int  # positions from here on are untrained
    read: Callable[[str], np.ndarray]
    tokenizer: Path | None = None  # the model's tokenizer.json or vocab.json
    load: Callable[[Arena], None] | None = None  # a faster `fill`
    adapters: Callable[[Arena], None] | None = None  # fills the adapters, if the config has them

    def fill(self, params: Arena) -> None:
        """params := the tensors. Raises LlmpyError if any is not finite."""
        if self.load is not None:
            self.load(params)
            return
        for tensor, view in params.items():
            view[...] = self.finite(tensor.name)[: len(view)]  # fewer rows: see `cut`

    def load_into(self, model: LanguageModel) -> None:
        """Set all of a model's parameters. Raises LlmpyError if any is not finite."""
        if model.quantised:
            for tensor in params_table(self.config):
                model.assign(tensor.name, self.finite(tensor.name)[: tensor.shape[0]])
        else:
            self.fill(model.params)
        if self.adapters is not None:
            self.adapters(model.trained)
        model.store_weights()

    def finite(self, name: str) -> np.ndarray:
        """Return `read(name)`. Raises LlmpyError if it holds NaN or infinity."""
        check_finite(self.path, name, x := self.read(name))
        return x

    @property
    def implies_gpt2(self) -> bool:
        """Whether a missing tokenizer means GPT-2's: in llm.c's and our files of its size, never in other folders."""
        return self.config.vocab_size == GPT2_VOCAB and not self.what.endswith(HUGGING_FACE)

    def describe(self) -> str:
        """Return one line for the user."""
        return f"{self.path}: {self.what}, {self.dtype}, {self.config}"


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name → shape of every parameter."""
    return {t.name: t.shape for t in params_table(config)}


def elements(config: ModelConfig) -> int:
    """Return the number of parameters, padding included."""
    return sum(t.size for t in params_table(config))


def cast(x: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Return x in another dtype, rounded to nearest even. Raises LlmpyError if a finite number overflows."""
    if x.dtype == DTYPES[dtype]:
        return x
    with np.errstate(over="ignore", invalid="ignore"):
        out = x.astype(DTYPES[dtype])
    if DTYPES[dtype].itemsize < x.dtype.itemsize and not np.array_equal(np.isfinite(out), np.isfinite(x)):
        raise LlmpyError("convert.overflow", f"{name} overflows {dtype}", "Use --dtype float32 or bfloat16")
    return out


def by_name(
    names: Mapping[str, str], name: str, x: np.ndarray, config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name in another program, view of tensor x): one per layer; of wte and head the first V rows.

    `names` maps our names without _w and _b to theirs without .weight and .bias; {} is the layer. Two names are the
    rows of gate and up, three those of queries, keys and values.
    """
    theirs = names[name.removesuffix("_w").removesuffix("_b")].split()
    ending = ".bias" if name.endswith("_b") else ".weight"
    if "{}" in theirs[0]:
        queries, keys = (n * config.head_size for n in (config.heads, config.kv_heads))
        ends = {1: [], 2: [x.shape[1] // 2], 3: [queries, queries + keys]}[len(theirs)]
        for l, layer in enumerate(x):
            for part, view in zip(theirs, np.split(layer, ends), strict=True):
                yield part.format(l) + ending, view
    else:
        yield theirs[0] + ending, x[: config.vocab_size] if name in VOCABULARY else x


def write_json(path: Path, about: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    text = json.dumps(about, indent=2) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file atomically, with the rights of a new file."""

    def write(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, {"format": "pt"})  # required by transformers
        except SafetensorError as error:  # also for a full disk
            raise OSError(str(error)) from error
        temporary.chmod(mode)  # the library writes mode 0600

    write_whole(path, write)


def read_json(path: Path) -> Any:
    """Return the object in a JSON file. Raises LlmpyError if the file is missing or is not a JSON object."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:  # ValueError: also invalid UTF-8 and too many digits
        raise damaged(path, f"it is not JSON ({str(error)[:80]})") from error
    if not isinstance(found, dict):
        raise damaged(path, "it is not a JSON object")
    return found


def tokenizer_path(path: Path) -> Path:
    """Return the path of a model file's own tokenizer: d3.tokenizer.json for d3.bin."""
    return path.with_name(f"{path.name.removesuffix('.bin').removesuffix('.safetensors')}.{TOKENIZER_FILE}")


def find_tokenizer(path: Path, V: int) -> Path | None:
    """Return the tokenizer of a model file: its own, else the folder's or llm.c's.

    The folder's may be another model's. It must have V tokens; JSON files may have fewer (padded vocabulary).
    """
    own, folders, table = tokenizer_path(path), pretrained.find(path.parent), path.with_name(LLMC_FILE)
    if own.is_file():
        return own
    fits = table.is_file() and np.fromfile(table, "<u4", 3)[2:].tolist() == [V]
    missing = -1
    if folders is not None:
        try:
            missing = V - Tokenizer.load(folders).vocab_size
        except LlmpyError:
            missing = 1  # reported when the tokenizer is used
    return folders if missing == 0 or (0 < missing < PAD_VOCAB_TO and not fits) else table if fits else None


def padded(read: Callable[[str], np.ndarray], config: ModelConfig) -> Callable[[str], np.ndarray]:
    """Return `read` with wte and head (≥Vp, C) cut to (Vp, C), the rows beyond the vocabulary := 0."""

    def fitted(name: str) -> np.ndarray:
        x = read(name)
        if name in VOCABULARY:
            x = x[: config.padded_vocab_size]
            x[config.vocab_size :] = 0
        return x

    return fitted


def cut(source: Source, vocab_size: int) -> Source:
    """Return the model with the first `vocab_size` tokens only."""

    def load(params: Arena) -> None:
        source.fill(params)
        clear_padding(params, vocab_size)

    config = replace(source.config, vocab_size=vocab_size)
    return replace(source, config=config, read=padded(source.read, config), load=load)


def clear_padding(params: Arena, vocab_size: int) -> None:
    """Rows of wte and head beyond the vocabulary := 0."""
    for tensor, view in params.items():
        if tensor.name in VOCABULARY:
            view[vocab_size:] = 0
