"""Corrupt data files of every format: an LlmpyError, never a crash, a second of time or much memory.

Each campaign is its own process, to detect crashes and hangs and to measure its memory alone.
`make fuzz` runs a million mutations; the name of a failed test contains the seed.
"""

from __future__ import annotations

import faulthandler
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.mutations import mutated
from support.samples import llama_tokenizer

from llmpy.data.hellaswag import read_examples
from llmpy.data.rank_tables import write_llmc
from llmpy.data.records import kind_of, read_records
from llmpy.data.shards import is_shard, open_shard
from llmpy.data.tokenizer import Tokenizer
from llmpy.errors import LlmpyError

resource = pytest.importorskip("resource")  # not on Windows

NORMAL, EACH, CAMPAIGNS = 10_000, 10_000, 100
V = 300
SECONDS, MEGABYTES = 1.0, 64
TEXT = "the cat, the hat: 12 naïve cafés\n\n日本 \U0001f642 it's\t"


def shard(path: Path) -> None:
    is_shard(path)
    opened = open_shard(path, V)
    assert 0 <= int(opened.tokens[:].min()) <= int(opened.tokens[:].max()) < V
    assert opened.mask is None or len(opened.mask) == len(opened)


def tokenizer(path: Path) -> None:
    loaded = Tokenizer.load(path)
    assert loaded.decode(loaded.encode(TEXT)) == TEXT
    assert len(loaded.byte_lengths()) == loaded.vocab_size


def records(path: Path) -> None:
    with path.open("rb") as file:
        kind = kind_of(path, file.read(16))
    if kind is None:
        raise LlmpyError("data.unknown-kind", f"{path} has no known format")
    for document in read_records(path, kind):
        document.text.encode("utf-8")


def hellaswag(path: Path) -> None:
    for example in read_examples(path, V):
        assert 0 <= example.label < len(example.endings) == 4
        assert max(int(part.max()) for part in (example.context, *example.endings)) < V


def headed(magic: int, version: int, count: int, body: bytes) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, count
    return header.tobytes() + body


def base_files(folder: Path) -> dict[str, tuple[bytes, Callable[[Path], None], int]]:
    """Return name → (valid content, its reader, its share of the mutations)."""
    ids = np.arange(1, 200)
    trained = Tokenizer.train([TEXT * 50], V)
    trained.save(folder / "tokenizer.json")
    write_llmc(folder / "tokenizer.bin", trained.ranks())
    llama_tokenizer(folder / "llama.json", names=["<tool>"])
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "ho"}]}]
    rows = [{"text": TEXT}, {"prompt": "2+2=", "completion": "4", "n": 1.5e3}, {"messages": chat}, {"text": "end"}]
    rows.append({"instruction": "2+2=", "input": "", "output": "4", "history": [["hi", "ho"]], "system": "s"})
    lines = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows)).encode()
    example = [65535, 36, 0, 1, 4, 3, 5, 1, 2, 1, 7, 2, 6, 1, 1, 9, 1, 8]
    stream = np.array([*example, 65535, 36, 1, *example[3:]], "<u2").tobytes()
    choices = np.zeros(256, "<i4")
    choices[:4] = 20240522, 1, 2, 36
    files = {
        "u16.bin": (headed(20240520, 1, len(ids), ids.astype("<u2").tobytes()), shard, 4),
        "u32.bin": (headed(20240801, 7, len(ids), ids.astype("<u4").tobytes()), shard, 4),
        "packed.mask": (headed(20261122, 2, len(ids), bytes(i % 4 for i in range(len(ids)))), shard, 4),
        "masked.mask": (headed(20261122, 1, len(ids), bytes(i % 2 for i in range(len(ids)))), shard, 4),
        "tokenizer.bin": ((folder / "tokenizer.bin").read_bytes(), tokenizer, 2),
        "tokenizer.json": ((folder / "tokenizer.json").read_bytes(), tokenizer, 1),
        "llama.json": ((folder / "llama.json").read_bytes(), tokenizer, 1),
        "a.jsonl": (lines, records, 4),
        "a.json": (json.dumps(rows, indent=1).encode(), records, 4),
        "a.jsonl.gz": (gzip.compress(lines), records, 4),
        "repacked.jsonl.gz": (lines, records, 4),  # mutated before compression
        "hellaswag_val.bin": (choices.tobytes() + stream, hellaswag, 4),
    }
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return files
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": [TEXT, "b" * 50]}), folder / "a.parquet")
    files["a.parquet"] = (folder / "a.parquet").read_bytes(), records, 2
    return files


def read(path: Path, reader: Callable[[Path], None]) -> bool:
    """Return whether the file is valid; fail unless an invalid one raises an LlmpyError that names it."""
    start = time.thread_time()
    try:
        reader(path)
        good = True
    except LlmpyError as error:
        good = False
        assert path.with_suffix("").name in str(error), f"no name: {error}"
        assert 10 < len(str(error)) < 2000, f"no sentence: {error}"
    seconds = time.thread_time() - start
    assert seconds < SECONDS, f"{seconds:.1f} s"
    return good


def peak() -> float:
    """Return the largest memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def campaign(seed: int, count: int, folder: Path) -> None:
    """Read `count` mutations. Fails, leaving the file in `folder`, if one causes another error, or costs too much."""
    source = random.Random(seed)
    files = base_files(folder)
    for old in folder.iterdir():
        old.unlink()
    names = [name for name, (_, _, share) in files.items() for _ in range(share)]
    tokens = headed(20240520, 1, 199, np.arange(1, 200).astype("<u2").tobytes())
    good = 0

    def run(name: str, data: bytes) -> bool:
        path = folder / name
        path.write_bytes(gzip.compress(data, 1) if name.startswith("repacked") else data)
        if name.endswith(".mask"):
            path = path.with_suffix(".bin")
            path.write_bytes(tokens)
        try:
            return read(path, files[name][1])
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}, {path}: {type(error).__name__}: {error}") from error

    for name in files:
        assert run(name, files[name][0]), name
    before = peak()
    for i in range(count):
        if i % 1000 == 0:
            faulthandler.dump_traceback_later(60, exit=True)
        name = source.choice(names)
        good += run(name, mutated(files[name][0], source))
    faulthandler.cancel_dump_traceback_later()
    grown = peak() - before
    assert grown < MEGABYTES, f"{grown:.0f} MB more"
    print(f"{count:,} mutations, {good:,} of them read, {grown:.0f} MB more")


def run_campaign(seed: int, count: int, seconds: float, module: str = "test_fuzz_data") -> str:
    """Run the campaign of a module in a process of its own and return its output; fail if it fails."""
    code = f"import sys, pathlib, {module} as t; t.campaign(*map(int, sys.argv[1:3]), pathlib.Path(sys.argv[3]))"
    paths = filter(None, [str(Path(__file__).parent), *sys.path])
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [sys.executable, "-c", code, str(seed), str(count), folder],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "RUST_BACKTRACE": "0"},
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
        )
    assert result.returncode == 0, f"exit {result.returncode}: {result.stderr[-1500:]}"
    return result.stdout


def test_mutations() -> None:
    assert f"{NORMAL:,} mutations" in run_campaign(0, NORMAL, 120)


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(1, CAMPAIGNS + 1))
def test_many_mutations(seed: int) -> None:
    print(run_campaign(seed, EACH, 300))
