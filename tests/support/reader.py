"""A reader's folder and network: all that README and docs name is there, but small."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.laptop import TINY
from support.network import network, stands_for
from support.samples import in_memory, llmc_debug, with_tokenizer

from llmpy import formats
from llmpy.cli import main as cli
from llmpy.data import datasets, prepare, tokenizer
from llmpy.formats import hub, huggingface, llmc

TEXT = "the cat sat on the mat and the dog ran to the sea. it was a good day for a dog.\n" * 600
WORDS = replace(TINY, context=128, vocab_size=257)  # as many tokens as a tokenizer of bytes has
TRAIN = "--model d1 -B 2 -T 96 --steps 2 --eval-batches 1 --sample-tokens 4"
# What commands read; names in capitals stand for the reader's own.
TEXTS = ("my.txt", "more.txt", "input.txt", "stories.txt", "WHAT", "a-folder/1.txt", "notes/1.txt", "FOLDER/1.txt")
RUNS = ("runs/OTHER", "runs/d3", "RUN", "IN")  # as runs/NAME
MODELS = ("gpt2", "gpt2-xl")  # on the hub
WEB = "HuggingFaceFW/fineweb"


def furnish(folder: Path) -> None:
    """Texts, tokens, runs and models in `folder`, the current one."""
    for name in TEXTS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(TEXT, "utf-8")
    records = "".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines())
    (folder / "my.jsonl.gz").write_bytes(gzip.compress(records.encode()))
    (folder / "prompts.txt").write_text("The cat\nA dog\n", "utf-8")
    for line in (f"train --data my.txt {TRAIN} --out runs/NAME", "data my.txt --tokenizer bytes --out tokens"):
        assert cli.main(line.split()) == 0
    for name in RUNS:
        shutil.copytree(folder / "runs/NAME", folder / name)
    for part in ("train", "val"):
        shutil.copy(folder / f"tokens/{part}.bin", folder / f"fw_{part}_000001.bin")
    shutil.copy(folder / "tokens/tokenizer.json", folder / "FILE")
    small = with_tokenizer(in_memory(WORDS), folder / "tokens/tokenizer.json")
    huggingface.write_model(folder / "my-gpt2", small, "float32")
    llmc_debug(small, folder / "gpt2_124M.bin", folder / "gpt2_124M_debug_state.bin")
    (folder / "log124M").mkdir()
    llmc.write_model(folder / "log124M/model_00018865.bin", small, "float32")


@contextlib.contextmanager
def internet(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models and data sets that are known by name, and GPT-2's tokenizer; `folder` is a furnished one."""
    ending = [{"ctx": "A cat", "endings": ["sat", "ran", "is", "was"], "label": 2}]
    known = {
        (tokenizer, "GPT2"): b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256)),
        (datasets, "SHAKESPEARE"): TEXT.replace(".", ".\n\n").encode(),
        (datasets, "HELLASWAG"): "\n".join(map(json.dumps, 3 * ending)).encode(),
        (datasets, "STORIES"): stories(),
    }
    files = {f"/{name}": content for (_, name), content in known.items()}
    files[f"/{datasets.STORIES}"] = files.pop("/STORIES")  # of the hub, as is all else
    files |= {
        f"/openai-community/{model}/resolve/main/{name}": (folder / "my-gpt2" / name).read_bytes()
        for model in MODELS
        for name in hub.FILES
    }
    page, content = "sample/10BT/000_00000.parquet", web(folder)
    entry = {"path": page, "size": len(content), "lfs": {"oid": hashlib.sha256(content).hexdigest()}}
    files |= {
        "/": b"the hub",
        f"/api/datasets/{WEB}/tree/main/sample/10BT": json.dumps([entry]).encode(),
        f"/datasets/{WEB}/resolve/main/{page}": content,
    }
    with network(files, patch) as (here, _):
        for (module, name), content in known.items():
            address = datasets.STORIES if name == "STORIES" else f"{here}/{name}"
            stands_for(patch, module, name, address, content)
        for module in (prepare, formats.detect):
            patch.setattr(module, "GPT2_VOCAB", WORDS.vocab_size)
        yield


def stories() -> bytes:
    """TinyStories' archive."""
    content = json.dumps([{"story": line} for line in TEXT.splitlines()]).encode()
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as archive:
        for name in ("data00.json", "data01.json"):
            told = tarfile.TarInfo(name)
            told.size = len(content)
            archive.addfile(told, io.BytesIO(content))
    return whole.getvalue()


def web(folder: Path) -> bytes:
    """A file of FineWeb; where nothing reads such files, nothing."""
    if find_spec("pyarrow") is None:
        return b"PAR1"
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": TEXT.splitlines()}), folder / "web.parquet")
    return (folder / "web.parquet").read_bytes()
