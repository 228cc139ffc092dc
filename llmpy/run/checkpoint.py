"""Model files, and checkpoints from which a run resumes bit for bit.

model.safetensors   one tensor for each row of the parameter table, under the same name; the metadata hold the model's
                    shape and the sequence length it was trained at, so the file is self-contained
RUN/checkpoints/step-00000250/
    model.safetensors                    the same
    state-00000-of-00001.safetensors     AdamW moments and data position, one file per rank: see parts.py
    manifest.json                        everything else as JSON; sizes and checksums of the files; its own checksum

A checkpoint is written to a temporary folder, synced, then renamed, so it is complete if it exists. CRC-32 of each
4 MiB (every burst of up to 32 bits) and SHA-256 of the manifest detect later corruption, but not malice.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import LlmpyError, unreadable
from ..model.arena import Arena
from ..model.config import ModelConfig
from ..model.families import trained_table
from ..model.language_model import LanguageModel
from ..system import durable
from ..system.command import command
from ..system.thread_limit import few
from .folder import MODEL_FILE

KEY, FORMAT = "llmpy", 1  # of a model file's metadata
CHECKPOINT_FORMAT = 2  # of the manifest; 1 (llmpy 0.1.0) stored the state of a single process differently
MODEL, MANIFEST = MODEL_FILE, "manifest.json"
NAME = re.compile(r"step-(\d{8,})")
PIECE, READERS = 1 << 20, 4  # elements read at a time, and threads that read
DAMAGED = "damaged-"  # prefix of the names of corrupt checkpoints
TYPES = {"float32": "F32", "int32": "I32", "uint32": "U32", "int64": "I64"}
Pieces = list[np.ndarray]  # the contents of a file, concatenated
Entries = Sequence[tuple[str, tuple[int, ...], str]]  # name, shape and NumPy dtype of each tensor
BROKEN = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO}  # others (permission, stale handle) may be temporary


class Unavailable(LlmpyError):
    """A checkpoint that is not corrupt, but of a newer version or unreadable at present."""


@dataclass(frozen=True)
class Score:
    """A model's mean validation loss in nats, after which step, and on which batches."""

    step: int
    val_loss: float
    measured_on: str


@dataclass(frozen=True)
class Header:
    """The metadata of a model file. Positions from `trained_length` on are untrained."""

    config: ModelConfig
    trained_length: int
    score: Score | None = None


def save(path: Path, model: LanguageModel, trained_length: int) -> None:
    """Write the parameters to `path`. Raises LlmpyError if that fails; an existing file is kept."""
    write_model(path, model.config, trained_length, model.ops.to_host(model.trained.buffer))


def write_model(
    path: Path, config: ModelConfig, trained_length: int, params: np.ndarray, score: Score | None = None
) -> None:
    """Write a model file of `params`: float32, flat, in table order."""
    pieces = model_pieces(config, trained_length, params, score)
    durable.write_whole(path, lambda temporary: durable.write_stretches(temporary, pieces))


def model_pieces(config: ModelConfig, trained_length: int, params: np.ndarray, score: Score | None = None) -> Pieces:
    """Return a model file's contents: its header and the flat parameters."""
    # A single metadata entry in a fixed order: equal models give equal files.
    about = {"format": FORMAT, "config": config.record(), "trained_length": trained_length}
    about |= asdict(score) if score else {}
    entries = [(t.name, t.shape, "float32") for t in trained_table(config)]
    return [file_header(entries, {KEY: json.dumps(about)}), params]


def file_header(entries: Entries, metadata: Mapping[str, str] | None = None) -> np.ndarray:
    """Return a safetensors header, padded with blanks so that the tensors are page-aligned."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, shape, dtype in entries:
        end = offset + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": TYPES[dtype], "shape": shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % durable.PAGE)
    return np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)


def read_header(path: Path) -> Header:
    """Return a model file's header. Raises LlmpyError unless its tensors are the table's, in float32."""
    with opened(path) as file:
        metadata = file.metadata() or {}
        if KEY not in metadata:
            raise LlmpyError("model.not-llmpy", f"{path} is not an llmpy model", f"Train one with: {command('train')}")
        try:
            about = json.loads(metadata[KEY])
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']} instead of {FORMAT}")
            score = Score(*(about[field.name] for field in fields(Score))) if "val_loss" in about else None
            header = Header(ModelConfig.from_record(about["config"]), int(about["trained_length"]), score)
            if not 1 <= header.trained_length <= header.config.context:
                raise ValueError(f"trained length {header.trained_length}")
        except (KeyError, TypeError, ValueError, RecursionError, LlmpyError) as error:
            raise damaged(path, f"invalid header: {error}") from error
        expected = {t.name: ("F32", t.shape) for t in trained_table(header.config)}
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, no dict
        found = {name: (x.get_dtype(), tuple(x.get_shape())) for name, x in slices.items()}
        for name in sorted(expected.keys() | found.keys()):
            if found.get(name) != expected.get(name):
                raise damaged(path, f"{name} is {found.get(name)}, expected {expected.get(name)}")
        return header


def load_parameters(path: Path, params: Arena) -> None:
    """Read a file that `read_header` accepted into `params`, in its dtypes. Raises LlmpyError for NaN or infinity.

    Threads read directly into float32 buffers: the library would copy, and touching new memory dominates the time.
    """

    def read(piece: tuple[str, np.ndarray, int]) -> None:
        name, part, offset = piece
        numbers: Any = part if part.dtype == np.float32 else np.empty(part.size, np.float32)
        with path.open("rb") as file:
            file.seek(offset)
            if file.readinto(memoryview(numbers).cast("B")) != numbers.nbytes:
                raise damaged(path, f"{name} is truncated")
        check_finite(path, name, numbers)
        if numbers is not part:
            part[:] = numbers

    try:
        about, start = tensors_of(path)
        pieces = []
        for tensor, view in params.items():
            flat, begin = view.reshape(-1), start + about[tensor.name]["data_offsets"][0]
            pieces += [(tensor.name, flat[i : i + PIECE], begin + 4 * i) for i in range(0, flat.size, PIECE)]
        with ThreadPoolExecutor(READERS) as pool:
            list((map if few() else pool.map)(read, pieces))
    except OSError as error:
        raise damaged(path, str(error)) from error


def check_finite(path: Path, name: str, x: np.ndarray) -> None:
    """Raise LlmpyError if `x` holds NaN or infinity."""
    if not np.isfinite(x).all():
        raise LlmpyError("model.not-finite", f"{path}: {name} holds NaN or infinity", "Use another file")


def tensors_of(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a valid safetensors file, and the offset of its tensors."""
    with path.open("rb") as file:  # header length (uint64), header (JSON), tensors
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def being_made(folder: Path, step: int) -> Path:
    """Return the folder that holds a checkpoint until it is complete."""
    return folder / f".step-{step:08}.tmp"


