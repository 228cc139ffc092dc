"""A model, or a run with all it needs to go on, from any format to any other that we write."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..data.rank_tables import LLMC_FILE, write_llmc
from ..data.tokenizer import Tokenizer
from ..errors import LlmpyError
from ..options.tools import ConvertOptions
from ..options.train import TrainOptions
from ..system.durable import made
from . import find, gguf, huggingface, llmc, llmc_state, native, open_model
from .source import Source, tokenizer_named


class Format(NamedTuple):
    """A format that models are written in."""

    dtypes: tuple[str, ...]  # that it can hold; the first one where the source's own is not among them
    suffix: str | None  # of names that ask for it
    write: Callable[[Path, Source, str], None] | None  # None: needs more than a model


FORMATS = {
    "llmc": Format(("float32", "bfloat16"), ".bin", llmc.write_model),
    "llmc-run": Format(("float32", "bfloat16"), None, None),
    "hf": Format(("float32", "bfloat16"), "", huggingface.write_model),
    "native": Format(("float32",), ".safetensors", lambda path, source, _: native.write_model(path, source)),
    "gguf": Format(("float32", "bfloat16", "float16"), ".gguf", gguf.write_model),
}


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
    if told is not None:  # llm.c's files hold no options
        o = TrainOptions.from_record(told)
        rows = f"-b {o.batch_size} -t {o.sequence_length} -d {o.micro_steps * o.batch_size * o.sequence_length}"
        say(
            f"llm.c goes on with:  -o {shlex.quote(str(target))} -y 1 {rows}  and the data, steps and rates of before: "
            "its files hold no options"
        )
    elif state is None and llmc_state.is_checkpoint(options.source):
        say("its moments and its place in the data stay behind: train --resume takes them, and --to llmc-run")


def format_of(target: Path, to: str | None) -> str:
    """The format that `target` shall have, `to` or by its name.

    Raises LlmpyError if neither says it, or if something is there already.
    """
    to = to or next((name for name, format in FORMATS.items() if format.suffix == target.suffix), None)
    if to is None:
        raise LlmpyError(f"{target} does not say its format", f"use --to {', '.join(FORMATS)}")
    try:
        taken = any(target.iterdir()) if _is_folder(target, to) and target.is_dir() else target.exists()
    except OSError as fault:
        raise LlmpyError(f"cannot write {target}: {fault.strerror}", "choose another place") from fault
    if taken:
        raise LlmpyError(f"{target} exists", "choose a new name, or remove it")
    return to


def _is_folder(target: Path, to: str) -> bool:
    return to in ("hf", "llmc-run") or (to == "native" and target.suffix != ".safetensors")


def write(source: Source, target: Path, to: str, dtype: str | None = None, state: Any = None) -> str:
    """Write a model in a format; returns the type of its numbers: `dtype`, or the source's if the format has it.

    With `state`, a `llmc_state.State`, write a checkpoint of llm.c. Missing folders are made.
    Raises LlmpyError for a type that the format cannot hold, and if the disk refuses.
    """
    dtypes, _, write_model = FORMATS[to]
    dtype = dtype or (source.dtype if source.dtype in dtypes else dtypes[0])
    if dtype not in dtypes:
        raise LlmpyError(f"--dtype {dtype} with --to {to}", f"use {' or '.join(dtypes)}")
    if write_model is None and state is None:
        raise LlmpyError("a model alone is no run of llm.c: moments and place in the data are missing", "use --to llmc")
    named = tokenizer_named(target)
    ours = source.tokenizer and named.exists() and _same(named, Tokenizer.load(source.tokenizer))
    if _is_single(target, to) and named.exists() and not ours:
        raise LlmpyError(f"{named} is another model's tokenizer", "choose a new name, or remove it")
    with made(target if _is_folder(target, to) else target.parent):
        if write_model is not None:
            write_model(target, source, dtype)
        else:
            llmc_state.write_checkpoint(target, source, state, dtype)
    return dtype


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
