"""Held-out data is never trained on; files that are no data are listed, data that cannot be read stops the run."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.refused import refused

from llmpy.data.dataset_folder import data
from llmpy.data.file_roles import choose
from llmpy.data.shards import fingerprint, open_shard, write_shard
from llmpy.data.tokenizer import EOT, Tokenizer
from llmpy.data.user_data import prepare
from llmpy.options.data import DataOptions

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def text(name: str, lines: int = 100) -> str:
    return "".join(f"{name} writes line {i} and {i * 7919}.\n" for i in range(lines))


def rows(name: str, count: int = 100) -> str:
    return "".join(json.dumps({"text": f"{name} has row {i}, {i * 7919}."}) + "\n" for i in range(count))


def lay(folder: Path, files: dict[str, str | bytes]) -> Path:
    """Write files; a str that starts with `->` is a link's target."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str) and content.startswith("->"):
            path.symlink_to(content[2:])
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def content(name: str) -> str | bytes:
    """Return content that is unique for a name, of its kind."""
    return rows(name) if name.endswith(".jsonl") else text(name)


def chosen(
    folder: Path, files: list[str], said: list[str], val: list[str] | None = None
) -> tuple[list[str], list[str]]:
    """Return the names of the files to train and to validate on."""
    given = choose([folder / f for f in files], val and [folder / f for f in val], log=said.append)
    return tuple([str(f.path.relative_to(folder)) for f in part] for part in (given.train, given.val))  # type: ignore[return-value]


# what is held out


@pytest.mark.parametrize(
    ("train", "val", "out"),
    [
        (["train.jsonl"], ["validation.jsonl"], ["test.jsonl"]),
        (["train.txt"], ["val.txt"], []),
        (["wiki.train.tokens"], ["wiki.valid.tokens"], ["wiki.test.tokens"]),
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
         ["data/validation-00000-of-00001.jsonl"],
         ["data/test-00000-of-00001.jsonl"]),
        (["train/a.txt", "train/b.txt"], ["dev/a.txt"], ["test/a.txt"]),
        (["book.txt", "latest.txt", "contest.txt", "devil.md", "evaluate.md"], [], ["TEST2.txt"]),
        (["medieval_train.txt", "invalid.txt"], ["x_EVAL_01.txt"], []),
        (["TinyStoriesV2-GPT4-train.txt"], ["TinyStoriesV2-GPT4-valid.txt"], []),
        (["val/train.txt"], ["train/val.txt"], []),
        (["book.txt"], ["held_out.txt", "hold-out/a.txt", "my_validate.txt"], []),
        (["trainData.txt", "trainset.jsonl"], ["valData.txt", "VALSet.txt", "devset.txt"], ["testset.txt"]),
        (["traindata.txt", "a.trn.txt"], ["valdata/x.txt", "evals.txt"], ["testdata/y.txt", "tests/z.txt", "tst.txt"]),
        (["testimony.txt", "testbed.md", "devotion.txt", "valley/a.txt", "data.txt"], [], []),
        (["train.cs", "train.en"], ["val.cs", "val.en"], ["test.pl"]),
    ],
)  # fmt: skip
def test_names_of_files_and_folders(
    tmp_path: Path, said: list[str], train: list[str], val: list[str], out: list[str]
) -> None:
    lay(tmp_path, {name: content(name) for name in (*train, *val, *out)})
    assert chosen(tmp_path, ["."], said) == (sorted(train), sorted(val))
    assert said == [f"left out    test data: {', '.join(out)}"] * bool(out)
    tops = sorted({name.partition("/")[0] for name in (*train, *val, *out)})
    if len(tops) > 1:  # as a shell expands FOLDER/*, and as we do
        assert chosen(tmp_path, tops, said) == chosen(tmp_path, ["*"], said) == (sorted(train), sorted(val))


@pytest.mark.parametrize("name", ["test.txt", "val.txt", "dev/my eval.txt", "test-*.txt"])
def test_a_file_given_alone_is_the_text(tmp_path: Path, said: list[str], name: str) -> None:
    there = name.replace("*", "1")
    lay(tmp_path, {there: text("a")})
    assert chosen(tmp_path, [name], said) == ([there], [])


