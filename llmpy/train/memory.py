"""What a run takes: memory and disk, by the tables of its tensors.

memory = wide · 4 · parameters: they, their gradients, m and v; 3 more with checkpoints in the background
         of N ranks: wide · (2 + 4/N) · parameters: also master weights and reduced gradients; (1 + 2/N) more for
         checkpoints, of the first; three buffers of a bucket; in mixed precision no matrices but the stored ones,
         and wide/N · parameters for those that travel (distributed/zero.py)
         + activations of training (without what backward computes again, with what it needs besides), activations and
           cache of sampling, and activations of HellaSwag: each tensor wide or stored, as its table says
         + stored · (the matrices once more, in mixed precision, + the chunk of logits)
         + the program itself, and what the compiler leaves where kernels have to be compiled first
         with the bytes of an element: wide 4; stored 4 too, or 2 in mixed precision
disk   = wide · 3 · parameters for each checkpoint that is kept, and one more that is being written;
         wide · 2 · parameters for the best model
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
from ..model.gpt2 import RECOMPUTE, activations_table, params_table
from ..model.partition import most_kept
from ..options.train import BUILTIN_PROMPT, TrainOptions
from ..run.folder import BEST_FILE, CHECKPOINTS, MODEL_FILE
from ..system.words import gigabytes
from .multiple_choice import row_length

PROGRAM_BYTES = 172 << 20  # Python, NumPy, Numba with kernels from the cache
COMPILER_BYTES = 240 << 20  # what compiling all of them adds, and keeps (dev/LOG.md)
LOGITS_ROWS = 512  # rows of logits that exist at a time in the classifier


def check_memory(options: TrainOptions, config: ModelConfig, machine: Machine, available: int) -> None:
    """Raise LlmpyError if a rank of the run needs more memory than `available` bytes."""
    o = options
    needed = memory_of(options, config, machine)
    if needed > available:
        copied = o.checkpoint_every > 0 and o.ranks == 1
        copy = "; --checkpoint-every 0 saves the copy that checkpoints are made from" if copied else ""
        raise LlmpyError(
            "train.x",
            f"{o.model} with -B {o.batch_size} -T {o.sequence_length} needs about {gigabytes(needed)} of memory, and "
            f"{gigabytes(available)} are available",
            f"Use a smaller -B, -T or --model, or close other programs{copy}",
        )


def check_disk(options: TrainOptions, config: ModelConfig, folder: Path) -> None:
    """Raise LlmpyError if the checkpoints of the run will not fit beside what is on the disk.

    What an earlier life of the run left counts as free: its checkpoints and best model are among those that are needed,
    its model is either a checkpoint's or gives way to one.
    """
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    files = [*folder.glob(f"{CHECKPOINTS}/step-*/*"), *folder.glob(MODEL_FILE), *folder.glob(BEST_FILE)]
    left = {about.st_ino: about.st_size for about in map(Path.stat, files)}  # a file may have two names
    free = shutil.disk_usage(there).free + sum(left.values())
    needed = disk_needed(options, config)
    if needed > free:
        raise LlmpyError(
            "train.x",
            f"the checkpoints of this run need up to {gigabytes(needed)} on the disk of {folder}, and "
            f"{gigabytes(free)} are free",
            "Make room, choose another --out, a smaller --keep, or a larger --checkpoint-every",
        )


def disk_needed(options: TrainOptions, config: ModelConfig) -> int:
    """Bytes that the checkpoints of a run take at most, with the one that is being written."""
    o, every = options, options.checkpoint_every
    count = 1 if not every else o.keep + 1 if o.keep else max(0, o.steps or 0) // every + 1
    return (count * 12 + 8) * sum(t.size for t in params_table(config))


def memory_of(options: TrainOptions, config: ModelConfig, machine: Machine) -> int:
    """Bytes that each rank of a run takes, program included. Raises LlmpyError if its file of HellaSwag is none."""
    o = options
    prompt = len((o.prompt or BUILTIN_PROMPT).encode(errors="replace"))  # a byte is at most a token
    sampled = prompt + o.sample_tokens
    apart = []
    if o.hellaswag is not None:
        rows = ENDINGS, min(_row_length(o.hellaswag), config.context)
        apart = [rows] if rows != (o.batch_size, o.sequence_length) else []
    shape, copied = (o.batch_size, o.sequence_length), o.checkpoint_every > 0
    parts = memory_parts(config, *shape, machine, o.recompute, copied, sampled, apart, o.ranks)
    return sum(parts.values()) + (0 if machine.compiled() else COMPILER_BYTES)


@functools.cache
def _row_length(path: Path) -> int:
    """Of a file of HellaSwag; its ten thousand examples take a third of a second, and memory is asked for thrice."""
    return row_length(read_examples(path, 1 << 16))


def memory_parts(
    config: ModelConfig, B: int, T: int, machine: Ops, recompute: int = RECOMPUTE,
    copied: bool = False, sampled: int | None = None, apart: Sequence[tuple[int, int]] = (), ranks: int = 1,
) -> dict[str, int]:  # fmt: skip
    """Bytes of everything that training `config` on batches of (B, T) holds, by what it is for.

    `recompute`: see `activations_table`. `copied`: with the copy that checkpoints in the background are made from.
    `sampled`: tokens of a sample and its prompt, by default as many as samples can reach, T. `apart`: other
    shapes that are evaluated. Of several `ranks`: what the first one holds, which has most.
    """
    S = min(T, sampled or T)
    wide, stored = machine.wide.itemsize, machine.dtype.itemsize
    mixed = stored != wide

    def size(table: list[Tensor]) -> int:
        return memory(table, stored, wide)

    table = params_table(config)
    parameters, matrices = wide * sum(t.size for t in table), sum(t.size for t in table if t.decay)
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
            "copy for checkpoints": parameters + (2 * wide * own if copied else 0),  # weights are gathered in any case
        }
    rows = min(LOGITS_ROWS, max(b * t for b, t in [(B, T), *apart]))
    return {
        # of several ranks the master weights take the place of the wide matrices, whose memory goes back (`release`)
        "weights": parameters - (wide * matrices if mixed and ranks > 1 and sys.platform == "linux" else 0),
        "weights for products": stored * matrices if mixed else 0,
        "gradients": parameters,
        **state,
        "activations": size(activations_table(config, B, T, True, recompute, mixed)),
        "logits chunk": stored * rows * config.padded_vocab_size,
        "samples": size(prefill_table(config, S)) + size(cache_table(config, 1, S)),
        "evaluation apart": sum(size(activations_table(config, *shape, False)) for shape in apart),
        "program": PROGRAM_BYTES,
    }
