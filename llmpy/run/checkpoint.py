"""A model on disk, and a checkpoint: all that a run needs to resume bit for bit.

model.safetensors   a tensor for each row of the table of parameters, under the same name; the metadata carry the
                    model's shape and the sequence length it was trained at, so the file needs no companion
RUN/checkpoints/step-00000250/
    model.safetensors                    the same
    state-00000-of-00001.safetensors     moments of AdamW and position in the data, a file for each rank: see parts.py
    manifest.json                        all else as JSON; size and checksums of the files; a checksum of itself

A checkpoint is made in a folder of another name, synced, and then renamed: where there is one, it is whole. What a disk
does to it later the checksums find. They are CRC-32 of each 4 MiB, which no flip of up to 32 neighbouring bits escapes,
and SHA-256 of the manifest. They guard against accidents, not against malice.
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

from ..errors import LlmpyError
from ..model.arena import Arena
from ..model.config import ModelConfig
from ..model.gpt2 import GPT2, params_table
from ..system import durable
from ..system.command import command
from .folder import MODEL_FILE

KEY, FORMAT = "llmpy", 1  # of a model file's metadata
CHECKPOINT_FORMAT = 2  # of the manifest; 1, of 0.1.0, had one file of another layout where one process ran
MODEL, MANIFEST = MODEL_FILE, "manifest.json"
NAME = re.compile(r"step-(\d{8,})")
PIECE, READERS = 1 << 20, 4  # elements of a model that are read at a time, on how many threads
DAMAGED = "damaged-"  # what the name of a checkpoint begins with that was found to be so
TYPES = {"float32": "F32", "int32": "I32", "uint32": "U32", "int64": "I64"}
Pieces = list[np.ndarray]  # the bytes of a file, one after another
Entries = Sequence[tuple[str, tuple[int, ...], str]]  # name, shape and NumPy type of each tensor

# Of reading: what says that a file or its disk is not sound. Others (permission, a stale handle) may pass.
BROKEN = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO}


class NotNow(LlmpyError):
    """A checkpoint of a newer program, or one that cannot be read at present: it is not damaged."""


@dataclass(frozen=True)
class Score:
    """How good the model after a step was on the validation text: the mean loss in nats, and of which part of it."""

    step: int
    val_loss: float
    measured_on: str


@dataclass(frozen=True)
class Header:
    """What a model file says of itself. `trained_length` is the T beyond which positions are untrained."""

    config: ModelConfig
    trained_length: int
    score: Score | None = None


def save(path: Path, model: GPT2, trained_length: int) -> None:
    """Write the parameters to `path`. Raises LlmpyError if that fails; what was there stays."""
    write_model(path, model.config, trained_length, model.ops.to_host(model.params.buffer))


def write_model(
    path: Path, config: ModelConfig, trained_length: int, params: np.ndarray, score: Score | None = None
) -> None:
    """`save` for parameters that are in no model: float32, flat, in the order of the table."""
    pieces = model_pieces(config, trained_length, params, score)
    durable.write_whole(path, lambda temporary: durable.write_stretches(temporary, pieces))


def model_pieces(config: ModelConfig, trained_length: int, params: np.ndarray, score: Score | None = None) -> Pieces:
    """The model file: its header and the flat buffer of the parameters, which has the order of the table."""
    # One entry of metadata and a fixed order: equal models make equal files.
    about = {"format": FORMAT, "config": asdict(config), "trained_length": trained_length}
    about |= asdict(score) if score else {}
    return [file_header([(t.name, t.shape, "float32") for t in params_table(config)], {KEY: json.dumps(about)}), params]


def file_header(entries: Entries, metadata: Mapping[str, str] | None = None) -> np.ndarray:
    """How a safetensors file begins; blanks fill it up to a whole page, so that the tensors begin on one."""
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
    """Read a model file's header and check its tensors: the table's, float32. Raises LlmpyError for any other file."""
    with opened(path) as file:
        metadata = file.metadata() or {}
        if KEY not in metadata:
            raise LlmpyError("run.x", f"{path} is not a model of llmpy", f"Train one with: {command('train')}")
        try:
            about = json.loads(metadata[KEY])
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']}, this program reads {FORMAT}")
            score = Score(*(about[field.name] for field in fields(Score))) if "val_loss" in about else None
            header = Header(ModelConfig(**about["config"]), int(about["trained_length"]), score)
            if not 1 <= header.trained_length <= header.config.context:
                raise ValueError(f"trained length {header.trained_length}")
        except (KeyError, TypeError, ValueError, RecursionError, LlmpyError) as error:
            raise damaged(path, f"its header cannot be read: {error}") from error
        expected = {t.name: ("F32", t.shape) for t in params_table(header.config)}
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, no dict
        found = {name: (x.get_dtype(), tuple(x.get_shape())) for name, x in slices.items()}
        for name in sorted(expected.keys() | found.keys()):
            if found.get(name) != expected.get(name):
                raise damaged(path, f"{name} is {found.get(name)}, expected {expected.get(name)}")
        return header


def load_parameters(path: Path, params: Arena) -> None:
    """Read the file's tensors into `params`, in its types. `read_header` must have accepted the file.

    By pieces on several threads, straight into place where the type is float32: the library would copy each tensor, and
    touching new memory is what takes the time. Raises LlmpyError for numbers that are not finite.
    """

    def read(piece: tuple[str, np.ndarray, int]) -> None:
        name, part, offset = piece
        numbers: Any = part if part.dtype == np.float32 else np.empty(part.size, np.float32)
        with path.open("rb") as file:
            file.seek(offset)
            if file.readinto(memoryview(numbers).cast("B")) != numbers.nbytes:
                raise damaged(path, f"{name} is cut off")
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
            list(pool.map(read, pieces))
    except OSError as error:
        raise damaged(path, str(error)) from error


def check_finite(path: Path, name: str, x: np.ndarray) -> None:
    """Raise LlmpyError for numbers that are not finite: nothing comes of them."""
    if not np.isfinite(x).all():
        what = f"{path}: {name} holds numbers that are not finite"
        raise LlmpyError("run.x", what, "Its training went wrong: use another file")


def tensors_of(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a sound safetensors file, and where its tensors start."""
    with path.open("rb") as file:  # the length of the header (uint64), the header (JSON), the tensors
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def being_made(folder: Path, step: int) -> Path:
    """Return the folder of a checkpoint until it is whole."""
    return folder / f".step-{step:08}.tmp"


