"""Memory and disk space of a run, from its tables of tensors.

memory = wide · 4 · parameters: weights, gradients, m and v; 3 more for background checkpoints
         N ranks: wide · (2 + 4/N) · parameters, including master weights and reduced gradients; rank 0 needs
         (1 + 2/N) more for checkpoints; three buckets for communication; in mixed precision only stored matrices,
         and wide/N · parameters for those sent (distributed/zero.py)
         + activations of training (minus recomputed ones, plus their scratch), activations and cache of sampling,
           and activations of HellaSwag: each tensor wide or stored, by its table
         + stored · (a copy of the matrices, in mixed precision, + the chunk of logits)
         + the program, and the compiler if kernels are not cached
         bytes per element: wide 4; stored 4, or 2 in mixed precision
disk   = wide · 3 · parameters for each kept checkpoint and the one being written; wide · 2 · parameters for the best
         model
"""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ..backend import Ops
from ..backend.machine import Machine
from ..data.hellaswag import ENDINGS, read_examples
from ..errors import LlmpyError
from ..generate.kv_cache import cache_table, prefill_table
from ..model.arena import Tensor, memory
from ..model.config import ModelConfig
from ..model.families import activations_table, adapter_room, params_table, trained_table
from ..model.language_model import RECOMPUTE
from ..model.partition import most_kept
from ..options.train import BUILTIN_PROMPT, TrainOptions
from ..run.folder import BEST_FILE, CHECKPOINTS, MODEL_FILE
from ..system.words import gigabytes
from .multiple_choice import row_length

PROGRAM_BYTES = 172 << 20  # Python, NumPy, Numba with kernels from the cache
COMPILER_BYTES = 240 << 20  # added, and kept, by compiling all of them (dev/LOG.md)
LOGITS_ROWS = 512  # rows of logits that the classifier holds at a time


def check_memory(options: TrainOptions, config: ModelConfig, machine: Machine, available: int) -> None:
    """Raise LlmpyError if a rank of the run needs more memory than `available` bytes."""
    o = options
    needed = memory_of(options, config, machine)
    if needed > available:
        copied = o.checkpoint_every > 0 and o.ranks == 1
        smaller = "a smaller -B, -T or --model" if o.init is None else "a smaller -B or -T, or a smaller model"
        smaller = f"--lora 16, {smaller}" if o.init is not None and config.lora is None else smaller
        copy = "; --checkpoint-every 0 saves the copy for background checkpoints" if copied else ""
        raise LlmpyError(
            "memory.insufficient",
            f"{o.init or o.model} with -B {o.batch_size} -T {o.sequence_length} needs about {gigabytes(needed)} of "
            f"memory, but only {gigabytes(available)} are available",
            f"Use {smaller}, or close other programs{copy}",
        )


def check_disk(options: TrainOptions, config: ModelConfig, folder: Path) -> None:
    """Raise LlmpyError if the run's checkpoints do not fit on the disk.

    Earlier files of a resumed run count as free space: its checkpoints and best model are part of what is needed, and
    its model is a link to a checkpoint's or is replaced by one.
    """
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    files = [*folder.glob(f"{CHECKPOINTS}/step-*/*"), *folder.glob(MODEL_FILE), *folder.glob(BEST_FILE)]
    own = {stat.st_ino: stat.st_size for stat in map(Path.stat, files)}  # each hard link once
    free = shutil.disk_usage(there).free + sum(own.values())
    needed = disk_needed(options, config)
    if needed > free:
        what = (
            f"checkpoints need up to {gigabytes(needed)} on the disk of {folder}, but only {gigabytes(free)} are free"
        )
        fix = "Free some space, or use another --out, a smaller --keep or a larger --checkpoint-every"
        raise LlmpyError("disk.insufficient", what, fix)


