"""The kernel cache: a file that is not exactly as it was written is compiled again; nobody else can write one."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numba import typeof
from numba.core import compiler, serialize

from llmpy import backend
from llmpy.backend import cpu, kernel_cache
from llmpy.backend.cpu import apart, jit
from llmpy.system import cache, durable

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")


def twice(x):
    x[0] = x[0] * 2


def thrice(x):
    x[0] = x[0] * 3


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    made = tmp_path / "kernels"
    made.mkdir(mode=0o700)
    monkeypatch.setattr(kernel_cache, "FOLDER", made)
    monkeypatch.setattr(kernel_cache, "problem", "")
    return made


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of three kernels."""
    made = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_cache, "FOLDER", made)
        patch.setattr(kernel_cache, "problem", "")
        start(), start(thrice), start(dtype=np.float32)
    return made


@pytest.fixture
def filled(folder: Path, written: Path) -> Path:
    """A copy of that cache."""
    return Path(shutil.copytree(written, folder, dirs_exist_ok=True))


def start(function: Callable = twice, dtype: Any = np.float64) -> bool:
    """Use a kernel as a new process does, and check its product; return whether it came from the cache."""
    compiled = jit._compiled(function)
    x = np.full(1, 7, dtype)
    compiled(x)
    assert x[0] == (14 if function is twice else 21)
    return bool(compiled.stats.cache_hits)


def kernels(folder: Path, name: str = "twice") -> list[Path]:
    return sorted(folder.glob(f"{name}-*.kernel"))


def test_a_kernel_is_compiled_once_for_each_type(filled: Path) -> None:
    assert start() and start(thrice) and start(dtype=np.float32)
    assert not start(dtype=np.int64) and start(dtype=np.int64)
    assert len(kernels(filled)) == 3 and len(list(filled.iterdir())) == 4
    assert all(path.stat().st_mode & 0o022 == 0 for path in filled.iterdir()) or sys.platform == "win32"


def test_sources_are_part_of_the_key(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache, "_source", lambda path: b"edited")
    assert not start() and start() and len(kernels(filled)) == 3


def place_of(function: Callable, dtype: Any = np.float64) -> Path:
    """Return the file of a kernel."""
    compiled = jit._compiled(function)
    place: Path = compiled._cache._place((typeof(np.zeros(1, dtype)),), compiled.targetctx.codegen())[0]
    return place


def flipped(path: Path, other: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1 << random.Random(at).randrange(8)
    path.write_bytes(data)


def cut(path: Path, other: Path, share: float = 0.5) -> None:
    os.truncate(path, int(share * path.stat().st_size))


def linked(path: Path, other: Path) -> None:
    shutil.copy(path, path.parent.parent / "elsewhere")
    path.unlink()
    path.symlink_to(path.parent.parent / "elsewhere")


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def evil(path: Path, other: Path) -> None:
    """A pickle that writes a file when it is loaded, with a hash of its bytes alone."""

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (path.parent.parent / "run",)

    payload = serialize.dumps(Evil())
    path.write_bytes(hashlib.blake2b(payload).digest() + payload)


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "a bit of the hash": lambda path, other: flipped(path, other, 0.0),
    "a bit in the middle": flipped,
    "the last bit": lambda path, other: flipped(path, other, 1.0),
    "half": cut,
    "empty": lambda path, other: cut(path, other, 0.0),
    "longer": lambda path, other: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros after a power failure": lambda path, other: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path, other: path.write_text("moved"),
    "another kernel's file": lambda path, other: shutil.copy(other, path),
    "the file of another type": lambda path, other: shutil.copy(place_of(twice, np.float32), path),
    "foreign code": evil,
    "a folder": lambda path, other: replaced(path, Path.mkdir),
    "a folder with a file": lambda path, other: replaced(path, lambda new: (new.mkdir(), (new / "a").touch())),
}
if sys.platform != "win32":
    DAMAGE |= {
        "a link": linked,
        "a pipe": lambda path, other: replaced(path, os.mkfifo),
        "writable by others": lambda path, other: path.chmod(0o666),
    }
