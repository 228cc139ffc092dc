"""All kernels are compiled into the cache, once; a cache that cannot be written is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.refused import refused

from llmpy.backend import cpu, kernel_cache, machine
from llmpy.backend.cpu import jit
from llmpy.errors import LlmpyError
from llmpy.options.tools import WarmupOptions
from llmpy.tools.warmup import warmup


def twice(x):
    x[0] = x[0] * 2


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a single kernel; that of helper threads exists already."""
    jit.hire(2)

    def calls(ops: Any, kinds: Any) -> list[tuple[str, Callable[[], object]]]:
        assert set(kinds) == set(cpu.KINDS) - (set() if ops.quantises else {"int8"})
        dtype = np.uint8 if ops.quantises else np.uint16 if ops.dtype == cpu.BFLOAT16 else ops.dtype
        name = "quantise" if ops.quantises else "twice"
        return [(name, lambda: jit._compiled(twice)(np.ones(1, dtype)))]

    monkeypatch.setattr(cpu, "smallest_calls", calls)
    monkeypatch.setattr(kernel_cache, "FOLDER", tmp_path)
    monkeypatch.setattr(kernel_cache, "problem", "")
    monkeypatch.setattr(kernel_cache, "_compiled", set())
    return tmp_path


def test_all_dtypes_are_compiled_once(folder: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert {*machine.KINDS, "int8"} == set(cpu.KINDS)
    warmup(WarmupOptions(), said.append)
    assert len(list(folder.glob("twice-*.kernel"))) == 3
    assert [line.strip() for line in said if "1/1" in line] == ["1/1 twice", "1/1 twice", "1/1 quantise"]
    assert said[-1].startswith("compiled 3 kernels in") and str(folder) in said[-1]
    said.clear()
    monkeypatch.setattr(os, "access", lambda *_: False)  # of a class: only the teacher can write
    warmup(WarmupOptions(), said.append)
    assert len(said) == 1 and said[0].startswith("nothing to do: 3 kernels") and str(folder) in said[0]


def test_a_cache_that_cannot_be_written(folder: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, refused("cache.unusable", folder):
        patch.setattr(os, "access", lambda *_: False)
        warmup(WarmupOptions(), said.append)
    with monkeypatch.context() as patch, refused("cache.unusable", "/shared is writable", "LLMPY_CACHE_DIR"):
        patch.setattr(kernel_cache, "FOLDER", None)
        patch.setattr(kernel_cache, "problem", "/shared is writable")
        warmup(WarmupOptions(), said.append)
    assert not said  # nothing was compiled

    def full(*_: Any) -> None:
        raise LlmpyError("disk.full", "no space left")

    monkeypatch.setattr(kernel_cache, "seal", full)
    with refused("cache.unusable", "no space left"):
        warmup(WarmupOptions(), said.append)


@pytest.mark.long
def test_nothing_is_compiled_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By training, fine-tuning with adapters and sampling, of both families and dtypes."""
    monkeypatch.setenv("LLMPY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def llmpy(*arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "llmpy", *arguments], check=True, capture_output=True)

    llmpy("warmup")
    compiled = sorted((tmp_path / "cache").rglob("*.kernel"))
    assert len(compiled) > 40
    for dtype in ("float32", "bfloat16"):
        for model in ("d1", "llama:d1"):
            name, few = f"{model[:5]}-{dtype}", ("--dtype", dtype, "--steps", "1")
            llmpy("train", "--model", model, "--out", name, *few)
            llmpy("train", "--init", name, "--lora", "2", "--out", f"{name}-lora", *few)
            llmpy("sample", f"{name}-lora", "--tokens", "3", "--dtype", dtype)
    assert sorted((tmp_path / "cache").rglob("*.kernel")) == compiled
