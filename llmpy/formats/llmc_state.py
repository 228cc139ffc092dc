"""llm.c's checkpoints: `model_%08d.bin`, `state_%08d_%05d.bin` for each rank, and an empty `DONE_%08d` last.

state   256 int32: [0] 20240527  [1] 1  [2] ranks P  [3] rank  [4] master weights?  [5] shuffled?  [10] step
                   uint64 at byte 80: rng_state, 88: the same before the last update, 120: shard, 128: sample
        float32 m (n), v (n), and master weights (n) if [4];  n = all parameters, or 1/P of them under ZeRO-1
        if [5]:  uint64 count, int32 order of the shards;  uint64 count, int32 order of the samples;
                 MT19937 in 2520 bytes: uint64 seed, int32 left, uint32 next, uint32 state[624], 2 constants

Step s: after s updates. Under ZeRO-1 rank r holds the r-th part of every layer's tensor. Unlike in llm.c, a DONE
without its files is ignored, unused master weights do not shift the data after them, and the seed is written as 0.

Source: llm.c, `train_gpt2.cu` (save_state, load_state), `llmc/dataloader.h`, `llmc/rand.h`, `llmc/zero.cuh`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.loader import Loader, Position
from ..data.magic import STATE
from ..errors import LlmpyError, unreadable
from ..model.config import ModelConfig
from ..model.partition import pack
from ..rng import MTState
from ..run import checkpoint
from ..run.checkpoint import damaged
from ..run.folder import CHECKPOINTS, LLMC_DONE, MODEL_FILE
from ..run.parts import Moments, load_moments, position_for, read_parts
from ..system.durable import write_whole
from . import native
from .llmc import HEADER, ORDER, Place, read_at, read_header, read_model, write_model, wrong_size
from .source import DTYPES, Source, elements, shapes

MODEL_NAME, STATE_NAME = "model_{:08}.bin", "state_{:08}_{:05}.bin"  # of a step; of a step and a rank
MODEL_SEED = 13371337  # of llm.c's stochastic rounding, unused here: its initial value
TWISTER = np.dtype([("seed", "<u8"), ("left", "<i4"), ("next", "<u4"), ("state", "<u4", 624), ("matrix", "<u4", 2)])
MATRIX = (0, 0x9908B0DF)
KEY_WORDS = 624
STATE_HEADER = np.dtype(
    {
        "names": ["magic", "version", "ranks", "rank", "master", "shuffle", "step", "rng", "before", "shard", "sample"],
        "formats": ["<i4"] * 7 + ["<u8"] * 4,
        "offsets": [0, 4, 8, 12, 16, 20, 40, 80, 88, 120, 128],
        "itemsize": HEADER.itemsize,
    }
)


@dataclass(frozen=True)
class TrainingState:
    """The state, besides the weights, that resumes a run. Flat arrays, float32 (n,), follow the parameter table."""

    step: int  # updates made
    m: np.ndarray
    v: np.ndarray
    master: np.ndarray | None  # float32 weights; None: the model file's are the only ones
    shuffle: bool
    places: tuple[Position, ...]  # of each rank's loader; orders are ignored without shuffling


def of_run(run: Path) -> tuple[Source, TrainingState, dict[str, Any]]:
    """Return a run's latest checkpoint in llm.c's form, and its options. Raises LlmpyError if none is complete.

    Several ranks become one process with their combined batch size, also in the options: it reads the same tokens per
    step, shuffled as on the first rank. llm.c's files have no outlier detectors, clocks or options.
    """
    found = checkpoint.listed(run / CHECKPOINTS)
    if not found:
        raise LlmpyError("checkpoint.missing", f"no checkpoint in {run}", "Convert the model alone: --to llmc")
    manifest = checkpoint.verify(found[0])
    source = native.read_model(found[0] / MODEL_FILE)
    parts = read_parts(found[0], manifest)
    n = elements(source.config)
    m, v = np.empty((2, n), np.float32)
    load_moments(parts, [(0, n)], m, v)
    options = dict(manifest["options"])
    options["batch_size"] *= len(parts)
    master = np.concatenate([source.read(name).reshape(-1) for name in shapes(source.config)])
    shuffle = options["shuffle"] and not options["overfit"]
    place = position_for(parts, 0, 1, options["seed"])
    return source, TrainingState(manifest["step"], m, v, master, shuffle, (place,)), options


def restore(state: TrainingState, optimizer: Moments) -> None:
    """Restore the optimizer from `state`; the weights come from the checkpoint's source."""
    pack(optimizer.m, state.m, optimizer.owned)
    pack(optimizer.v, state.v, optimizer.owned)
    optimizer.updates = state.step


