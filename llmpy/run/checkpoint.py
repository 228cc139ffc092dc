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
from dataclasses import asdict, dataclass
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
HEADER_AT_MOST = 1 << 22  # bytes; of GPT-2 XL by Hugging Face 70,000
NAME = re.compile(r"step-(\d{8,})")
PIECE, READERS = 1 << 20, 4  # elements of a model that are read at a time, on how many threads
DAMAGED = "damaged-"  # what the name of a checkpoint begins with that was found to be so
TYPES = {"float32": "F32", "int32": "I32", "uint32": "U32", "int64": "I64"}
Pieces = list[np.ndarray]  # the bytes of a file, one after another
Entries = Sequence[tuple[str, tuple[int, ...], str]]  # name, shape and NumPy type of each tensor


# Of reading: what says that a file or its disk is not sound. Others (permission, a stale handle) may pass.
BROKEN = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO}


class Newer(LlmpyError):
    """A checkpoint that is whole, but not for this program."""


class Unreadable(LlmpyError):
    """A checkpoint that the system does not give us now; nothing is known of it."""


@dataclass(frozen=True)
class Header:
    """What a model file says of itself. `trained_length` is the T beyond which positions are untrained."""

    config: ModelConfig
    trained_length: int


@dataclass(frozen=True)
class Score:
    """How good the model after a step was on the validation text: the mean loss in nats, and of which part of it."""

    step: int
    val_loss: float
    measured_on: str


def save(path: Path, model: GPT2, trained_length: int) -> None:
    """Write the parameters to `path`. Raises LlmpyError if that fails; what was there stays."""
    write_model(path, model.config, trained_length, model.ops.to_host(model.params.buffer))


def write_model(
    path: Path, config: ModelConfig, trained_length: int, params: np.ndarray, score: Score | None = None
) -> None:
    """`save` for parameters that are in no model: float32, flat, in the order of the table."""
    pieces = model_pieces(config, trained_length, params, score)
    durable.write_whole(path, lambda temporary: durable.write_stretches(temporary, pieces))


def read_score(path: Path) -> Score | None:
    """What a model file says of how good its model is. Raises LlmpyError for a file that is missing or damaged."""
    read_header(path)
    with opened(path) as file:
        about = json.loads(file.metadata()[KEY])
    try:
        return Score(int(about["step"]), float(about["val_loss"]), str(about["measured_on"]))
    except (KeyError, TypeError, ValueError):
        return None


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
    """The header of a model file, checked against the table: names, shapes, float32.

    Raises LlmpyError for a file that is missing, damaged or not ours.
    """
    with opened(path) as file:
        metadata = file.metadata() or {}
        if KEY not in metadata:
            raise LlmpyError(f"{path} is not a model of llmpy", f"train one with: {command('train')}")
        try:
            about = json.loads(metadata[KEY])
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']}, this program reads {FORMAT}")
            header = Header(ModelConfig(**about["config"]), int(about["trained_length"]))
        except (KeyError, TypeError, ValueError, RecursionError, LlmpyError) as fault:
            raise _damaged(path, f"its header cannot be read: {fault}") from fault
        if not 1 <= header.trained_length <= header.config.context:
            raise _damaged(path, f"trained length {header.trained_length}")
        _check_tensors(path, file, {t.name: t.shape for t in params_table(header.config)})
        return header


