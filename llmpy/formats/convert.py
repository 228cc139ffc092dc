"""A model, or a run with all it needs to resume, from any format to any other that we write."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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


def convert(options: ConvertOptions, log: Callable[[str], None]) -> None:
    """Read `options.source`, write `options.target`, and say so. Raises LlmpyError if either cannot be done."""
    target, to, state = options.target, format_of(options.target, options.to), None
    if to == "llmc-run":
        source, state, record = llmc_state.of_run(options.source)
    elif os.path.exists(options.source):  # a local path takes precedence over a hub model of the same name
        source = open_model(options.source)
    else:
        source = find(str(options.source), log)
    log(f"read  {source.describe()}")
    dtype = write(source, target, to, options.dtype, log, state)
    files = sorted(p for p in target.iterdir() if p.is_file()) if target.is_dir() else [target]
    names = f" ({', '.join(p.name for p in files)})" if target.is_dir() else ""
    log(f"wrote {target}{names}: {to}, {dtype}, {sum(p.stat().st_size for p in files):,} bytes")
    if state is not None:
        o = TrainOptions.from_record(record)
        rows = f"-b {o.batch_size} -t {o.sequence_length} -d {o.micro_steps * o.batch_size * o.sequence_length}"
        log(f"resume in llm.c:  -o {shlex.quote(str(target))} -y 1 {rows}  and the run's data, steps and rates")


def format_of(target: Path, to: str | None) -> str:
    """Return the format for `target`: `to`, or that of its suffix. Raises LlmpyError for neither, or if it exists."""
    to = to or next((name for name, format in FORMATS.items() if format.suffix == target.suffix), None)
    if to is None:
        raise LlmpyError("formats.x", f"{target} does not say its format", f"Use --to {', '.join(FORMATS)}")
    try:
        taken = any(target.iterdir()) if _is_folder(target, to) and target.is_dir() else target.exists()
    except OSError as error:
        raise LlmpyError("formats.x", f"cannot write {target}: {error.strerror}", "Choose another place") from error
    if taken:
        raise LlmpyError("formats.x", f"{target} exists", "Choose a new name, or remove it")
    return to


def _is_folder(target: Path, to: str) -> bool:
    return to in ("hf", "llmc-run") or (to == "native" and target.suffix != ".safetensors")


def write(
    source: Source, target: Path, to: str, dtype: str | None, log: Callable[[str], None],
    state: llmc_state.TrainingState | None = None,
) -> str:  # fmt: skip
    """Write a model, its tokenizer with it, in folders that are made; return the type of its numbers.

    That is `dtype`, or the source's if the format has it. Raises LlmpyError for one that it cannot hold.
    """
    dtypes, _, write_model = FORMATS[to]
    dtype = dtype or (source.dtype if source.dtype in dtypes else dtypes[0])
    if dtype not in dtypes:
        raise LlmpyError("formats.x", f"--dtype {dtype} with --to {to}", f"Use {' or '.join(dtypes)}")
    if write_model is None and state is None:
        raise LlmpyError(
            "formats.x", "a model alone is no run of llm.c: moments and place in the data are missing", "Use --to llmc"
        )
    tokenizer = Tokenizer.load(source.tokenizer) if source.tokenizer else None
    named = None if _is_folder(target, to) or to == "gguf" else tokenizer_named(target)
    if named and named.exists() and not _same(named, tokenizer):
        raise LlmpyError("formats.x", f"{named} is another model's tokenizer", "Choose a new name, or remove it")
    with made(target if _is_folder(target, to) else target.parent):
        if write_model is not None:
            write_model(target, source, dtype)
        elif state is not None:
            llmc_state.write_checkpoint(target, source, state, dtype)
    if tokenizer is None and not to.startswith("llmc"):
        log("no tokenizer came with the model: put its tokenizer.json in its folder")
    if tokenizer is not None and named:
        tokenizer.save(named)
        log(f"wrote its tokenizer: {named}")
    if tokenizer is not None and to.startswith("llmc"):  # its programs take one table in a folder
        table = target / LLMC_FILE if to == "llmc-run" else target.with_name(LLMC_FILE)
        try:
            if not table.exists():
                write_llmc(table, tokenizer.ranks())
                log(f"wrote its tokenizer for llm.c's programs: {table}")
            elif not _same(table, tokenizer):
                log(f"note: {table}, which llm.c's programs read, is another model's")
        except LlmpyError as error:
            log(f"no {table} for llm.c's programs: {error}")
    return dtype


def _same(path: Path, tokenizer: Tokenizer | None) -> bool:
    """Return whether a file is that tokenizer."""
    try:
        return tokenizer is not None and Tokenizer.load(path).same_tokens(tokenizer)
    except LlmpyError:
        return False
