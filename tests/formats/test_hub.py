"""Models from a local server that stands in for the hub."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalTokenNotFoundError
from support.laptop import TINY
from support.network import hub_is, network
from support.refused import refused
from support.samples import in_memory, same, sharded, with_tokenizer

from llmpy import formats
from llmpy.cli import main as cli
from llmpy.data.tokenizer import Tokenizer
from llmpy.formats import hub, huggingface, open_model
from llmpy.model.config import LlamaConfig
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
    with refused("model.missing", "gpt3. Did you mean gpt2? ", "Or use gpt2, "):
        formats.resolve("gpt3", print)
    with refused("model.missing", "runs/d4"):  # a folder of ours, not of an owner named runs
        formats.resolve("runs/d4", print)


SMALL = LlamaConfig(1, 2, 4, 8, 257)
PLACE = "/org/small.1/resolve/main/"


@pytest.fixture
def org(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[dict[str, bytes | int], list[str]]]:
    """Serve org/small.1, a sharded Llama; yield the served files and the requested paths."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "served"
    sharded(folder, with_tokenizer(in_memory(SMALL, "bfloat16"), tmp_path / "t.json"))
    for name in ("generation_config.json", "pytorch_model.bin", "README.md"):
        (folder / name).write_text("{}", "utf-8")
    files: dict[str, bytes | int] = {PLACE + path.name: path.read_bytes() for path in folder.iterdir()}
    with network(files, tmp_path / "hub", monkeypatch) as (_, asked):
        yield files, asked


def test_a_model_by_owner_and_name(org: tuple[dict[str, bytes | int], list[str]], said: list[str]) -> None:
    found = formats.find("org/small.1", said.append)
    assert same(found, in_memory(SMALL, "bfloat16"))
    names = {path.name for path in found.path.iterdir()}
    assert names == {name.removeprefix(PLACE) for name in org[0]} - {"pytorch_model.bin", "README.md"}
    assert hub.repository(found.path) == "org/small.1"
    org[1].clear()
    assert cli.main(["convert", "org/small.1", "out"]) == 0
    assert org[1] == []  # no network needed now
    assert 'base_model: "org/small.1"' in Path("out", "README.md").read_text("utf-8")
    Path("org/small.1").mkdir(parents=True)
    assert not hub.is_name("org/small.1")


@pytest.mark.parametrize(
    ("change", "code", "names"),
    [
        ({"config.json": 410}, "download.failed", ["the hub has no org/small.1", "Check the name"]),
        ({"config.json": 403}, "download.failed", ["Accept its license at http", "/org/small.1, then log in"]),
        ({"config.json": 404}, "download.failed", ["config.json of org/small.1"]),
        ({"model-00002-of-00002.safetensors": 500}, "download.failed", ["model-00002-of-00002"]),
        ({"model.safetensors.index.json": ...}, "model.missing", ["model.safetensors", "pickles"]),
    ],
)
def test_models_that_cannot_be_had(
    org: tuple[dict[str, bytes | int], list[str]], change: dict[str, Any], code: str, names: list[str]
) -> None:
    for name, content in change.items():
        org[0][PLACE + name] = content
        if content is ...:
            del org[0][PLACE + name]
    with refused(code, *names):
        formats.resolve("org/small.1", [].append)


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub_is("http://127.0.0.1:9", tmp_path, monkeypatch)
    with refused("download.failed", "org/small.1", "Check the network"):
        formats.resolve("org/small.1", [].append)


def test_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pushed: list[Any] = []

    def create(self: Any, name: str, exist_ok: bool) -> str:
        if name == "nobody/m":
            raise LocalTokenNotFoundError("Token is required, but no token found.")
        pushed.append((name, exist_ok))
        return f"https://huggingface.co/{name}"

    def upload(self: Any, repo_id: str, folder_path: Path, commit_message: str) -> None:
        pushed.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    monkeypatch.chdir(tmp_path)
    huggingface.write_model(Path("a"), in_memory(SMALL), "float32")
    assert cli.main(["convert", "a", "b", "--push", "me/m"]) == 0
    assert pushed == [("me/m", True), ("me/m", ["README.md", "config.json", "model.safetensors"])]
    assert "pushed b to https://huggingface.co/me/m" in capsys.readouterr().out
    for line, code in (
        ("a c --push nobody/m", "upload.failed"),
        ("a d --push m", "option.conflict"),
        ("a e.gguf --push me/m", "option.conflict"),
    ):
        assert cli.main(["convert", *line.split()]) == 1
        assert f"[{code}]" in capsys.readouterr().err
    assert [path.name for path in sorted(Path().iterdir())] == ["a", "b", "c"]


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