def _check_tensors(path: Path, file: Any, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise LlmpyError unless the open file holds exactly these tensors, in float32."""
    if set(file.keys()) != set(expected):
        raise _damaged(path, f"tensors {sorted(set(file.keys()) ^ set(expected))} are missing or unknown")
    for name, shape in expected.items():
        found = file.get_slice(name)
        if tuple(found.get_shape()) != shape or found.get_dtype() != "F32":
            is_there = f"{found.get_dtype()} {tuple(found.get_shape())}"
            raise _damaged(path, f"{name} is {is_there}, expected F32 {shape}")


def load_parameters(path: Path, params: Arena, look: Callable[[str, np.ndarray], None] | None = None) -> None:
    """Read the file's tensors into `params`, in its types. `read_header` must have accepted the file.

    By pieces on several threads, straight into place where the type is float32: the library would make a copy of each
    tensor, and what takes the time is memory that is touched for the first time. A piece (n,) float32 is shown to
    `look`, with its tensor's name, while it is in cache.
    A safetensors file is the length of its header (uint64), the header (JSON), the tensors.
    """

    def read(piece: tuple[str, np.ndarray, int]) -> None:
        name, part, offset = piece
        numbers: Any = part if part.dtype == np.float32 else np.empty(part.size, np.float32)
        with path.open("rb") as file:
            file.seek(offset)
            if file.readinto(memoryview(numbers).cast("B")) != numbers.nbytes:
                raise _damaged(path, f"{name} is cut off")
        if look is not None:
            look(name, numbers)
        if numbers is not part:
            part[:] = numbers

    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            about = json.loads(file.read(length))
        pieces = []
        for tensor, view in params.items():
            flat, begin = view.reshape(-1), 8 + length + about[tensor.name]["data_offsets"][0]
            pieces += [(tensor.name, flat[i : i + PIECE], begin + 4 * i) for i in range(0, flat.size, PIECE)]
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(read, pieces))
    except OSError as fault:
        raise _damaged(path, str(fault)) from fault


def named(folder: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return folder / f"step-{step:08}"


def being_made(folder: Path, step: int) -> Path:
    """The same until it is whole."""
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
    final, making = named(folder, step), being_made(folder, step)
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
    """The manifest of a checkpoint all of whose bytes are those that were written.

    Raises LlmpyError, which says what is not; Newer, if this program is too old for it; Unreadable.
    """
    try:
        text = (checkpoint / MANIFEST).read_bytes()
        try:
            manifest = json.loads(text)["manifest"]
            sound = _sealed(manifest) == text
        except (ValueError, KeyError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise _damaged(checkpoint / MANIFEST, "its checksum differs")
        if (found := manifest["format"]) > CHECKPOINT_FORMAT:
            raise Newer(f"{checkpoint} has format {found}, this program reads {CHECKPOINT_FORMAT}", "use a newer llmpy")
        for name in sorted({MODEL, *manifest["files"]}):
            about = manifest["files"][name]
            if wrong := durable.stretches_differ(checkpoint / name, about["bytes"], about["crc32"]):
                raise _damaged(checkpoint / name, wrong)
    except OSError as fault:
        if fault.errno not in BROKEN:
            raise Unreadable(
                f"cannot read {fault.filename or checkpoint}: {fault.strerror or fault}",
                "mend that and try again; nothing was changed",
            ) from fault
        raise _damaged(checkpoint, f"{fault.strerror or fault}") from fault
    return dict(manifest)


def listed(folder: Path) -> list[Path]:
    """The checkpoints below a folder, by their names, newest first."""
    try:
        found = [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    except FileNotFoundError:
        return []
    return [path for _, path in sorted(found, reverse=True)]


def newest(folder: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest sound checkpoint below `folder` and its manifest; None if there never was one.

    Newer ones that are damaged are named and put aside. Raises LlmpyError if all are damaged, or
    if the newest is of a newer program or cannot be read, which is no damage.
    """
    damaged = []
    for path in listed(folder):
        try:
            manifest = verify(path)
        except (Newer, Unreadable):
            raise
        except LlmpyError as fault:
            say(f"warning: {str(fault).partition(' — ')[0]}")
            damaged.append(path)
            continue
        for bad in damaged:
            aside = bad.with_name(DAMAGED + bad.name)
            durable.remove(aside)
            durable.replace(bad, aside)
        if damaged:
            say(f"going back to step {manifest['step']}; what is damaged was renamed to {DAMAGED}…")
        return path, manifest
    if damaged:
        raise LlmpyError(f"every checkpoint in {folder} is damaged", "restore one of them, or train anew")
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
        _check_header(path)
        with safe_open(path, framework="numpy") as file:
            yield file
    except FileNotFoundError:
        raise LlmpyError(f"no model at {path}", f"train one with: {command('train')}") from None
    except PermissionError:
        raise LlmpyError(f"cannot read {path}: Permission denied", "check its permissions") from None
    except (OSError, SafetensorError) as fault:
        raise _damaged(path, str(fault)) from fault


def _check_header(path: Path) -> None:
    """Raise LlmpyError for a header that the library would spend more memory on than a model's is worth."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > HEADER_AT_MOST:
        raise _damaged(path, f"a header of {length:,} bytes")


def _damaged(path: Path, why: str) -> LlmpyError:
    return LlmpyError(f"{path} is damaged or no model: {why}", "train again, or restore the file")
