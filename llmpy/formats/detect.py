"""Which format a model has, by what is in its files and not by their names: `open_model(path)`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..data import magic
from ..data.tokenizer import Tokenizer
from ..errors import LlmpyError, unreadable
from ..model.config import GPT2_VOCAB
from ..run import checkpoint
from ..run.folder import MODEL_FILE, TOKENIZER_FILE, finished, is_run
from ..system.command import command
from ..system.words import did_you_mean
from . import hub, huggingface, llmc, llmc_state, native
from .source import Source, padded, tokenizer_named


def resolve(text: str, log: Callable[[str], None]) -> Source:
    """The model that `find` gives, to use, without the rows of wte that no token has: some pad to a round number."""
    source = find(text, log)
    V, own = source.config.vocab_size, source.tokenizer
    have = Tokenizer.load(own).vocab_size if own is not None else V
    if have == V:
        return source
    if have > V:
        raise LlmpyError(
            "formats.x", f"{own} has {have:,} tokens but the model {V:,}", "Put the model's own tokenizer.json there"
        )
    log(f"note: of the {V:,} tokens of {source.path} its tokenizer has {have:,}: the others are left out")
    config = replace(source.config, vocab_size=have)
    return replace(source, config=config, read=padded(source.read, config), load=None)


def find(text: str, log: Callable[[str], None]) -> Source:
    """A model of the hub, downloaded if need be, or at a path. Raises LlmpyError for anything else."""
    if text in hub.NAMES:
        return open_model(hub.download(text, log))
    path = Path(text)
    if not os.path.exists(path):
        near = did_you_mean(text, [*hub.NAMES, *map(str, finished())])
        hint = f"{near} use {', '.join(hub.NAMES)}, or the path of a file or folder".lstrip()
        raise LlmpyError("formats.x", f"no model {text}", hint)
    return open_model(path)


def tokenizer_of(source: Source, log: Callable[[str], None]) -> tuple[Tokenizer, str]:
    """The tokenizer of a model, and what to call it. Raises LlmpyError if it came without, and is not GPT-2's."""
    if source.tokenizer is not None:
        return Tokenizer.load(source.tokenizer), f"the model's ({source.tokenizer})"
    if source.config.vocab_size == GPT2_VOCAB:
        return Tokenizer.gpt2(log), "GPT-2's"
    there = tokenizer_named(source.path) if source.path.is_file() else source.path / TOKENIZER_FILE
    raise LlmpyError(
        "formats.x", f"{source.path} came without a tokenizer, which text needs", f"Put its tokenizer.json at {there}"
    )


def open_model(path: Path) -> Source:
    """A model of any format we read. Raises LlmpyError, which says what else the path seems to be."""
    try:
        if path.is_dir():
            return _open_folder(path)
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise unreadable(path, error) from error
    if magic.magic_of(start) == magic.MODEL:
        return llmc.read_model(path)
    if start[8:9] == b"{":  # after the length of its header
        return native.read_model(path) if _is_ours(path) else huggingface.read_model(path.parent, path.name)
    if start[:4] == b"PK\3\4" or start[:1] == b"\x80":
        raise LlmpyError(
            "formats.x", f"{path} is a pickle of PyTorch, which can run code when it is read", "Save it as safetensors"
        )
    if pointer := magic.lfs_pointer(start):
        raise LlmpyError("formats.x", f"{path} {pointer[0]}", pointer[1])
    what = magic.WHAT.get(magic.magic_of(start), f"no model: it begins with {start[:8].hex(' ') or 'nothing'}")
    what = "GGUF, which is written here but not read" if start[:4] == b"GGUF" else what
    raise LlmpyError("formats.x", f"{path} is {what}", "Give a model of llm.c, Hugging Face or llmpy")


def _open_folder(path: Path) -> Source:
    if (path / MODEL_FILE).is_file() and _is_ours(path / MODEL_FILE):
        return native.read_model(path)
    if llmc_state.latest(path) is not None:
        return llmc_state.read_checkpoint(path)[0]
    if is_run(path) and not (path / MODEL_FILE).exists():
        raise LlmpyError(
            "formats.x", f"{path} is a run that has no checkpoint yet", f"Go on: {command('train', '--resume', path)}"
        )
    if (path / huggingface.CONFIG_FILE).is_file():
        return huggingface.read_model(path)
    raise LlmpyError("formats.x", f"{path} holds no model", "Give a run folder, or one of Hugging Face or llm.c")


def _is_ours(path: Path) -> bool:
    """Return whether a safetensors file has our metadata."""
    with checkpoint.opened(path) as file:
        return checkpoint.KEY in (file.metadata() or {})