@pytest.mark.parametrize("how", ["train", "data"])
@pytest.mark.parametrize("tokens", [None, 1000])
def test_validation_files_are_held_out_whole(tmp_path: Path, said: list[str], how: str, tokens: int | None) -> None:
    folder = lay(tmp_path / "in", {f"{name}.jsonl": rows(name) for name in ("train", "validation", "test")})
    if how == "train":
        if tokens:
            return
        out = prepare([folder], tmp_path / "run", 257, said.append).train[0].path.parent
    else:
        options = DataOptions(what=(str(folder),), tokenizer="bytes", tokens=tokens, out=tmp_path / "out")
        out = data(options, said.append)
    made = prepare([out], tmp_path / "other", None, said.append)
    parts = {}
    for part, name in ((made.train, "train"), (made.val, "validation")):
        assert made.tokenizer is not None
        parts[name] = made.tokenizer.decode(part[0].tokens[:])
        whole = "".join(EOT + json.loads(line)["text"] for line in rows(name).splitlines())
        assert whole.startswith(parts[name])
        assert len(whole) == len(parts[name]) or tokens
    if tokens:
        assert (len(made.train[0]), len(made.val[0])) == (900, 100)
    assert any(line.startswith("left out") and "test.jsonl" in line for line in said)
    assert any(line.startswith("training") and "100 documents: train.jsonl" in line for line in said)
    assert any(line.startswith("validation") and "100 documents: validation.jsonl" in line for line in said)


@pytest.mark.parametrize(
    ("given", "val", "train", "held"),
    [
        (["a.txt"], ["b.txt"], ["a.txt"], ["b.txt"]),
        (["a.txt"], ["test.txt"], ["a.txt"], ["test.txt"]),
        (["val.txt"], ["b.txt"], ["val.txt"], ["b.txt"]),
        (["a.txt", "val.txt", "test.txt"], ["b.txt"], ["a.txt"], ["b.txt"]),
        (["a.txt", "val.txt"], ["val.txt"], ["a.txt"], ["val.txt"]),
        (["a.txt"], ["more"], ["a.txt"], ["more/train.txt", "more/x.txt"]),
    ],
)
def test_val(
    tmp_path: Path, said: list[str], given: list[str], val: list[str], train: list[str], held: list[str]
) -> None:
    names = ["a.txt", "b.txt", "val.txt", "test.txt", "more/x.txt", "more/train.txt"]
    lay(tmp_path, {name: content(name) for name in names} | {"more/README.md": "About"})
    assert chosen(tmp_path, given, said, val) == (train, held)