def make_room_for(folder: Path, step: int) -> None:
    """Create an empty folder for the files of a checkpoint."""
    if folder.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a symbolic link")
    if not folder.exists():
        folder.mkdir()
        durable.sync_folder(folder.parent)
    durable.remove(being_made(folder, step))
    being_made(folder, step).mkdir()


def write_files(making: Path, files: Mapping[str, Pieces]) -> dict[str, dict[str, Any]]:
    """Write the files; return their manifest entries."""
    sizes = {name: durable.write_stretches(making / name, pieces) for name, pieces in files.items()}
    return {name: {"bytes": size, "crc32": sums} for name, (size, sums) in sizes.items()}


def commit(folder: Path, step: int, state: Mapping[str, Any], written: Mapping[str, Any]) -> Path:
    """Write the manifest and rename the folder: the checkpoint is complete. Returns its path."""
    final, making = folder / f"step-{step:08}", being_made(folder, step)
    text = _sealed({"format": CHECKPOINT_FORMAT, "step": step, **state, "files": written})
    durable.write_stretches(making / MANIFEST, [np.frombuffer(text, np.uint8)])
    durable.sync_folder(making)
    if final.exists():  # written before the run was resumed, and equivalent
        durable.remove(making)
    else:
        durable.replace(making, final)
    durable.sync_folder(folder)
    return final


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """Return the contents of manifest.json: the manifest and its checksum."""
    text = json.dumps(manifest)
    return f'{{"sha256": "{hashlib.sha256(text.encode()).hexdigest()}", "manifest": {text}}}\n'.encode()


def verify(checkpoint: Path) -> dict[str, Any]:
    """Return the manifest of a valid checkpoint. Raises LlmpyError if it is corrupt, or Unavailable."""
    try:
        text = (checkpoint / MANIFEST).read_bytes()
        manifest = json.loads(text)["manifest"]
        if _sealed(manifest) != text:
            raise ValueError("checksum mismatch")
        if (found := manifest["format"]) > CHECKPOINT_FORMAT:
            raise Unavailable(
                "checkpoint.newer-format",
                f"{checkpoint} has format {found}, newer than {CHECKPOINT_FORMAT}",
                "Upgrade llmpy",
            )
        for name in sorted({MODEL, *manifest["files"]}):
            about = manifest["files"][name]
            if wrong := durable.stretches_differ(checkpoint / name, about["bytes"], about["crc32"]):
                raise damaged(checkpoint / name, wrong)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(checkpoint / MANIFEST, str(error)) from error
    except OSError as error:
        why = f"{error.filename or checkpoint}: {error.strerror or error}"
        if error.errno in BROKEN:
            raise damaged(checkpoint, why) from error
        raise Unavailable("file.unreadable", f"cannot read {why}", "Fix that and try again") from error
    return dict(manifest)


def listed(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first."""
    paths = folder.iterdir() if folder.exists() else ()
    found = [(int(match[1]), path) for path in paths if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest(folder: Path, log: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """Return the latest valid checkpoint in `folder` and its manifest; None if there are none.

    Newer corrupt ones are logged and renamed. Raises LlmpyError if all are corrupt, and Unavailable.
    """
    found = listed(folder)
    for count, path in enumerate(found):
        try:
            manifest = verify(path)
        except Unavailable:
            raise
        except LlmpyError as error:
            log(f"warning: {error.message}")
            continue
        for bad in found[:count]:
            aside = bad.with_name(DAMAGED + bad.name)
            durable.remove(aside)
            durable.replace(bad, aside)
        if count:
            log(f"falling back to step {manifest['step']}; corrupt checkpoints are renamed {DAMAGED}…")
        return path, manifest
    if found:
        raise LlmpyError("checkpoint.corrupt", f"every checkpoint in {folder} is corrupt", "Restore one of them")
    return None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints (0: none)."""
    for path in listed(folder)[keep:] if keep else []:
        gone = path.with_name(f".{path.name}.tmp")  # renamed first, so that a partial one is not mistaken for one
        durable.replace(path, gone)
        durable.remove(gone)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises LlmpyError for anything the library rejects."""
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except FileNotFoundError:
        raise LlmpyError("model.missing", f"no model at {path}", f"Train one with: {command('train')}") from None
    except PermissionError as error:
        raise unreadable(path, error) from None
    except (OSError, SafetensorError) as error:
        raise damaged(path, str(error)) from error


def damaged(path: Path, why: str) -> LlmpyError:
    """Return the error to raise for a corrupt file."""
    return LlmpyError("file.corrupt", f"{path} is corrupt: {why}", "Restore or recreate it")
