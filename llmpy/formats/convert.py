"""A model from any format to any other that we write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import LlmpyError
from ..options import MODEL_FORMATS, ConvertOptions
from . import gguf, huggingface, llmc, native, open_model
from .source import Source

# What each format can hold; the first is taken where the source's own is not among them.
DTYPES = {
    "llmc": ("float32", "bfloat16"),
    "hf": ("float32", "bfloat16"),
    "native": ("float32",),
    "gguf": ("float32", "bfloat16", "float16"),
}
BY_SUFFIX = {".bin": "llmc", ".gguf": "gguf", ".safetensors": "native", "": "hf"}


def convert(options: ConvertOptions, say: Callable[[str], None]) -> None:
    """Read `options.source`, write `options.target`, and tell what was read and written.

    Raises LlmpyError for a model that cannot be read, for a target that exists, and for a type that it cannot hold.
    """
    target = options.target
    to = format_of(target, options.to)
    source = open_model(options.source)
    say(f"read  {source.describe()}")
    dtype = write(source, target, to, options.dtype)
    files = [target] if target.is_file() else sorted(p for p in target.iterdir() if p.is_file())
    size = sum(p.stat().st_size for p in files)
    names = "" if target.is_file() else f" ({', '.join(p.name for p in files)})"
    say(f"wrote {target}{names}: {to}, {dtype}, {size:,} bytes")
    if source.tokenizer is None and to != "llmc":
        say("no tokenizer came with the model: put its tokenizer.json beside it")


def format_of(target: Path, to: str | None) -> str:
    """The format that `target` shall have, `to` or by its name.

    Raises LlmpyError if neither says it, or if something is there already.
    """
    to = to or BY_SUFFIX.get(target.suffix)
    if to is None:
        raise LlmpyError(f"{target} does not say its format", f"use --to {', '.join(MODEL_FORMATS)}")
    _refuse_loss(target, folder=to == "hf" or (to == "native" and target.suffix != ".safetensors"))
    return to


def write(source: Source, target: Path, to: str, dtype: str | None = None) -> str:
    """Write a model in a format; returns the type of its numbers: `dtype`, or the source's if the format has it.

    Raises LlmpyError for a type that the format cannot hold, and if the disk refuses.
    """
    dtype = dtype or (source.dtype if source.dtype in DTYPES[to] else DTYPES[to][0])
    if dtype not in DTYPES[to]:
        raise LlmpyError(f"--dtype {dtype} with --to {to}", f"use {' or '.join(DTYPES[to])}")
    _write(source, target, to, dtype)
    return dtype


def _write(source: Source, target: Path, to: str, dtype: str) -> None:
    if to == "llmc":
        llmc.write_model(target, source, dtype)
    elif to == "gguf":
        gguf.write_model(target, source, dtype)
    elif to == "hf":
        huggingface.write_model(target, source, dtype)
    else:
        native.write_model(target, source)


def _refuse_loss(target: Path, folder: bool) -> None:
    """Raise LlmpyError if anything is there already, or if a file has no folder to lie in."""
    try:
        taken = any(target.iterdir()) if folder and target.is_dir() else target.exists()
        homeless = not folder and not target.parent.is_dir()
    except OSError as fault:
        raise LlmpyError(f"cannot write {target}: {fault.strerror}", "choose another place") from fault
    if taken:
        raise LlmpyError(f"{target} exists", "choose a new name, or remove it")
    if homeless:
        raise LlmpyError(f"cannot write {target}: {target.parent} is no folder", "make it first, or choose another")