def restore_place(state: TrainingState, loader: Loader) -> None:
    """Restore the loader from `state`. Raises LlmpyError if data, -B, -T, ranks or shuffling differ."""
    if (len(state.places), state.shuffle) != (loader.ranks, loader.shuffle):
        what = f"the state is from {len(state.places)} ranks with shuffling {'on' if state.shuffle else 'off'}"
        hint = f"Use as many (now {loader.ranks}) and the same shuffling, or only the weights: --init"
        raise LlmpyError("resume.loader-mismatch", what, hint)
    place = state.places[loader.rank]
    if not state.shuffle:  # llm.c then stores no orders
        shard = loader.shards[min(place.shard, len(loader.shards) - 1)]
        order = np.arange((len(shard) - 1) // (loader.B * loader.T * loader.ranks), dtype=np.int32)
        place = replace(loader.position, shard=place.shard, sample=place.sample, sample_order=order)
    loader.position = place


def latest(folder: Path) -> int | None:
    """Return the largest step with DONE, model and first state, or None."""
    try:
        names = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise unreadable(folder, error) from error
    steps = {int(found[1]) for name in names if (found := LLMC_DONE.fullmatch(name))}
    return max((s for s in steps if {MODEL_NAME.format(s), STATE_NAME.format(s, 0)} <= names), default=None)


def read_checkpoint(folder: Path) -> tuple[Source, TrainingState]:
    """Open the latest checkpoint: its master weights if any, and all ranks' states. Raises LlmpyError if none."""
    step = latest(folder)
    if step is None:
        raise LlmpyError(
            "checkpoint.missing", f"no complete llm.c checkpoint in {folder}", "Use a folder with a DONE_ file"
        )
    model = read_model(folder / MODEL_NAME.format(step))
    state = read_state(folder / STATE_NAME.format(step, 0), model.config)
    if state.master is None:
        return model, state
    views = {name: state.master[where].reshape(shape) for name, where, shape, _ in _tensors(model.config)}
    what = f"checkpoint of llm.c at step {step}, master weights"
    return replace(model, what=what, dtype="float32", read=views.__getitem__), state


def write_checkpoint(folder: Path, source: Source, state: TrainingState, dtype: str = "float32") -> None:
    """Write the model, a state per rank, and DONE last, which makes the checkpoint valid."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / MODEL_NAME.format(state.step), source, dtype)
    for rank in range(len(state.places)):
        write_state(folder / STATE_NAME.format(state.step, rank), source.config, state, rank)
    write_whole(folder / f"DONE_{state.step:08d}", lambda temporary: temporary.touch())


def read_state(path: Path, config: ModelConfig) -> TrainingState:
    """Read the states of all ranks; `path` is rank 0's. Raises LlmpyError if the files do not match."""
    first = _RankFile(path, config)
    stem = path.name.removesuffix("00000.bin")
    files = [first, *(_RankFile(path.with_name(f"{stem}{r:05}.bin"), config) for r in range(1, first.ranks))]
    for rank, file in enumerate(files):
        if (file.rank, file.facts) != (rank, first.facts):
            raise damaged(file.path, "its ranks, rank, step or contents do not match the other ranks' files")
    arrays = np.empty((first.arrays, elements(config)), np.float32)
    for which, out in enumerate(arrays):
        for file in files[: first.parts]:
            file.copy(out, which)
    m, v, *master = arrays
    weights, places = master[0] if master else None, tuple(file.place for file in files)
    return TrainingState(first.step, m, v, weights, first.shuffle, places)


def write_state(path: Path, config: ModelConfig, state: TrainingState, rank: int = 0) -> None:
    """Write one rank's file atomically, with all of m, v and master weights."""
    place = state.places[rank]
    key, pos = place.rng
    header, twister = np.zeros((), STATE_HEADER), np.zeros((), TWISTER)
    header[()] = (
        STATE, 1, len(state.places), rank, state.master is not None, state.shuffle, state.step,
        MODEL_SEED, MODEL_SEED, place.shard, place.sample,
    )  # fmt: skip
    twister[()] = 0, KEY_WORDS + 1 - pos, pos, key, MATRIX

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(header.tobytes())
            for x in (state.m, state.v, state.master):
                for _, where, _, _ in _tensors(config) if x is not None else ():
                    x[where].astype("<f4", copy=False).tofile(file)  # type: ignore[index]
            if state.shuffle:
                for order in (place.shard_order, place.sample_order):
                    file.write(np.uint64(order.size).astype("<u8").tobytes() + order.astype("<i4").tobytes())
                file.write(twister.tobytes())

    write_whole(path, write)


class _RankFile:
    """One rank's file, its header, size and loader position checked; `copy` reads its arrays."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        header, self.size = read_header(path, STATE, "an llm.c optimizer state")
        _, version, ranks, rank, master, shuffle, step, _, _, shard, sample = header.view(STATE_HEADER)[0].item()
        if version != 1 or not {master, shuffle} <= {0, 1} or not 0 <= rank < ranks or step < 0:
            raise damaged(path, f"version {version}, rank {rank} of {ranks}, {step=}, {master=}, {shuffle=}")
        self.path, self.config, self.rank = path, config, rank
        self.ranks, self.arrays, self.shuffle, self.step = ranks, 2 + master, bool(shuffle), step
        n = elements(config)
        # only the file size shows whether ZeRO-1 split the arrays
        for self.parts in sorted({1, ranks}):
            start = HEADER.itemsize + 4 * (n // self.parts) * self.arrays
            divides = all(math.prod(s) // layers % self.parts == 0 for _, _, s, layers in _tensors(config))
            if divides and (place := self._place(start, shard, sample)) is not None:
                self.place = place
                self.facts = ranks, master, shuffle, step, self.parts  # equal in all files of a step
                return
        raise wrong_size(path, self.size, HEADER.itemsize + 4 * n * self.arrays, "m, v and weights alone")

    def copy(self, out: np.ndarray, which: int) -> None:
        """Copy array number `which` (m, v, master) into its part of `out` (n,), in the table's order."""
        at = HEADER.itemsize + 4 * (out.size // self.parts) * which
        for _, where, _, layers in _tensors(self.config):
            tensor = out[where].reshape(layers, self.parts, -1)
            place = Place(at, (layers, tensor.shape[2]), DTYPES["float32"])
            tensor[:, self.rank % self.parts] = read_at(self.path, place)
            at = place.end

    def _place(self, start: int, shard: int, sample: int) -> Position | None:
        """Return the loader's position stored at `start`, or None if the file size does not match."""
        empty = np.empty(0, np.int32)
        if not self.shuffle:
            rng = MTState(np.zeros(KEY_WORDS, np.uint32), KEY_WORDS)
            return Position(shard, sample, empty, empty, rng) if start == self.size else None
        orders = []
        for _ in range(2):
            if self.size < start + 8:
                return None
            count = int(read_at(self.path, Place(start, (1,), np.dtype("<u8")))[0])
            orders.append(Place(start + 8, (count,), np.dtype("<i4")))
            start = orders[-1].end
        if self.size != start + TWISTER.itemsize:
            return None
        _, left, _, key, _ = read_at(self.path, Place(start, (1,), TWISTER))[0]
        if not 1 <= left <= KEY_WORDS + 1:
            raise damaged(self.path, f"its random generator has {left} words left")
        rng = MTState(key.astype(np.uint32), KEY_WORDS + 1 - int(left))  # just seeded: left 1, next 0
        shards, samples = (read_at(self.path, order).astype(np.int32) for order in orders)
        return Position(shard, sample, shards, samples, rng)


def _tensors(config: ModelConfig) -> Iterator[tuple[str, slice, tuple[int, ...], int]]:
    """Yield name, slice of the flat arena, shape and layers of every tensor, in llm.c's order."""
    found, at = {}, 0
    for name, shape in shapes(config).items():
        layers = 1 if name in ("wte", "wpe", "ln_f_w", "ln_f_b") else shape[0]
        found[name] = name, slice(at, at + math.prod(shape)), shape, layers
        at += math.prod(shape)
    return (found[name] for name in ORDER)
