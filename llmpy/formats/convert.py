"""Convert a model, or a run with everything needed to resume it, to any format that llmpy writes."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..data.rank_tables import LLMC_FILE, write_llmc
from ..data.tokenizer import Tokenizer
from ..errors import LlmpyError
from ..model.config import GPT2_VOCAB
from ..options.tools import ConvertOptions
from ..options.train import TrainOptions
from ..run.checkpoint import check_finite
from ..system.download import upload
from ..system.durable import write_whole
from ..system.staged import staged, staging
from . import find, gguf, hub, huggingface, llmc, llmc_state, native, peft, tokenizer_of
from .model_card import model_card
from .source import Source, tokenizer_path


class Format(NamedTuple):
    """A format that llmpy writes."""

    dtypes: tuple[str, ...]  # supported; the first is the default if the source's is unsupported
    suffix: str | None  # of file names
    write: Callable[[Path, Source, str], None] | None  # None: a model alone is not enough


def write_folder(folder: Path, source: Source, dtype: str) -> None:
    """Write a folder of Hugging Face: peft's for adapters."""
    if source.config.lora is not None:
        peft.write_adapter(folder, source)
    else:
        huggingface.write_model(folder, source, dtype)


FORMATS = {
    "llmc": Format(("float32", "bfloat16"), ".bin", llmc.write_model),
    "llmc-run": Format(("float32", "bfloat16"), None, None),
    "hf": Format(("float32", "bfloat16"), "", write_folder),
    "native": Format(("float32",), ".safetensors", lambda path, source, _: native.write_model(path, source)),
    "gguf": Format(("float32", "bfloat16", "float16", "q8_0"), ".gguf", gguf.write_model),
}


def convert(options: ConvertOptions, log: Callable[[str], None]) -> None:
    """Convert `options.source` into `options.target` and log both. Raises LlmpyError if either fails."""
    target, to, state = options.target, format_of(options.target, options.to), None
    if options.push is not None and (to != "hf" or not hub.REPOSITORY.fullmatch(options.push)):
        what = f"--push {options.push} with --to {to}" if to != "hf" else f"--push {options.push} is not USER/NAME"
        raise LlmpyError("option.conflict", what, "Use --to hf --push USER/NAME")
    if to == "llmc-run":
        source, state, record = llmc_state.of_run(options.source)
    else:
        source = find(options.source.as_posix(), log)
    log(f"read  {source.describe()}")
    if options.merge:
        if source.config.lora is None:
            raise LlmpyError("option.conflict", f"--merge, but {options.source} has no adapters", "Drop --merge")
        source = peft.merged(source)
    dtype = write(source, target, to, options.dtype, log, state)
    files = sorted(p for p in target.iterdir() if p.is_file()) if target.is_dir() else [target]
    names = f" ({', '.join(p.name for p in files)})" if target.is_dir() else ""
    log(f"wrote {target}{names}: {to}, {dtype}, {sum(p.stat().st_size for p in files):,} bytes")
    if options.push is not None:
        log(f"pushed {target} to {upload(target, options.push)}")
    if state is not None:
        o = TrainOptions.from_record(record)
        rows = f"-b {o.batch_size} -t {o.sequence_length} -d {o.micro_steps * o.batch_size * o.sequence_length}"
        log(f"resume in llm.c:  -o {shlex.quote(str(target))} -y 1 {rows}  plus data, steps and learning rates")


def format_of(target: Path, to: str | None) -> str:
    """Return `to`, or the format of `target`'s suffix. Raises LlmpyError if unknown, or if `target` exists."""
    to = to or next((name for name, format in FORMATS.items() if format.suffix == target.suffix), None)
    if to is None:
        raise LlmpyError("convert.unknown-format", f"{target} has no known suffix", f"Use --to {', '.join(FORMATS)}")
    try:
        into = _is_folder(target, to) and target.is_dir()
        mine = staging(target).name  # and its lock, of a killed process
        taken = any(not path.name.startswith(mine) for path in target.iterdir()) if into else os.path.lexists(target)
    except OSError as error:
        raise LlmpyError("file.unwritable", f"cannot write {target}: {error.strerror}", "Use another path") from error
    if taken:
        raise LlmpyError("file.exists", f"{target} exists", "Choose a new name, or remove it")
    return to