def disk_needed(options: TrainOptions, config: ModelConfig) -> int:
    """Return the maximum bytes of a run's checkpoints, including the one being written."""
    o, every = options, options.checkpoint_every
    count = 1 if not every else o.keep + 1 if o.keep else max(0, o.steps or 0) // every + 1
    return (count * 12 + 8) * sum(t.size for t in trained_table(config))


def memory_of(options: TrainOptions, config: ModelConfig, machine: Machine) -> int:
    """Return the bytes that each rank needs, program included. Raises LlmpyError for an invalid HellaSwag file."""
    o = options
    prompt = len((o.prompt or BUILTIN_PROMPT).encode(errors="replace"))  # a byte is at most a token
    sampled = prompt + o.sample_tokens
    apart = []
    if o.hellaswag is not None:
        rows = ENDINGS, min(_row_length(o.hellaswag), config.context)
        apart = [rows] if rows != (o.batch_size, o.sequence_length) else []
    shape, copied = (o.batch_size, o.sequence_length), o.checkpoint_every > 0
    parts = memory_parts(config, *shape, machine, o.recompute, copied, sampled, apart, o.ranks)
    return sum(parts.values()) + (0 if machine.compiled(config.kinds) else COMPILER_BYTES)


@functools.cache
def _row_length(path: Path) -> int:
    """Return the row length of a HellaSwag file. Cached: reading takes a third of a second, three times per run."""
    return row_length(read_examples(path, 1 << 16))


def memory_parts(
    config: ModelConfig, B: int, T: int, machine: Ops, recompute: int = RECOMPUTE,
    copied: bool = False, sampled: int | None = None, apart: Sequence[tuple[int, int]] = (), ranks: int = 1,
) -> dict[str, int]:  # fmt: skip
    """Return the bytes of training `config` on batches of (B, T), by purpose; of several `ranks`, those of rank 0.

    `recompute`: see `activations_table`. `copied`: include the copy for background checkpoints. `sampled`: tokens of a
    sample and its prompt, by default T. `apart`: shapes of other evaluations.
    """
    S = min(T, sampled or T)
    wide, stored = machine.wide.itemsize, machine.dtype.itemsize
    mixed = stored != wide

    def size(table: list[Tensor]) -> int:
        return memory(table, stored, wide)

    table = trained_table(config)
    parameters, matrices = wide * sum(t.size for t in table), sum(t.size for t in table if t.decay)
    frozen = params_table(config) if config.lora is not None else []
    if ranks == 1:
        state = {"moments": 2 * parameters, "copy for checkpoints": 3 * parameters if copied else 0}
    else:
        kept, part = (wide * elements for elements in most_kept(table, config.layers, ranks))
        own, _ = most_kept(table, config.layers, ranks)
        state = {
            "moments": 2 * kept,
            "master weights": kept,
            "reduced gradients": kept,
            "messages": 3 * ranks * part + (kept if mixed else 0),
            "copy for checkpoints": parameters + (2 * wide * own if copied else 0),  # weights are always gathered
        }
    most = max(b * t for b, t in [(B, T), *apart])
    rows = min(LOGITS_ROWS, most)
    return {
        # with several ranks the master weights replace the wide matrices, whose memory is freed (`release`)
        "weights": parameters - (wide * matrices if mixed and ranks > 1 and sys.platform == "linux" else 0),
        "weights for products": stored * matrices if mixed else 0,
        "frozen weights": sum((stored if t.decay else wide) * t.size for t in frozen),
        "adapters' scratch": stored * adapter_room(config, most),
        "rope tables": 4 * config.rope_elements(max(t for _, t in [(B, T), *apart])),
        "gradients": parameters,
        **state,
        "activations": size(activations_table(config, B, T, True, recompute, mixed)),
        "logits chunk": stored * rows * config.padded_vocab_size,
        "samples": size(prefill_table(config, S)) + size(cache_table(config, 1, S)),
        "evaluation apart": sum(size(activations_table(config, *shape, False)) for shape in apart),
        "program": PROGRAM_BYTES,
    }
