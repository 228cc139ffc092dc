"""GPT-2 from a local server that stands in for the hub."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.laptop import TINY
from support.network import network
from support.refused import refused
from support.samples import in_memory, same, with_tokenizer

from llmpy import formats
from llmpy.cli import main as cli
from llmpy.data.tokenizer import Tokenizer
from llmpy.formats import hub, huggingface, open_model
from llmpy.system.cache import user_cache

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
WORDS = replace(TINY, vocab_size=257)  # as many as its tokenizer has


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serve a small gpt2; yield the requested paths."""
    folder = tmp_path / "served"
    huggingface.write_model(folder, with_tokenizer(in_memory(WORDS), tmp_path / "t.json"), "float32")
    monkeypatch.setenv("LLMPY_CACHE_DIR", str(tmp_path / "cache"))
    files = {f"/openai-community/gpt2/resolve/main/{name}": (folder / name).read_bytes() for name in FILES}
    with network(files, tmp_path / "hub", monkeypatch) as (_, asked):
        yield asked


def test_a_model_and_its_tokenizer_are_downloaded_once(asked: list[str], tmp_path: Path, said: list[str]) -> None:
    source = formats.resolve("gpt2", said.append)
    assert same(source, in_memory(WORDS))
    assert source.tokenizer is not None and source.path.is_relative_to(tmp_path / "hub")
    assert said == [f"downloading {name} of openai-community/gpt2" for name in FILES]
    asked.clear()
    assert same(formats.resolve("gpt2", said.append), source)
    assert Tokenizer.gpt2(said.append).vocab_size == WORDS.vocab_size
    assert (asked, len(said)) == ([], 4)  # no network needed now


def test_the_cache_of_an_earlier_llmpy_is_used(asked: list[str], tmp_path: Path, said: list[str]) -> None:
    shutil.copytree(tmp_path / "served", user_cache() / "models" / "gpt2")
    assert hub.download("gpt2", said.append) == user_cache() / "models" / "gpt2"
    assert (asked, said) == ([], [])


def test_convert_takes_a_hub_model_but_prefers_a_local_path(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["convert", "gpt2", str(tmp_path / "out" / "m.bin")]) == 0
    found = open_model(tmp_path / "out" / "m.bin")
    assert same(found, in_memory(WORDS))
    assert found.tokenizer == tmp_path / "out" / "m.tokenizer.json"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "served").rename("gpt2")
    shutil.rmtree("hub")
    asked.clear()
    for i, name in enumerate(("gpt2", "./gpt2")):
        assert cli.main(["convert", name, f"out/{i}.bin"]) == 0
    assert asked == []


def test_no_such_model() -> None:
    with refused("model.missing", "gpt3. Did you mean gpt2? Use gpt2, "):
        formats.resolve("gpt3", print)


def test_where_caches_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LLMPY_CACHE_DIR", raising=False)
    for platform, variable, value, expected in (
        ("linux", "XDG_CACHE_HOME", str(tmp_path), tmp_path / "llmpy"),
        ("darwin", "HOME", str(tmp_path), tmp_path / "Library/Caches/llmpy"),
        ("win32", "LOCALAPPDATA", str(tmp_path), tmp_path / "llmpy"),
    ):
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setenv(variable, value)
        if platform == "darwin":
            monkeypatch.setenv("USERPROFILE", value)
        assert user_cache() == expected