def _is_folder(target: Path, to: str) -> bool:
    return to in ("hf", "llmc-run") or (to == "native" and target.suffix != ".safetensors")


def write(
    source: Source, target: Path, to: str, dtype: str | None, log: Callable[[str], None],
    state: llmc_state.TrainingState | None = None,
) -> str:  # fmt: skip
    """Write a model and its tokenizer, creating folders as needed; return the dtype written.

    The default is the source's dtype if the format supports it. Raises LlmpyError for an unsupported `dtype`.
    """
    dtypes, _, write_model = FORMATS[to]
    dtype = dtype or (source.dtype if source.dtype in dtypes else dtypes[0])
    if source.config.lora is not None and to != "hf":
        what = f"--to {to} cannot hold adapters without their base model"
        raise LlmpyError("convert.unsupported-model", what, "Add --merge, or use --to hf, a folder for peft")
    if to.startswith("llmc") and source.config.family != "gpt2":
        what = f"llm.c's format has no {source.config.family.title()} models"
        raise LlmpyError("convert.unsupported-model", what, "Use --to hf, native or gguf")
    if dtype not in dtypes:
        what = f"--to {to} does not support --dtype {dtype}"
        raise LlmpyError("convert.unsupported-dtype", what, f"Use {' or '.join(dtypes)}")
    if write_model is None and state is None:
        what = "a model alone is not an llm.c run: the moments and the data position are missing"
        raise LlmpyError("convert.no-state", what, "Use --to llmc")
    for name, x in (("m", state.m), ("v", state.v)) if state else ():
        check_finite(source.path, f"AdamW's {name}", x)
    source = replace(source, read=source.finite)
    tokenizer = Tokenizer.load(source.tokenizer) if source.tokenizer else None
    if not (tokenizer or source.implies_gpt2) and source.config.vocab_size == GPT2_VOCAB and to in ("llmc", "native"):
        tokenizer_of(source, log)  # raises: in these formats it would imply GPT-2's
    named = None if _is_folder(target, to) or to == "gguf" else tokenizer_path(target)
    if named and named.exists() and not _same(named, tokenizer):
        raise LlmpyError("file.exists", f"{named} is another model's tokenizer", "Choose a new name, or remove it")
    with staged(target, _is_folder(target, to)) as place:
        if write_model is not None:
            write_model(place, source, dtype)
            if to == "hf":
                card = model_card(source)
                write_whole(place / "README.md", lambda temporary: temporary.write_text(card, "utf-8", newline="\n"))
        elif state is not None:
            llmc_state.write_checkpoint(place, source, state, dtype)
        if tokenizer is not None:
            _write_tokenizer(tokenizer, target, place, named, to, log)
    if tokenizer is None and not to.startswith("llmc"):
        log("note: the model has no tokenizer. Put its tokenizer.json in its folder")
    return dtype


def _write_tokenizer(
    tokenizer: Tokenizer, target: Path, place: Path, named: Path | None, to: str, log: Callable[[str], None]
) -> None:
    """Write the tokenizer files of a model that is being written at `place`."""
    if named:
        tokenizer.save(place.with_name(named.name))
        log(f"wrote tokenizer {named}")
    if to.startswith("llmc"):  # its programs read one tokenizer per folder
        table = target / LLMC_FILE if to == "llmc-run" else target.with_name(LLMC_FILE)
        try:
            if not table.exists():
                write_llmc(place / LLMC_FILE if to == "llmc-run" else place.with_name(LLMC_FILE), tokenizer.ranks())
                log(f"wrote tokenizer for llm.c {table}")
            elif not _same(table, tokenizer):
                log(f"note: {table}, which llm.c reads, is another model's tokenizer")
        except LlmpyError as error:
            log(f"note: cannot write {table} for llm.c: {error}")


def _same(path: Path, tokenizer: Tokenizer | None) -> bool:
    """Return whether the file holds this tokenizer."""
    try:
        return tokenizer is not None and Tokenizer.load(path).same_tokens(tokenizer)
    except LlmpyError:
        return False
