"""Corrupt files through all readers: LlmpyError, never a crash, a hang or excessive memory.

To add a reader, add a row to READERS. `make fuzz` runs a million cases, the normal run 10,000.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from support.mutations import mutated
from support.samples import in_memory, sharded, training_state, write_debug

from llmpy.errors import LlmpyError
from llmpy.formats import huggingface, llmc, llmc_state, native, open_model
from llmpy.formats.source import Source, shapes
from llmpy.model.config import LlamaConfig, ModelConfig, RopeScaling

SMALL = ModelConfig(layers=1, heads=1, channels=2, context=3, vocab_size=5)
LLAMA = LlamaConfig(
    1, 2, 4, 3, 5, kv_heads=1, ffn=3, tied=False, qk_norm=True, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 2)
)
CASES, CAMPAIGN = 10_000, 1_000_000
SECONDS = 1.0  # of CPU time
MEMORY = 64 << 20  # beyond the file's size


class Reader(NamedTuple):
    """A writer of a valid sample, its files to corrupt, and a function that reads all of it."""

    write: Callable[[Path], object]
    files: tuple[str, ...]
    read: Callable[[Path], object]


def everything(source: Source) -> None:
    """Read every tensor."""
    for name in shapes(source.config):
        source.read(name)


def debug(folder: Path) -> None:
    gradients = in_memory(SMALL)
    batch = np.array([[1, 2, 3], [4, 0, 1]], np.int32)
    state = llmc.DebugState(batch, batch, np.zeros((2, 3, 5), np.float32), 1.0, gradients.read)
    write_debug(folder / "debug.bin", state)


def read_debug(folder: Path) -> None:
    state = llmc.read_debug(folder / "debug.bin", SMALL)
    for name in llmc.ORDER:
        state.gradient(name)


READERS = {
    "llm.c": Reader(
        lambda folder: llmc.write_model(folder / "m.bin", in_memory(SMALL), "bfloat16"),
        ("m.bin",),
        lambda folder: everything(open_model(folder / "m.bin")),
    ),
    "native": Reader(
        lambda folder: native.write_model(folder / "m.safetensors", in_memory(SMALL)),
        ("m.safetensors",),
        lambda folder: everything(open_model(folder / "m.safetensors")),
    ),
    "hugging face": Reader(
        lambda folder: huggingface.write_model(folder, in_memory(SMALL), "bfloat16"),
        ("config.json", "model.safetensors"),
        lambda folder: everything(open_model(folder)),
    ),
    "hugging face, sharded": Reader(
        lambda folder: sharded(folder, in_memory(SMALL)),
        ("model.safetensors.index.json", "model-00001-of-00002.safetensors"),
        lambda folder: everything(open_model(folder)),
    ),
    "llama": Reader(
        lambda folder: sharded(folder, in_memory(LLAMA)),
        ("config.json", "config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"),
        lambda folder: everything(open_model(folder)),
    ),
    "llm.c checkpoint": Reader(
        lambda folder: llmc_state.write_checkpoint(folder, in_memory(SMALL), training_state(SMALL, ranks=2)),
        ("model_00000007.bin", "state_00000007_00000.bin", "state_00000007_00001.bin"),
        lambda folder: everything(open_model(folder)),
    ),
    "llm.c debug state": Reader(debug, ("debug.bin",), read_debug),
}


@contextlib.contextmanager
def bounded(size: int) -> Iterator[None]:
    """Limit CPU time to SECONDS and new address space to `size` + MEMORY, on Linux."""
    if sys.platform != "linux":
        yield
        return
    import resource

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + size + MEMORY, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, handler)


def campaign(reader: Reader, folder: Path, cases: int, seed: int) -> int:
    """Corrupt the sample `cases` times; return how often LlmpyError was raised. Any other exception fails."""
    reader.write(folder)
    reader.read(folder)
    good = {name: (folder / name).read_bytes() for name in reader.files}
    rng = random.Random(seed)
    refused = 0
    for case in range(cases):
        name = rng.choice(reader.files)
        bad = mutated(good[name], rng)
        (folder / name).write_bytes(bad)
        try:
            with bounded(len(bad)):
                reader.read(folder)
        except LlmpyError as error:
            refused += 1
            assert len(str(error)) > 20, error
            assert "\n" not in str(error).strip() or len(str(error)) < 2000
        except BaseException as error:
            raise AssertionError(f"case {case} of seed {seed}, {name} ({len(bad)} bytes): {error!r}") from error
        (folder / name).write_bytes(good[name])
    return refused


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(("cases", "seed"), [(CASES, 1), pytest.param(CAMPAIGN, None, marks=pytest.mark.fuzz)])
def test_corrupt_files(tmp_path: Path, name: str, cases: int, seed: int | None) -> None:
    start, cases = time.time(), cases // len(READERS)
    refused = campaign(READERS[name], tmp_path, cases, seed or time.time_ns() % 2**32)
    assert refused > cases // 10  # the rest changed only a weight or equivalent text
    print(f"{name}: {cases:,} cases, {refused:,} refused, {time.time() - start:.0f} s")
