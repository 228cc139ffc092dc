"""Read and write llmpy's own model file, alone or in a run folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from ..data.tokenizer import Tokenizer
from ..run import checkpoint
from ..run.folder import BEST_FILE, CHECKPOINTS, CONFIG_FILE, MODEL_FILE, TOKENIZER_FILE
from .source import Source, cast, find_tokenizer, shapes, tokenizer_path


def read_model(path: Path) -> Source:
    """Open `model.safetensors`, or the run folder that holds it. Raises LlmpyError if it is corrupt or not llmpy's."""
    path = path / MODEL_FILE if path.is_dir() else path
    header = checkpoint.read_header(path)

    def read(name: str) -> np.ndarray:
        with checkpoint.opened(path) as file:
            return np.asarray(file.get_tensor(name))

    folder = path.absolute().parent
    run = folder.parent.parent  # if the model is in a checkpoint
    in_checkpoint = folder.parent.name == CHECKPOINTS and (run / CONFIG_FILE).is_file()
    runs = (run if in_checkpoint else path.parent) / TOKENIZER_FILE
    ours = path.name in (MODEL_FILE, BEST_FILE) and runs.is_file() and not tokenizer_path(path).is_file()
    tokenizer = runs if ours else find_tokenizer(path, header.config.vocab_size)
    load = partial(checkpoint.load_parameters, path)
    about = path, "model of llmpy", header.config, "float32", header.trained_length, read, tokenizer
    return Source(*about, load) if header.config.lora is None else Source(*about, adapters=load)  # see peft.on_base


def write_model(path: Path, source: Source) -> None:
    """Write `path` if it ends in .safetensors; else a folder with `model.safetensors` and its tokenizer."""
    params = np.concatenate([cast(source.read(n), "float32", n).reshape(-1) for n in shapes(source.config)])
    if path.suffix != ".safetensors":
        path.mkdir(parents=True, exist_ok=True)
        if source.tokenizer is not None:
            Tokenizer.load(source.tokenizer).save(path / TOKENIZER_FILE)
        path = path / MODEL_FILE
    checkpoint.write_model(path, source.config, source.trained_length, params)
