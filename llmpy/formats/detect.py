"""Detect the format of a model by its content, not by its name: `open_model(path)`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..data import magic, pretrained
from ..data.tokenizer import Tokenizer
from ..errors import LlmpyError, unreadable
from ..model.config import ModelConfig
from ..model.families import with_adapters
from ..options.train import names_file
from ..run import checkpoint
from ..run.folder import MODEL_FILE, TOKENIZER_FILE, finished, is_run
from ..system.command import command
from ..system.terminal import aside
from ..system.words import did_you_mean
from . import hub, huggingface, llmc, llmc_state, native, peft
from .source import Source, cut, tokenizer_path


def resolve(text: str, log: Callable[[str], None]) -> Source:
    """Return the model that `find` returns, a GPT-2 without rows of wte that its tokenizer does not use."""
    source = find(text, log)
    V, own = source.config.vocab_size, source.tokenizer
    have = Tokenizer.load(own).vocab_size if own is not None else V
    if have > V:
        what = f"{own} and its added tokens are {have:,} tokens, the model has {V:,}"
        raise LlmpyError("tokenizer.vocab-mismatch", what, "Replace it with the model's own tokenizer.json")
    if have == V or source.config.family != "gpt2":
        return source
    log(f"note: the tokenizer has {have:,} of the {V:,} tokens of {source.path}; the others are ignored")
    return cut(source, have)


def find(text: str, log: Callable[[str], None]) -> Source:
    """Open the model at a path, or a hub model, downloaded if missing. Raises LlmpyError if it is neither."""
    if hub.is_name(text):
        return open_model(hub.download(text, log))
    path = Path(text)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise no_model(text) from None
    except OSError as error:  # a name too long, a folder without permission
        raise unreadable(path, error) from None
    return open_model(path)


def no_model(text: str) -> LlmpyError:
    """Return the error to raise for a path without a model."""
    runs = [str(folder) for folder in finished()]
    known = f"Finished runs: {', '.join(runs[:5])}" if runs else f"Train one: {command('train')}"
    near = did_you_mean(text, [*hub.NAMES, *runs])
    hint = f"{near} {known}. Or use {', '.join(hub.NAMES)}, OWNER/NAME on the hub, or a path".lstrip()
    return LlmpyError("model.missing", f"no run or model {text}", hint)


def config_of(
    text: str, log: Callable[[str], None] = aside, lora: int | None = None, vocab_size: int | None = None
) -> ModelConfig:
    """Return the shape of a dial (`d12`, `llama:d6`), or of a model at a path or on the hub, without its weights.

    `lora`: with adapters of this rank. `vocab_size`: of a dial only. Raises LlmpyError.
    """
    config = _shape_of(text, log, vocab_size)
    return config if lora is None else with_adapters(config, lora)


def _shape_of(text: str, log: Callable[[str], None], vocab_size: int | None) -> ModelConfig:
    try:
        return ModelConfig.from_dial(text, vocab_size)
    except LlmpyError as error:
        if vocab_size is not None and (hub.is_name(text) or os.path.exists(text)):
            what = f"--vocab-size is for sizes of --model; {text} has its own vocabulary"
            raise LlmpyError("option.conflict", what, "Drop --vocab-size") from None
        if hub.is_name(text):
            return huggingface.read_config(hub.config_file(text, log))[1]
        if not os.path.exists(text):
            raise error if not names_file(text) else no_model(text) from None
    path = Path(text)
    about = path / huggingface.CONFIG_FILE
    if about.is_file() and not is_run(path) and not (path / peft.CONFIG_FILE).is_file():
        return huggingface.read_config(about)[1]
    return open_model(path, log).config


def tokenizer_of(source: Source, log: Callable[[str], None]) -> tuple[Tokenizer, str]:
    """Return a model's tokenizer and its description, or GPT-2's if the format implies it. Else raises LlmpyError."""
    if source.tokenizer is not None:
        return Tokenizer.load(source.tokenizer), f"the model's ({source.tokenizer})"
    if source.implies_gpt2:
        log(f"note: {source.path} has no tokenizer next to it: taking OpenAI's GPT-2 tokenizer")
        return Tokenizer.gpt2(log), "GPT-2's"
    folder = source.path if source.path.is_dir() else source.path.parent
    other = next((name for name in pretrained.UNREADABLE if (folder / name).is_file()), None)
    what = f"{source.path} has no tokenizer" + (f" that llmpy can read, only {other}" if other else "")
    there = tokenizer_path(source.path) if source.path.is_file() else source.path / TOKENIZER_FILE
    raise LlmpyError("tokenizer.missing", what, f"Put its tokenizer.json at {there}")


def open_model(path: Path, log: Callable[[str], None] = aside) -> Source:
    """Open a model of any readable format, an adapter on its base model. Raises LlmpyError, which names the format."""
    if (path / peft.CONFIG_FILE).is_file():
        return peft.read_adapter(path, lambda base: _base(path, base, log, find))
    source = _open_model(path)
    lora = source.config.lora
    return source if lora is None else peft.on_base(source, _base(path, lora.base, log, resolve))


def _base(path: Path, base: str, log: Callable[[str], None], opened: Callable[..., Source]) -> Source:
    """Open the model that an adapter was trained on. Raises LlmpyError, also if it is missing."""
    if not (hub.is_name(base) or os.path.exists(base)):
        what = f"{path} is an adapter of {base}, which is missing"
        raise LlmpyError("lora.other-base", what, "Restore the model that it was trained on")
    return opened(base, log)


def _open_model(path: Path) -> Source:
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
        raise LlmpyError("model.pickle", f"{path} is a PyTorch pickle, which can run code", "Save it as safetensors")
    if pointer := magic.lfs_pointer(start):
        raise LlmpyError("file.lfs-pointer", f"{path} {pointer[0]}", pointer[1])
    what = magic.WHAT.get(magic.magic_of(start), f"not a model: it starts with {start[:8].hex(' ') or 'nothing'}")
    what = "GGUF, which llmpy writes but does not read" if start[:4] == b"GGUF" else what
    raise LlmpyError("model.unsupported-format", f"{path} is {what}", "Use a model of llm.c, Hugging Face or llmpy")


def _open_folder(path: Path) -> Source:
    if (path / MODEL_FILE).is_file() and _is_ours(path / MODEL_FILE):
        return native.read_model(path)
    if llmc_state.latest(path) is not None:
        return llmc_state.read_checkpoint(path)[0]
    if is_run(path) and not (path / MODEL_FILE).exists():
        hint = f"Resume it: {command('train', '--resume', path)}"
        raise LlmpyError("checkpoint.missing", f"{path} is a run without a checkpoint", hint)
    if (path / huggingface.CONFIG_FILE).is_file():
        return huggingface.read_model(path)
    raise LlmpyError("model.missing", f"no model in {path}", "Use a run folder, or a folder of Hugging Face or llm.c")


def _is_ours(path: Path) -> bool:
    """Return whether a safetensors file has llmpy's metadata."""
    with checkpoint.opened(path) as file:
        return checkpoint.KEY in (file.metadata() or {})
