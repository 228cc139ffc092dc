"""Before training: what will run, what it needs, how long it will take; and one refusal that names all that is wrong.

memory = wide · 4 · parameters: they, their gradients, m and v; 3 more with checkpoints in the background
         of N ranks: wide · (2 + 4/N) · parameters: also master weights and reduced gradients; (1 + 2/N) more for
         checkpoints, of the first; three buffers of a bucket; in mixed precision no matrices but the stored ones,
         and wide/N · parameters for those that travel (distributed/zero.py, distributed/shards.py)
         + activations of training (without what backward computes again, with what it needs besides), activations and
           cache of sampling, and activations of HellaSwag: each tensor wide or stored, as its table says
         + stored · (the matrices once more, in mixed precision, + the chunk of logits)
         + the program itself, and what the compiler leaves where kernels have to be compiled first
         with the bytes of an element: wide 4; stored 4 too, or 2 in mixed precision
disk   = wide · 3 · parameters for each checkpoint that is kept, and one more that is being written;
         wide · 2 · parameters for the best model
time   = FLOPs a token · tokens / (0.6 · measured peak)
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import psutil

from ..backend import Ops, cores
from ..data.hellaswag import ENDINGS, read_examples
from ..data.pack import is_dataset
from ..data.prepare import choose_vocab_size
from ..data.shards import count_tokens, is_shard
from ..data.text import Found, find_files
from ..distributed.zero import most_kept
from ..errors import LlmpyError, count_of
from ..generate.kv_cache import CACHE, PREFILL
from ..model.arena import Tensor, memory
from ..model.config import GPT2_VOCAB, ModelConfig
from ..model.gpt2 import ACTS, PARAMS, RECOMPUTE
from ..options.options import BUILTIN_PROMPT, DEFAULT_MODEL, TrainOptions
from ..run.folder import BEST_FILE, CHECKPOINTS, MODEL_FILE
from ..run.trackers import package
from .multiple_choice import row_length

MANY_EPOCHS = 20  # twice what the embedded text stands before its validation loss rises (dev/LOG.md)
PROGRAM_BYTES = 172 << 20  # Python, NumPy, Numba with kernels from the cache
COMPILER_BYTES = 240 << 20  # what compiling all of them adds, and keeps (dev/LOG.md)
LOGITS_ROWS = 512  # rows of logits that exist at a time in the classifier
SHARE_OF_PEAK = 0.6  # of the multiply-add peak that a step is assumed to reach: small models do less well


class Machine(Ops, Protocol):
    """A backend that can also tell what it runs on: the shipped one."""

    threads: int
    isa: str

    def compiled(self) -> bool:
        """Whether the kernels of training are in the cache."""

    def measure_peak(self) -> float:
        """GFLOP/s of multiply-adds in its dtype over all threads, measured now (about 0.2 s)."""

    def warm_up(self, say: Callable[[str], None], decoding: bool = False) -> None:
        """Compile the kernels of training, or of decoding, that are not cached, telling what is being done."""

    def version_info(self) -> dict[str, str]:
        """Versions of what computes, for the run's records."""


