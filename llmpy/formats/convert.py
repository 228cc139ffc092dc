"""A model, or a run with all it needs to go on, from any format to any other that we write."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..data.rank_tables import LLMC_FILE, write_llmc
from ..data.tokenizer import Tokenizer
from ..errors import LlmpyError
from ..options.tools import MODEL_FORMATS, ConvertOptions
from ..options.train import TrainOptions
from ..system.durable import made
from . import find, gguf, huggingface, llmc, llmc_state, native, open_model
from .source import Source, tokenizer_named

# What each format can hold; the first is taken where the source's own is not among them.
DTYPES = {
    "llmc": ("float32", "bfloat16"),
    "llmc-run": ("float32", "bfloat16"),
    "hf": ("float32", "bfloat16"),
    "native": ("float32",),
    "gguf": ("float32", "bfloat16", "float16"),
}
BY_SUFFIX = {".bin": "llmc", ".gguf": "gguf", ".safetensors": "native", "": "hf"}


def convert(options: ConvertOptions, say: Callable[[str], None]) -> None:
    """Read `options.source`, write `options.target`, and tell what was read and written, and what was left behind.

    Raises LlmpyError for a model that cannot be read, for a target that exists, and for a type that it cannot hold.
    """
    target = options.target
    to = format_of(target, options.to)
    folder = _is_folder(target, to)
    state, told = None, None
    if to == "llmc-run" and llmc_state.is_checkpoint(options.source):
        source, state = llmc_state.read_checkpoint(options.source)
    elif to == "llmc-run":
        source, state, told = llmc_state.of_run(options.source)
    else:
        here = os.path.exists(options.source)  # what the user has comes before what the hub has by that name
        source = open_model(options.source) if here else find(str(options.source), say)
    say(f"read  {source.describe()}")
    dtype = write(source, target, to, options.dtype, state)
    files = sorted(p for p in target.iterdir() if p.is_file()) if folder else [target]
    names = f" ({', '.join(p.name for p in files)})" if folder else ""
    say(f"wrote {target}{names}: {to}, {dtype}, {sum(p.stat().st_size for p in files):,} bytes")
    put_tokenizer(source, target, to, say)
    if told is not None:
        _how_to_go_on(target, told, say)
    elif state is None and llmc_state.is_checkpoint(options.source):
        say("its moments and its place in the data stay behind: train --resume takes them, and --to llmc-run")


def format_of(target: Path, to: str | None) -> str:
    """The format that `target` shall have, `to` or by its name.

    Raises LlmpyError if neither says it, or if something is there already.
    """
    to = to or BY_SUFFIX.get(target.suffix)
    if to is None:
        raise LlmpyError(f"{target} does not say its format", f"use --to {', '.join(MODEL_FORMATS)}")
    _refuse_loss(target, _is_folder(target, to))
    return to


def _is_folder(target: Path, to: str) -> bool:
    return to in ("hf", "llmc-run") or (to == "native" and target.suffix != ".safetensors")


def write(source: Source, target: Path, to: str, dtype: str | None = None, state: Any = None) -> str:
    """Write a model in a format; returns the type of its numbers: `dtype`, or the source's if the format has it.

    With `state`, a `llmc_state.State`, write a checkpoint of llm.c. Missing folders are made.
    Raises LlmpyError for a type that the format cannot hold, and if the disk refuses.
    """
    dtype = dtype or (source.dtype if source.dtype in DTYPES[to] else DTYPES[to][0])
    if dtype not in DTYPES[to]:
        raise LlmpyError(f"--dtype {dtype} with --to {to}", f"use {' or '.join(DTYPES[to])}")
    if to == "llmc-run" and state is None:
        raise LlmpyError("a model alone is no run of llm.c: moments and place in the data are missing", "use --to llmc")
    named = tokenizer_named(target)
    ours = source.tokenizer and named.exists() and _same(named, Tokenizer.load(source.tokenizer))
    if _is_single(target, to) and named.exists() and not ours:
        raise LlmpyError(f"{named} is another model's tokenizer", "choose a new name, or remove it")
    with made(target if _is_folder(target, to) else target.parent):
        if state is None:
            _write(source, target, to, dtype)
        else:
            llmc_state.write_checkpoint(target, source, state, dtype)
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


def put_tokenizer(source: Source, target: Path, to: str, say: Callable[[str], None]) -> None:
    """Put the tokenizer beside a format that cannot hold it, and say what became of it.

    Each file has its own, by its name; llm.c's programs look for one table in a folder, which is left if it is there.
    """
    if source.tokenizer is None:
        if not to.startswith("llmc"):
            say("no tokenizer came with the model: put its tokenizer.json beside it")
        return
    tokenizer = Tokenizer.load(source.tokenizer)
    if _is_single(target, to):
        tokenizer.save(tokenizer_named(target))
        say(f"its tokenizer is beside it: {tokenizer_named(target)}")
    if not to.startswith("llmc"):
        return
    table = target / LLMC_FILE if to == "llmc-run" else target.with_name(LLMC_FILE)
    if table.exists():
        if not _same(table, tokenizer):
            say(f"note: {table}, which llm.c's programs read, is another model's")
        return
    try:
        write_llmc(table, tokenizer.ranks())
    except LlmpyError as fault:
        say(f"no {table} for llm.c's programs: {fault}")
        return
    say(f"its tokenizer for llm.c's programs: {table}")


def _is_single(target: Path, to: str) -> bool:
    """Whether the model becomes a file that holds no tokenizer."""
    return to in ("llmc", "native") and not _is_folder(target, to)


def _same(path: Path, tokenizer: Tokenizer) -> bool:
    """Whether a file is that tokenizer."""
    try:
        return Tokenizer.load(path).same_tokens(tokenizer)
    except LlmpyError:
        return False


def _how_to_go_on(target: Path, told: dict[str, Any], say: Callable[[str], None]) -> None:
    """What llm.c has to be told, for its files hold no options."""
    o = TrainOptions.from_record(told)
    BT = o.batch_size * o.sequence_length
    say(
        f"llm.c goes on with:  -o {shlex.quote(str(target))} -y 1 -b {o.batch_size} -t {o.sequence_length} "
        f"-d {o.micro_steps * BT}  and the data, steps and rates of before: its files hold no options"
    )


def _refuse_loss(target: Path, folder: bool) -> None:
    """Raise LlmpyError if anything is there already."""
    try:
        taken = any(target.iterdir()) if folder and target.is_dir() else target.exists()
    except OSError as fault:
        raise LlmpyError(f"cannot write {target}: {fault.strerror}", "choose another place") from fault
    if taken:
        raise LlmpyError(f"{target} exists", "choose a new name, or remove it")
