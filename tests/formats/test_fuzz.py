"""Damaged files over all readers: one exception with a sentence, never a crash, a hang, or memory out of proportion.

A reader joins by a row of READERS: a function that writes a good sample into a folder and returns what of it is to be
damaged, and one that reads it wholly. `make fuzz` runs a million cases, the normal run 10,000.
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
from support.samples import in_memory, sharded, training_state, write_debug

from llmpy.errors import LlmpyError
from llmpy.formats import huggingface, llmc, llmc_state, native, open_model
from llmpy.formats.source import Source, shapes
from llmpy.model.config import ModelConfig

SMALL = ModelConfig(layers=1, heads=1, channels=2, context=3, vocab_size=5)
CASES, CAMPAIGN = 10_000, 1_000_000
SECONDS = 1.0  # of CPU time
MEMORY = 64 << 20  # beyond the file's size
INTERESTING = (0, 1, 2, 7, 127, 128, 255, 256, 65535, 1 << 20, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)


class Reader(NamedTuple):
    """A good sample, and what reads it. `damage` is relative to the sample's folder."""

    write: Callable[[Path], object]
    damage: tuple[str, ...]
    read: Callable[[Path], object]


def everything(source: Source) -> None:
    """Every tensor, as whoever uses the model would read them."""
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
    "llm.c checkpoint": Reader(
        lambda folder: llmc_state.write_checkpoint(folder, in_memory(SMALL), training_state(SMALL, ranks=2)),
        ("model_00000007.bin", "state_00000007_00000.bin", "state_00000007_00001.bin"),
        lambda folder: everything(open_model(folder)),
    ),
    "llm.c debug state": Reader(debug, ("debug.bin",), read_debug),
}


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One or a few random faults: bits, bytes, whole words, lengths, pieces moved, doubled, or cut off."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(min(len(data), 200) + 1)
        kind = rng.randrange(8)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            word, width = rng.choice(INTERESTING), rng.choice((4, 8))
            at -= at % 4
            data[at : at + width] = (word % 256**width).to_bytes(width, "little")
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            data += rng.randbytes(rng.choice((1, 3, 4, 1000)))
        elif kind == 5:
            data[at:at] = data[at : at + rng.randrange(64)]
        elif kind == 6:
            del data[at : at + rng.randrange(1, 64)]
        elif digits := [i for i in range(min(len(data), 4000)) if 48 <= data[i] <= 57]:
            i = rng.choice(digits)
            data[i : i + 1] = rng.choice((b"0", b"-1", b"9", b"99999999999", b"1e9", b"null", b"[", b"1.0", b'"'))
    return bytes(data)


@contextlib.contextmanager
def bounded(size: int) -> Iterator[None]:
    """Within: at most SECONDS of CPU time, and `size` + MEMORY more address space, where the system has such bounds."""
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
    """Damage the sample `cases` times; returns how often it was refused. Anything but LlmpyError ends the test."""
    reader.write(folder)
    reader.read(folder)
    good = {name: (folder / name).read_bytes() for name in reader.damage}
    rng = random.Random(seed)
    refused = 0
    for case in range(cases):
        name = rng.choice(reader.damage)
        bad = mutate(good[name], rng)
        (folder / name).write_bytes(bad)
        try:
            with bounded(len(bad)):
                reader.read(folder)
        except LlmpyError as fault:
            refused += 1
            assert len(str(fault)) > 20, fault
            assert "\n" not in str(fault).strip() or len(str(fault)) < 2000
        except BaseException as fault:
            raise AssertionError(f"case {case} of seed {seed}, {name} ({len(bad)} bytes): {fault!r}") from fault
        (folder / name).write_bytes(good[name])
    return refused


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(("cases", "seed"), [(CASES, 1), pytest.param(CAMPAIGN, None, marks=pytest.mark.fuzz)])
def test_damaged_files(tmp_path: Path, name: str, cases: int, seed: int | None) -> None:
    start, cases = time.time(), cases // len(READERS)
    refused = campaign(READERS[name], tmp_path, cases, seed or time.time_ns() % 2**32)
    assert refused > cases // 10  # what is left changed a weight, or text that says the same
    print(f"{name}: {cases:,} cases, {refused:,} refused, {time.time() - start:.0f} s")