@dataclass(frozen=True)
class Preflight:
    """What is known of a run before it starts. Bytes, GFLOP/s, seconds."""

    config: ModelConfig
    options: TrainOptions
    machine: Machine
    train_tokens: int
    val_tokens: int
    peak: float
    memory: int
    available: int
    done: int = 0  # steps of a run that goes on, and the seconds they and all else took
    elapsed: float = 0.0

    @property
    def parameters(self) -> int:
        """Number of parameters, padded head included."""
        return sum(t.size for t in PARAMS(self.config))

    @property
    def step_seconds(self) -> float:
        """Expected time of a step."""
        o = self.options
        flops = self.config.flops_per_token(o.sequence_length) * o.batch_size * o.sequence_length * o.micro_steps
        return flops / (SHARE_OF_PEAK * self.peak * 1e9)

    @property
    def steps(self) -> int:
        """Expected number of steps still to make: by --steps, or by how many fit into the time, whichever is less."""
        o = self.options
        bounds = [] if o.steps is None else [o.steps - self.done]
        if o.seconds is not None:
            bounds.append(int((o.seconds - self.elapsed) / self.step_seconds))
        return max(0 if self.done else 1, min(bounds))

    def lines(self) -> list[str]:
        """What the user reads."""
        o, m = self.options, self.machine
        tokens = o.batch_tokens * o.micro_steps
        epochs = (self.done + self.steps) * tokens / self.train_tokens
        after = f" after the {self.done:,} that {'is' if self.done == 1 else 'are'} made" if self.done else ""
        compiling = "" if m.compiled() else ", with what compiling the kernels takes"
        gathered = f" on each of {o.ranks} ranks" if o.ranks > 1 else ""
        gathered += f", {o.micro_steps} of them a step" if o.micro_steps > 1 else ""
        lines = [
            f"model    {o.model}: {self.config}: {self.parameters:,} parameters",
            f"data     {self.train_tokens:,} tokens to train on, {self.val_tokens:,} to validate; "
            f"batches of {o.batch_size} x {o.sequence_length}{gathered}",
            f"machine  {count_of(m.threads, 'thread')}, {m.isa}, {m.dtype}, measured peak {self.peak:,.0f} GFLOP/s",
            f"memory   about {gigabytes(self.memory)} of {gigabytes(self.available)} available{compiling}",
            f"time     about {duration(self.steps * self.step_seconds)}: {count_of(self.steps, 'step')} of "
            f"{1e3 * self.step_seconds:,.0f} ms{after}, {epochs:.1f} epochs; {self._ending()}",
        ]
        if tokens > self.train_tokens:
            lines.append(
                f"caution  a step reads {tokens:,} tokens, more than there are: {tokens / self.train_tokens:,.1f} "
                "epochs; a smaller --total-batch, or more text, serves better"
            )
        if epochs > MANY_EPOCHS:
            lines.append(
                f"caution  {epochs:.0f} epochs: the model will learn this text by heart and its validation loss will "
                "rise; more text, or fewer --steps or --minutes, serve better"
            )
        return lines

    def _ending(self) -> str:
        o = self.options
        bounds = [] if o.steps is None else [count_of(o.steps, "step")]
        if o.seconds is not None:
            bounds.append(f"{o.seconds / 60:g} minute{'s' * (o.seconds != 60)}")
        return "stops at " + " or ".join(bounds) + ("" if len(bounds) < 2 else ", whichever comes first")