def make_room_for(folder: Path, step: int) -> None:
    """An empty folder to write the files of a checkpoint into."""
    if not folder.exists():
        folder.mkdir()
        durable.sync_folder(folder.parent)
    durable.remove(being_made(folder, step))
    being_made(folder, step).mkdir()


def write_files(making: Path, files: Mapping[str, Pieces]) -> dict[str, dict[str, Any]]:
    """Write them; what the manifest says of each."""
    sizes = {name: durable.write_stretches(making / name, pieces) for name, pieces in files.items()}
    return {name: {"bytes": size, "crc32": sums} for name, (size, sums) in sizes.items()}


def commit(folder: Path, step: int, state: Mapping[str, Any], written: Mapping[str, Any]) -> Path:
    """All files are written: the manifest, and the name that says so."""
    final, making = folder / f"step-{step:08}", being_made(folder, step)
    text = _sealed({"format": CHECKPOINT_FORMAT, "step": step, **state, "files": written})
    durable.write_stretches(making / MANIFEST, [np.frombuffer(text, np.uint8)])
    durable.sync_folder(making)
    if final.exists():  # of an earlier life of the run, and equal in all that counts
        durable.remove(making)
    else:
        durable.replace(making, final)
    durable.sync_folder(folder)
    return final


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """The manifest with its checksum, as the file has it."""
    text = json.dumps(manifest)
    return f'{{"sha256": "{hashlib.sha256(text.encode()).hexdigest()}", "manifest": {text}}}\n'.encode()


def verify(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a sound checkpoint. Raises LlmpyError, which says what is damaged, or NotNow."""
    try:
        text = (checkpoint / MANIFEST).read_bytes()
        manifest = json.loads(text)["manifest"]
        if _sealed(manifest) != text:
            raise ValueError("its checksum differs")
        if (found := manifest["format"]) > CHECKPOINT_FORMAT:
            what = f"{checkpoint} has format {found}, this program reads {CHECKPOINT_FORMAT}"
            raise NotNow("run.x", what, "Use a newer llmpy")
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
        raise NotNow("run.x", f"cannot read {why}", "Mend that and try again") from error
    return dict(manifest)


def listed(folder: Path) -> list[Path]:
    """The checkpoints below a folder, by their names, newest first."""
    paths = folder.iterdir() if folder.exists() else ()
    found = [(int(match[1]), path) for path in paths if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest(folder: Path, log: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest sound checkpoint below `folder` and its manifest; None if there never was one.

    Newer ones that are damaged are named and put aside. Raises LlmpyError if all are damaged, and NotNow.
    """
    found = listed(folder)
    for count, path in enumerate(found):
        try:
            manifest = verify(path)
        except NotNow:
            raise
        except LlmpyError as error:
            log(f"warning: {error.message}")
            continue
        for bad in found[:count]:
            aside = bad.with_name(DAMAGED + bad.name)
            durable.remove(aside)
            durable.replace(bad, aside)
        if count:
            log(f"going back to step {manifest['step']}; what is damaged was renamed to {DAMAGED}…")
        return path, manifest
    if found:
        raise LlmpyError("run.x", f"every checkpoint in {folder} is damaged", "Restore one of them, or train anew")
    return None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints (0: none)."""
    for path in listed(folder)[keep:] if keep else []:
        gone = path.with_name(f".{path.name}.tmp")  # renamed first: half of one must not look like one
        durable.replace(path, gone)
        durable.remove(gone)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An open safetensors file; whatever the library finds wrong becomes a LlmpyError."""
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except FileNotFoundError:
        raise LlmpyError("run.x", f"no model at {path}", f"Train one with: {command('train')}") from None
    except PermissionError:
        raise LlmpyError("run.x", f"cannot read {path}: Permission denied", "Check its permissions") from None
    except (OSError, SafetensorError) as error:
        raise damaged(path, str(error)) from error


def damaged(path: Path, why: str) -> LlmpyError:
    """Return what to raise for a file that is not what it claims to be."""
    return LlmpyError("run.x", f"{path} is damaged: {why}", "Restore the file, or make it again")