def test_val_in_train_and_data(tmp_path: Path, said: list[str]) -> None:
    lay(tmp_path, {"a.txt": text("a"), "b.txt": text("b", 20)})
    direct = prepare([tmp_path / "a.txt"], tmp_path / "run", 300, said.append, val=[tmp_path / "b.txt"])
    assert direct.tokenizer is not None
    assert direct.tokenizer.decode(direct.val[0].tokens[:]) == EOT + text("b", 20)
    assert direct.tokenizer.decode(direct.train[0].tokens[:]) == EOT + text("a")
    options = DataOptions(what=(str(tmp_path / "a.txt"),), val=(tmp_path / "b.txt",), tokenizer="bpe:300")
    folder = data(DataOptions(**vars(options) | {"out": tmp_path / "out"}), said.append)
    for name in ("train.bin", "val.bin", "tokenizer.json"):
        assert (folder / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    with refused("dataset.not-alone", "--val"):
        data(DataOptions(what=("tinyshakespeare",), val=(tmp_path / "b.txt",)), said.append)
    with refused("option.missing", "--val", "--data"):
        prepare(None, tmp_path / "new", log=said.append, val=[tmp_path / "b.txt"])


@pytest.mark.parametrize(
    ("code", "given", "val", "names"),
    [
        ("split.no-training-data", ["only"], None, ["val.txt", "test.txt"]),
        ("split.no-training-data", ["val.txt", "only/test.txt"], None, ["val.txt"]),
        ("split.overlap", ["a.txt"], ["a.txt"], ["a.txt", "--val"]),
        ("split.overlap", ["a.txt", "b.jsonl"], ["link.txt"], ["a.txt"]),
        ("split.overlap", ["a.txt"], ["copy.txt"], ["1 of 1"]),
        ("split.overlap", ["b.jsonl"], ["some.jsonl"], ["20 of 40"]),
        ("split.overlap", ["tokens.bin"], ["tokens-copy.bin"], ["tokens-copy.bin"]),
        ("split.ambiguous", ["a.txt", "train-test.txt"], None, ["training", "test"]),
        ("split.ambiguous", ["links"], None, ["training", "validation"]),
        ("data.mixed", ["a.txt"], ["tokens.bin"], ["a.txt", "tokens.bin"]),
        ("data.empty", ["a.txt"], ["doc"], ["README.md"]),
        ("data.too-short", ["a.txt"], ["blank.txt"], ["validation"]),
    ],
)
def test_no_split(
    tmp_path: Path, said: list[str], code: str, given: list[str], val: list[str] | None, names: list[str]
) -> None:
    for name in ("tokens.bin", "tokens-copy.bin"):
        write_shard(tmp_path / name, np.arange(1, 5000))
    lay(tmp_path, {
        "a.txt": text("a"), "copy.txt": text("a"), "val.txt": text("v"), "only/val.txt": text("v"),
        "only/test.txt": text("t"), "link.txt": "->a.txt", "train-test.txt": text("b"), "doc/README.md": "x" * 2000,
        "links/train.txt": text("c"), "links/val.txt": "->train.txt", "blank.txt": " \n" * 2000,
        "b.jsonl": rows("b"), "some.jsonl": rows("b", 20) + rows("c", 20),
    })  # fmt: skip
    with refused(code, *names):
        prepare(
            [tmp_path / f for f in given], tmp_path / "run", None, said.append, val=val and [tmp_path / f for f in val]
        )
    assert not (tmp_path / "run").exists()


def test_documents_that_datasets_repeat(tmp_path: Path, said: list[str]) -> None:
    """Headings of wikitext are in all its parts."""
    lay(tmp_path, {"train.jsonl": rows("a") + rows("x", 1), "valid.jsonl": rows("b", 60) + rows("x", 1)})
    prepare([tmp_path], tmp_path / "run", 300, said.append)
    assert "caution     1 of 61 validation documents are also training documents" in said


@pytest.mark.parametrize(
    ("names", "train", "val", "out"),
    [
        (["medieval_train_000001", "medieval_val_000000"], [0], [1], ""),
        (["medieval_000001", "medieval_000002"], [0, 1], [1], ""),
        (["train", "interval"], [1, 0], [0], ""),
        (["a", "test_01", "val"], [0], [2], "test_01.bin"),
        (["train/x_000001", "val/x_000001"], [0], [1], ""),
    ],
)
def test_shards(tmp_path: Path, said: list[str], names: list[str], train: list[int], val: list[int], out: str) -> None:
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_shard(tmp_path / f"{name}.bin", np.arange(1000) + 1000 * i)
    dataset = prepare([tmp_path], tmp_path / "run", log=said.append)
    assert [int(shard.tokens[:1][0]) // 1000 for shard in dataset.train] == train
    assert [int(shard.tokens[:1][0]) // 1000 for shard in dataset.val] == val
    assert [line for line in said if line.startswith("left out")] == [f"left out    test data: {out}"] * bool(out)
    with refused("data.already-tokens", "llmpy train --data"):
        data(DataOptions(what=(str(tmp_path),)), said.append)


@pytest.mark.parametrize("before", [([0, 1, 2], [3]), ([0], [1, 2, 3]), ([0, 1, 2, 3], None)])
def test_a_resumed_run_keeps_its_split(
    tmp_path: Path, said: list[str], before: tuple[list[int], list[int] | None]
) -> None:
    names = ["a", "interval", "test", "val"]  # 0.1.0 trained on test and held out interval
    shards = []
    for i, name in enumerate(names):
        write_shard(tmp_path / f"{name}.bin", np.arange(1000) + 1000 * i)
        shards.append(prepare([tmp_path / f"{name}.bin"], tmp_path / "run", log=said.append))
    marks: dict[str, Any] = {}
    whole = [fingerprint(open_shard(tmp_path / f"{name}.bin", 50257)) for name in names]
    marks["train"] = [whole[i] for i in before[0]]
    marks["val"] = [whole[i] for i in before[1] or ()]
    if before[1] is None:  # a tenth of the last was held out
        last = shards[before[0][-1]]
        marks = {"train": [*marks["train"][:-1], fingerprint(last.train[0])], "val": [fingerprint(last.val[0])]}
    again = prepare([tmp_path], tmp_path / "run", log=said.append, before=marks)
    assert {"train": sorted(map(str, map(fingerprint, again.train))), "val": [*map(fingerprint, again.val)]} == {
        "train": sorted(map(str, marks["train"])), "val": marks["val"]
    }  # fmt: skip
    del marks["train"][0]  # other data: they are divided by name, and the run is refused later
    again = prepare([tmp_path], tmp_path / "run", log=said.append, before=marks)
    assert [shard.path.name for shard in again.val] == ["val.bin"]


# what cannot be read


README = {"README.md": "# About\n" * 500}
NANOGPT: dict[str, str | bytes] = {
    "input.txt": text("i"), "prepare.py": "import os\n", "readme.md": "About", "meta.pkl": pickle.dumps({1: 2}),
    "train.bin": np.arange(1, 500, dtype="<u2").tobytes(), "val.bin": np.arange(1, 90, dtype="<u2").tobytes(),
}  # fmt: skip


@pytest.mark.parametrize("beside", [README, {"a.txt": text("a")}, {"train.jsonl": rows("a")}])
@pytest.mark.parametrize(
    ("code", "name", "content", "says"),
    [
        ("file.lfs-pointer", "train.parquet", LFS, "git lfs pull"),
        ("file.lfs-pointer", "more.jsonl", LFS, "git lfs pull"),
        ("file.lfs-pointer", "data.jsonl.gz", LFS, "git lfs pull"),
        ("record.unknown-fields", "more.jsonl", '{"foo": 1}\n', "foo"),
        ("record.unknown-fields", "qa.json", '{"question": "q"}\n{"question": "r"}\n', "question"),
        ("record.unknown-fields", "nested.json", '{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}', "version"),
        ("record.unknown-fields", "train.json", '{"version": 1}', "version"),
        ("record.unknown-fields", "poems.json", json.dumps({"one": text("a"), "two": "b"}), "one"),
        ("record.unknown-fields", "squad.json", '{"data": [{"paragraphs": [{"context": ""}, {"qas": 1}]}]}', "data"),
        ("data.not-text", "half.txt", bytes(5000), "interrupted download"),
        ("data.empty", "val.txt", "", "Restore"),
        ("record.not-json", "more.jsonl", rows("b", 3) + "{", "line 4"),
        ("file.corrupt", "train.parquet", "<html>404</html>", "parquet"),
        ("data.not-text", "a.zip", b"PK\x03\x04\0\0", "zip"),
        ("data.not-text", "a.tar", b"a.txt".ljust(257, b"\0") + b"ustar\x0000", "tar"),
        ("data.not-text", "a.jsonl.zst", b"\x28\xb5\x2f\xfd\0", "zstd"),
        ("data.not-text", "a.txt.xz", b"\xfd7zXZ\0", "xz"),
        ("data.not-text", "a.txt.bz2", b"BZh91AY&SY", "bzip2"),
        ("data.not-text", "book.pdf", b"%PDF-1.7\n", "PDF"),
        ("data.not-text", "data-00000-of-00001.arrow", b"\xff\xff\xff\xff\x10\0\0\0", "load_from_disk"),
        ("data.not-text", "a.npy", b"\x93NUMPY\1\0", "NumPy"),
        ("data.not-text", "meta.pkl", pickle.dumps({1: 2}), "pickle"),
        ("data.not-text", "a.db", b"SQLite format 3\0", "SQLite"),
        ("data.not-text", "a.xyz", b"ab\0\1\2", "NUL"),
        ("data.not-utf8", "old.dat", b"caf\xe9", "byte 0xe9 at offset 3"),
        ("shard.unrecognized", "train.bin", np.arange(1, 500, dtype="<u2").tobytes(), "nanoGPT"),
        ("file.dangling-link", "more", "->/nowhere/at/all", "/nowhere/at/all"),
        ("file.dangling-link", "more.txt", "->more.txt", "more.txt"),
    ],
)
def test_data_that_cannot_be_read(
    tmp_path: Path,
    said: list[str],
    beside: dict[str, str | bytes],
    code: str,
    name: str,
    content: str | bytes,
    says: str,
) -> None:
    folder = lay(tmp_path / "in", {**beside, name: content})
    with refused(code, folder / name, says):
        prepare([folder], tmp_path / "run", 300, said.append)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (NANOGPT, ["3 files", "train.bin", "val.bin", "meta.pkl", "nanoGPT"]),
        ({f"train-{i}.parquet": LFS for i in range(9)} | README, ["9 files", "train-0.parquet", "and 4 more"]),
        ({"a.txt": b"\xff" * 9, "b.md": b"\0", "c.jsonl": '{"a": 1}\n', "d.txt": text("d")},
         ["3 files", "a.txt", "b.md", "c.jsonl"]),
        ({"d/data.arrow": b"\xff\xff\xff\xff\x10\0\0\0", "x.zip": b"PK\x03\x04", "d/state.json": "{}"},
         ["2 files", "data.arrow"]),
    ],
)  # fmt: skip
def test_all_of_them_are_named(
    tmp_path: Path, said: list[str], files: dict[str, str | bytes], names: list[str]
) -> None:
    with refused("data.unusable", *names):
        prepare([lay(tmp_path / "in", files)], tmp_path / "run", 300, said.append)


def test_unused_files_may_be_unreadable(tmp_path: Path, said: list[str]) -> None:
    lay(tmp_path, {"train.txt": text("a"), "test.zip": b"PK\x03\x04", "test-2.txt": "->nowhere"})
    assert chosen(tmp_path, ["."], said)[0] == ["train.txt"]
    assert said == ["left out    test data: test-2.txt, test.zip"]


@pytest.mark.parametrize(
    ("files", "train", "out"),
    [
        ({k: v for k, v in NANOGPT.items() if k in ("input.txt", "prepare.py", "readme.md")}, ["input.txt"],
         ["prepare.py", "readme.md"]),
        ({"a.jsonl": rows("a"), "LICENSE": "MIT", "load.ipynb": "{}" * 9999, "cover.png": b"\x89PNG", "x.yaml": "a: 1"},
         ["a.jsonl"], ["LICENSE", "cover.png", "load.ipynb", "x.yaml"]),
        ({"a.py": "x = 1\n" * 500, "test/test_b.py": "y = 1\n" * 500, "dev.md": "About", "requirements.txt": "numpy",
          "package.json": "{}"},
         ["a.py", "dev.md", "requirements.txt", "test/test_b.py"], ["package.json"]),
        ({"_chat.txt": text("a"), "PTT-1.opus": b"OggS\0", "v.3gp": b"\0\0\0", "Thumbs.db": b"\xd0\xcf\x11\xe0",
          "~$notes.docx": b"\5", "app.json": b"\xef\xbb\xbf" b'{"log": {"level": "x"}}'},
         ["_chat.txt"], ["PTT-1.opus", "v.3gp", "Thumbs.db", "~$notes.docx", "app.json"]),
        ({"one.md": text("a"), "two.md": text("b"), "README.md": "About"}, ["one.md", "two.md"], ["README.md"]),
        ({"LICENSES and lies.txt": text("a"), "CITATION.cff": "x", "empty.txt": ""}, ["LICENSES and lies.txt"],
         ["CITATION.cff", "empty.txt"]),
        ({f"{i}.txt": text("a") for i in range(3)} | {f"{i}.jpg": b"\xff\xd8" for i in range(9)},
         ["0.txt", "1.txt", "2.txt"], [f"{i}.jpg" for i in range(5)] + ["and 4 more"]),
    ],
)  # fmt: skip
def test_files_that_are_no_data(
    tmp_path: Path, said: list[str], files: dict[str, str | bytes], train: list[str], out: list[str]
) -> None:
    assert chosen(lay(tmp_path, files), ["."], said)[0] == train
    assert all(line.startswith("left out") for line in said)
    assert all(any(name in line for line in said) for name in out), said
    assert bool(said) == bool(out)


@pytest.mark.parametrize(
    ("code", "files"),
    [
        ("data.empty", README),
        ("data.empty", {"README.md": "x", "LICENSE.txt": "MIT" * 999, "a.png": b"\x89PNG"}),
        ("data.empty", {"config.json": "{\n}" * 999, "vocab.json": "{\n}"}),
        ("data.mixed", {"words.txt": "a few words", "main.c": "int main;\n" * 500}),
    ],
)
def test_nothing_that_is_meant_to_be_trained_on(
    tmp_path: Path, said: list[str], code: str, files: dict[str, str | bytes]
) -> None:
    with refused(code, *[name for name in files if code == "data.mixed"]):
        chosen(lay(tmp_path, files), ["."], said)
    if "README.md" in files:  # but it is used if named itself
        assert chosen(tmp_path, ["README.md"], said)[0] == ["README.md"]


def test_shards_with_other_files(tmp_path: Path, said: list[str]) -> None:
    write_shard(tmp_path / "train.bin", np.arange(1, 250))
    Tokenizer.bytes().save(tmp_path / "tokenizer.json")
    lay(tmp_path, {"dataset.json": "{}", "train.py": "x", "README.md": "x", "model.bin": np.int32(20240326).tobytes()})
    assert chosen(tmp_path, ["."], said)[0] == ["train.bin"]
    assert [line.rpartition(" ")[2] for line in said] == ["README.md", "model.bin", "train.py"]
    lay(tmp_path, {"more.jsonl": rows("a")})
    with refused("data.mixed", "train.bin", "more.jsonl"):
        chosen(tmp_path, ["."], said)


@pytest.mark.parametrize(
    ("links", "names"),
    [
        ({"in/sub": "->../far"}, ["a.txt", "sub/b.txt", "sub/c/d.txt"]),
        ({"in/a link.txt": "->../far/b.txt"}, ["a link.txt", "a.txt"]),
        ({"in/0": "->../far", "in/1": "->../far/c"}, ["0/b.txt", "0/c/d.txt", "a.txt"]),
        ({"in/self": "->.", "in/up/down": "->../up", "in/up/x.txt": text("x")}, ["a.txt", "up/x.txt"]),
        (
            {
                "in/hub/blobs/1f": rows("a"),
                "in/hub/blobs/2e": "a card",
                "in/hub/refs/main": "c0ffee",
                "in/hub/snapshots/c0/train.jsonl": "->../../blobs/1f",
                "in/hub/snapshots/c0/README.md": "->../../blobs/2e",
            },
            ["a.txt", "hub/snapshots/c0/train.jsonl"],
        ),  # the cache of huggingface_hub
        ({"in/0": "->z", "in/z/val.txt": text("z")}, ["a.txt", "z/val.txt"]),  # by their own names
    ],
)
def test_links_are_followed_once(tmp_path: Path, said: list[str], links: dict[str, Any], names: list[str]) -> None:
    lay(tmp_path, {"in/a.txt": text("a"), "far/b.txt": text("b"), "far/c/d.txt": text("d"), **links})
    train, val = chosen(tmp_path / "in", ["."], said)
    assert sorted(train + val) == names
    assert val == [name for name in names if "val" in name]


@pytest.mark.skipif(os.name == "nt" or not os.getuid(), reason="root reads everything")
def test_permissions(tmp_path: Path, said: list[str]) -> None:
    lay(tmp_path, {"a.txt": text("a"), "b.txt": text("b")})
    (tmp_path / "b.txt").chmod(0)
    with refused("file.unreadable", tmp_path / "b.txt"):
        chosen(tmp_path, ["."], said)