def problems(
    options: TrainOptions, folder: Path, machine: Machine, start: ModelConfig | None = None, beside: int = 1
) -> list[LlmpyError]:
    """All that can be known to be wrong before the data are read: in milliseconds, and nothing is compiled.

    `start` is the shape of the model that the run starts from, if it does not start from scratch; `beside` as of
    `check_memory`.
    """
    found: list[LlmpyError] = []
    options = replace(options, model=options.model or DEFAULT_MODEL)

    def attempt(check: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return check(*arguments)
        except LlmpyError as fault:
            found.append(fault)

    config = start or attempt(ModelConfig.from_dial, options.model)
    if config is not None:
        attempt(check_length, options.sequence_length, config.context)
    attempt(lambda: options.micro_steps)
    for name in options.track or ():
        attempt(package, name)
    if options.hellaswag is not None:
        attempt(read_examples, options.hellaswag, 1 << 16)
    files: list[Found] = []
    for path in options.data or ():
        if not is_dataset(path):
            files += attempt(find_files, [path], lambda _: None) or []
    for file in files:
        attempt(_check_readable, file.path)
    if found or config is None:
        attempt(check_disk, options, config, folder) if config is not None else None
        return found
    tokens, vocab_size = _seen(files, options)
    config = start or ModelConfig.from_dial(options.model, vocab_size=vocab_size)
    least = options.batch_tokens + 1 + (0 if options.overfit else options.sequence_length + 1)
    take = "takes" if options.overfit else "and a row to validate take"
    if tokens is not None and tokens < least:
        found.append(
            LlmpyError(
                f"all data together have {tokens:,} tokens, a batch of -B {options.batch_size} "
                f"-T {options.sequence_length} {take} {least:,}",
                "use a smaller -B or -T, or more text",
            )
        )
    attempt(check_memory, options, config, machine, None, beside, options.ranks)
    attempt(check_disk, options, config, folder)
    return found


def together(faults: Sequence[LlmpyError]) -> LlmpyError:
    """The one fault, or one that tells all of them."""
    if len(faults) == 1:
        return faults[0]
    return LlmpyError(f"{len(faults)} problems: " + "; ".join(f"({n}) {f}" for n, f in enumerate(faults, 1)))


def all_of(*checks: Callable[[], Any]) -> list[Any]:
    """What each returns. Raises LlmpyError, which tells all faults, if any raises one."""
    results, faults = [], []
    for check in checks:
        try:
            results.append(check())
        except LlmpyError as fault:
            faults.append(fault)
    if faults:
        raise together(faults)
    return results


def _check_readable(path: Path) -> None:
    if not os.access(path, os.R_OK):
        raise LlmpyError(f"cannot read {path}: Permission denied", "check its permissions")


def _seen(files: Sequence[Found], options: TrainOptions) -> tuple[int | None, int]:
    """Tokens of the data if they are shards, and the vocabulary, by the sizes of the files."""
    shards = [f.path for f in files if is_shard(f.path)]
    if shards:
        return sum(map(count_tokens, shards)), options.vocab_size or GPT2_VOCAB
    if options.data is not None and any(map(is_dataset, options.data)):
        return None, options.vocab_size or GPT2_VOCAB
    return None, options.vocab_size or choose_vocab_size(sum(f.path.stat().st_size for f in files))


def check_length(T: int, context: int) -> None:
    """Raise LlmpyError for a row longer than the model's context."""
    if context < T:
        raise LlmpyError(f"-T {T} is longer than the model's context of {context}", f"use -T {context} or less")


def check_memory(
    options: TrainOptions, config: ModelConfig, machine: Machine, available: int | None = None, beside: int = 1,
    ranks: int = 1,
) -> None:  # fmt: skip
    """Raise LlmpyError if the run needs more memory than `available` bytes, by default what the machine has free.

    `beside`: those of its `ranks` that are on this machine; each may take an equal share of what is free.
    """
    o = options
    needed = memory_of(options, config, machine, ranks)
    available = psutil.virtual_memory().available // beside if available is None else available
    if needed > available:
        copy = (
            ""
            if o.checkpoint_every == 0 or ranks > 1
            else "; --checkpoint-every 0 saves the copy that checkpoints are made from"
        )
        raise LlmpyError(
            f"{o.model} with -B {o.batch_size} -T {o.sequence_length} needs about {gigabytes(needed)} of memory, and "
            f"{gigabytes(available)} are available",
            f"use a smaller -B, -T or --model, or close other programs{copy}",
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
            f"the checkpoints of this run need up to {gigabytes(needed)} on the disk of {folder}, and "
            f"{gigabytes(free)} are free",
            "make room, choose another --out, a smaller --keep, or a larger --checkpoint-every or --keep-every",
        )


def disk_needed(options: TrainOptions, config: ModelConfig) -> int:
    """Bytes that the checkpoints of a run take at most, with the one that is being written."""
    o = options
    steps = o.steps if o.steps is not None and o.steps > 0 else 0
    if not o.checkpoint_every:
        count = 1
    elif o.keep:
        count = o.keep + 1 + (steps // o.keep_every if o.keep_every else 0)
    else:
        count = steps // o.checkpoint_every + 1
    return (count * 12 + 8) * sum(t.size for t in PARAMS(config))


def inspect(
    config: ModelConfig,
    options: TrainOptions,
    machine: Machine,
    train_tokens: int,
    val_tokens: int,
    done: int = 0,
    elapsed: float = 0.0,
    ranks: int = 1,
) -> Preflight:
    """Measure the machine and compute the needs of a run, or of one that goes on after `done` steps."""
    return Preflight(
        config,
        options,
        machine,
        train_tokens,
        val_tokens,
        machine.measure_peak(),
        memory_of(options, config, machine, ranks),
        psutil.virtual_memory().available,
        done,
        elapsed,
    )


def memory_of(options: TrainOptions, config: ModelConfig, machine: Machine, ranks: int = 1) -> int:
    """Bytes that each rank of a run takes, program included. Raises LlmpyError if its file of HellaSwag is none."""
    o = options
    prompt = len((o.prompt or BUILTIN_PROMPT).encode(errors="replace"))  # a byte is at most a token
    sampled = prompt + o.sample_tokens
    apart = []
    if o.hellaswag is not None:
        rows = ENDINGS, min(_row_length(o.hellaswag), config.context)
        apart = [rows] if rows != (o.batch_size, o.sequence_length) else []
    shape = o.batch_size, o.sequence_length
    copied = o.checkpoint_every > 0
    again = o.recompute, o.recompute_layers
    needed = memory_needed(config, *shape, machine, again, copied, sampled, apart, ranks, o.zero)
    return needed + (0 if machine.compiled() else COMPILER_BYTES)


@functools.cache
def _row_length(path: Path) -> int:
    """Of a file of HellaSwag; its ten thousand examples take a third of a second, and memory is asked for thrice."""
    return row_length(read_examples(path, 1 << 16))


def memory_needed(
    config: ModelConfig, B: int, T: int, machine: Ops, recompute: tuple[int, int | None] = (RECOMPUTE, None),
    copied: bool = False, sampled: int | None = None, apart: Sequence[tuple[int, int]] = (), ranks: int = 1,
    zero: bool = True,
) -> int:  # fmt: skip
    """Bytes that training `config` on batches of (B, T) takes, program included; see `memory_parts`."""
    return sum(memory_parts(config, B, T, machine, recompute, copied, sampled, apart, ranks, zero).values())


def memory_parts(
    config: ModelConfig, B: int, T: int, machine: Ops, recompute: tuple[int, int | None] = (RECOMPUTE, None),
    copied: bool = False, sampled: int | None = None, apart: Sequence[tuple[int, int]] = (), ranks: int = 1,
    zero: bool = True,
) -> dict[str, int]:  # fmt: skip
    """Bytes of everything that training `config` on batches of (B, T) holds, by what it is for.

    `recompute`: its level and layers, see `ACTS`. `copied`: with the copy that checkpoints in the background are made
    from. `sampled`: tokens of a sample and its prompt, by default as many as samples can reach, T. `apart`: other
    shapes that are evaluated. Of several `ranks`: what the first one holds, which has most; `zero` as `Zero` takes it.
    """
    S = min(T, sampled or T)
    wide, stored = machine.wide.itemsize, machine.dtype.itemsize
    mixed = stored != wide

    def size(table: list[Tensor]) -> int:
        return memory(table, stored, wide)

    table = PARAMS(config)
    parameters, matrices = wide * sum(t.size for t in table), sum(t.size for t in table if t.decay)
    if ranks == 1:
        state = {"moments": 2 * parameters, "copy for checkpoints": 3 * parameters if copied else 0}
    else:
        kept, part = (wide * elements for elements in most_kept(table, config.layers, ranks, zero))
        own, _ = most_kept(table, config.layers, ranks)
        state = {
            "moments": 2 * kept,
            "master weights": kept,
            "reduced gradients": kept,
            "messages": 3 * ranks * part + (kept if mixed else 0),
            "copy for checkpoints": parameters + 2 * wide * own,  # the last checkpoint is written from it too
        }
    rows = min(LOGITS_ROWS, max(b * t for b, t in [(B, T), *apart]))
    return {
        # of several ranks the master weights take the place of the wide matrices, whose memory goes back (`release`)
        "weights": parameters - (wide * matrices if mixed and ranks > 1 and sys.platform == "linux" else 0),
        "weights for products": stored * matrices if mixed else 0,
        "gradients": parameters,
        **state,
        "activations": size(ACTS(config, B, T, True, *recompute, mixed)),
        "logits chunk": stored * rows * config.padded_vocab_size,
        "samples": size(PREFILL(config, S)) + size(CACHE(config, 1, S)),
        "evaluation apart": sum(size(ACTS(config, *shape, False)) for shape in apart),
        "program": PROGRAM_BYTES,
    }


def crowded(threads: int) -> list[str]:
    """A note where one process has more threads than it may use cores."""
    n = cores()
    if threads <= n:
        return []
    return [f"note: {threads} threads on {count_of(n, 'core')}: more than cores are slower; --threads {n} is best"]


def duration(seconds: float) -> str:
    """45 s, 2 min 30 s, 3 h 20 min, 12 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400:,} d {whole % 86400 // 3600} h"


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