if hasattr(os, "geteuid") and os.geteuid() == 0:
    DAMAGE["another user's file"] = lambda path, other: os.chown(path, 12345, 12345)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_corrupt_kernel_is_compiled_again(filled: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, other = place_of(twice), place_of(thrice)
    DAMAGE[name](path, other)
    assert not start()
    assert (str(path) in capsys.readouterr().err) == ("link" not in name and "folder" not in name)
    assert path.is_file() and not path.is_symlink()
    assert start() and start(thrice) and start(dtype=np.float32)
    assert capsys.readouterr().err == "" and not (filled.parent / "run").exists()


@pytest.mark.parametrize("count", [8, pytest.param(1000, marks=pytest.mark.fuzz)])
def test_random_damage(filled: Path, count: int) -> None:
    """Bits, lengths, and files that take each other's place: always the right product, and then from the cache."""
    draw = random.Random(count)
    for _ in range(count):
        path, other = draw.sample(sorted(filled.iterdir()), 2)
        kind = draw.randrange(4)
        if kind == 0:
            flipped(path, other, draw.random())
        elif kind == 1:
            cut(path, other, draw.random())
        elif kind == 2:
            path.rename(filled / "aside")
            other.rename(path)
            (filled / "aside").rename(other)
        else:
            path.write_bytes(draw.randbytes(draw.randrange(5000)))
        uses = (twice, np.float64), (thrice, np.float64), (twice, np.float32)
        hits = [start(*use) for use in uses]
        assert hits.count(False) == (2 if kind == 2 else 1)
        assert all(start(*use) for use in uses)


def test_processes_that_start_at_once(folder: Path) -> None:
    """Each compiles, and writes whole files."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    children = []
    for _ in range(3):
        if not (child := os.fork()):
            code = 1
            try:
                start(), start(thrice)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 3
    assert start() and start(thrice) and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_cache_that_cannot_be_written(
    folder: Path, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One warning, and every kernel works."""

    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(durable, "replace", fails)
    assert not start() and not start() and not start(thrice)
    (line,) = capsys.readouterr().err.splitlines()
    assert str(folder) in line and os.strerror(number) in line and "LLMPY_CACHE_DIR" in line
    kernel_cache.mark_cached("twice", "float64")
    assert list(folder.iterdir()) == []


def test_a_cache_that_can_only_be_read_is_read(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an image of a container."""
    monkeypatch.setattr(kernel_cache, "seal", None)
    assert start()


@pytest.mark.parametrize(
    ("owner", "name"), [(compiler.CompileResult, "_rebuild"), (compiler.CompileResult, "_reduce"), (serialize, "loads")]
)
def test_another_numba(
    filled: Path, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No cache and one warning, if what we use of Numba is gone."""
    if name == "_reduce":
        place_of(twice).unlink(), place_of(thrice).unlink()
    monkeypatch.delattr(owner, name)
    assert not start() and not start(thrice)
    (line,) = capsys.readouterr().err.splitlines()
    assert "no kernel cache" in line and name in line


# The folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder in a folder in a folder, all safe."""
    folder = tmp_path.resolve() / "a" / "b" / "c"
    folder.mkdir(parents=True)
    for place in (folder, folder.parent, folder.parent.parent):
        place.chmod(0o755)
    return folder


@posix
@pytest.mark.parametrize(
    ("modes", "guilty"),
    [
        ((0o755, 0o755, 0o755), None),
        ((0o755, 0o755, 0o777), "c"),
        ((0o755, 0o755, 0o775), "c"),
        ((0o755, 0o777, 0o700), "b"),
        ((0o770, 0o700, 0o700), "a"),
        ((0o702, 0o700, 0o700), "a"),
        ((0o1777, 0o755, 0o700), None),  # like /tmp
        ((0o755, 0o1775, 0o700), None),
        ((0o755, 0o755, 0o1777), "c"),  # anybody can put a file there
    ],
)
def test_who_can_write(tree: Path, modes: tuple[int, ...], guilty: str | None) -> None:
    for place, mode in zip((tree.parent.parent, tree.parent, tree), modes, strict=True):
        place.chmod(mode)
    why = cache.exposed(tree)
    assert why == "" if guilty is None else f"/{guilty} is owned or writable by other users" in why


@posix
@pytest.mark.parametrize(("owner", "safe"), [(1_234_567, False), (0, True)])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_whose_folders(tree: Path, name: str, owner: int, safe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    real, places = os.stat, dict(zip("cba", (tree, *tree.parents), strict=False))

    def other(path: Any, **more: Any) -> Any:
        status = real(path, **more)
        named = str(path).endswith(f"/{name}")
        return SimpleNamespace(st_uid=owner, st_gid=0, st_mode=status.st_mode) if named else status

    monkeypatch.setattr(os, "stat", other)
    assert cache.exposed(tree) == ("" if safe else f"{places[name]} is owned or writable by other users")


@posix
def test_links_are_resolved(tree: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tree)
    assert cache.exposed(link) == ""
    tree.parent.chmod(0o777)
    assert str(tree.parent.resolve()) in cache.exposed(link)
    assert str(tree.parent.resolve()) in cache.exposed(tmp_path / "link" / ".." / "c")


@posix
@pytest.mark.parametrize(
    ("group", "members", "private"),
    [("ann", [], True), ("ann", ["ann"], True), ("ann", ["ann", "bob"], False), ("users", [], False)],
)
def test_a_group_of_one(
    tree: Path, group: str, members: list[str], private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Debian, where umask is 002 and every user has a group."""
    import grp
    import pwd

    tree.chmod(0o2775)
    me, gid = os.stat(tree).st_uid, os.stat(tree).st_gid
    monkeypatch.setattr(os, "geteuid", lambda: me or 1000)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_name="ann", pw_uid=uid, pw_gid=gid))
    monkeypatch.setattr(grp, "getgrgid", lambda gid: SimpleNamespace(gr_name=group, gr_gid=gid, gr_mem=members))
    assert (cache.exposed(tree) == "") == private


@posix
def test_the_folder_is_found_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPY_CACHE_DIR", str(tmp_path / "new"))
    before = os.umask(0)
    try:
        folder, why = cache.trusted_folder("kernels", "x")
    finally:
        os.umask(before)
    assert folder is not None and why == "" and stat.S_IMODE(folder.stat().st_mode) == 0o755
    folder.parent.chmod(0o777)
    assert cache.trusted_folder("kernels", "x") == (None, f"{folder.parent} is owned or writable by other users")
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("LLMPY_CACHE_DIR", str(wrong))
        folder, why = cache.trusted_folder("kernels", "x")
        assert folder is None and str(tmp_path / "file") in why


def test_a_refused_folder_is_named(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ops: Any = backend.load("cpu", threads=1)
    monkeypatch.setattr(cpu, "smallest_calls", lambda ops, family: [("adamw", lambda: None)])
    monkeypatch.setattr(kernel_cache, "FOLDER", None)
    monkeypatch.setattr(kernel_cache, "problem", "/shared is writable by other users")
    monkeypatch.setattr(kernel_cache, "_compiled", set())
    ops.warm_up(said.append)
    assert "/shared is writable by other users" in said[0] and "LLMPY_CACHE_DIR" in said[0]
    said.clear()
    ops.warm_up(said.append)
    assert said == []  # compiled once in this process


def test_every_kernel_is_taken_once(tmp_path: Path) -> None:
    one, other = (apart.taken(tmp_path, "abcd") for _ in range(2))
    assert [next(one), next(other), *one, *other] == ["a", "b", "c", "d"]
    shutil.rmtree(tmp_path)
    assert not [*apart.taken(tmp_path, "e")]


def test_another_process_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(apart, "cores", lambda: 2)
    with apart.shared(["global_norm", "narrow", "adamw"], "bfloat16", "gpt2"):
        pass  # takes none
    found = {path.name for path in tmp_path.rglob("*.*") if path.suffix in (".done", ".kernel")}
    assert {"global_norm.bfloat16.done", "narrow.bfloat16.done", "adamw.bfloat16.done"} < found
    assert len(found) >= 6


def test_helpers_end_with_an_error_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "cores", lambda: 3)
    begun, start, sleep = list[Any](), subprocess.Popen, [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: begun.append(start(sleep)) or begun[-1])
    with pytest.raises(KeyboardInterrupt), apart.shared(["a", "b", "c"], "float32", "gpt2"):
        raise KeyboardInterrupt
    assert len(begun) == 2 and all(process.poll() is not None for process in begun)
