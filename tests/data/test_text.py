"""Reading the user's text: exactly, or an error with file, position and hint."""

import gzip
import os
import unicodedata
from pathlib import Path

import pytest
from support.refused import refused

from llmpy.data.file_roles import choose
from llmpy.data.text import find_files, stream_files
from llmpy.errors import LlmpyError
from llmpy.run.folder import is_ours

LONG = "A line of text, and another one.\n" * 40  # 1,320 characters


def read(said, *paths):
    return list(stream_files(choose(paths, log=said.append).train, said.append))


def write(folder, name, content=LONG):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_one_file(tmp_path, said):
    path = write(tmp_path, "a.txt")
    (document,) = read(said, path)
    assert document.text == LONG
    assert document.source == str(path)
    assert said == ["training    1 file, 1,320 characters, UTF-8: a.txt"]


def test_folders_are_read_in_order(tmp_path, said):
    for name in ("z.txt", "sub/b.md", "sub/a.py", "sub/deep/c", "b.TXT"):
        write(tmp_path, name)
    write(tmp_path, ".hidden.txt", "secret")
    write(tmp_path, ".git/config", "secret")
    write(tmp_path, "picture.png", b"\x89PNG\r\n\x1a\n\0\0\0")
    write(tmp_path, "none.txt", "")
    documents = read(said, tmp_path)
    names = [os.path.relpath(d.source, tmp_path) for d in documents]
    assert names == ["b.TXT", "sub/b.md", "sub/deep/c", "z.txt"]
    assert said == [
        "left out    empty: none.txt",
        "left out    no text: picture.png",
        "left out    scripts and settings: sub/a.py",
        "training    4 files, 5,280 characters, UTF-8: b.TXT, sub/b.md, sub/deep/c, z.txt",
    ]


def test_a_file_found_twice_counts_once(tmp_path, said):
    folder = tmp_path / "folder"
    path = write(folder, "a.txt")
    write(folder, "b.txt")
    (folder / "link.txt").symlink_to(path)
    assert len(read(said, path, folder, path)) == 2


def test_pattern_in_quotes(tmp_path, said):
    for name in ("b1.txt", "b2.txt", "c.txt"):
        write(tmp_path, name)
    assert [f.path.name for f in find_files([tmp_path / "b*.txt"])] == ["b1.txt", "b2.txt"]
    odd = write(tmp_path, "odd[1].txt")  # an existing name is not a pattern
    assert [f.path for f in find_files([odd])] == [odd]
    with refused("file.missing", tmp_path / "x*.txt"):
        read(said, tmp_path / "x*.txt")


@pytest.mark.parametrize(
    ("encoding", "name"),
    [("utf-8-sig", "UTF-8"), ("utf-16", "UTF-16"), ("utf-16-be", "UTF-16"), ("utf-8", "UTF-8")],
)
def test_encodings_with_a_mark(tmp_path, said, encoding, name):
    text = "Größe 日本 🙂\n" * 100
    (document,) = read(said, write(tmp_path, "a.txt", ("\ufeff" * encoding.endswith("be") + text).encode(encoding)))
    assert document.text == text
    assert said == [f"training    1 file, {len(text):,} characters, {name}: a.txt"]


def test_line_ends_and_composition(tmp_path, said):
    decomposed = unicodedata.normalize("NFD", "é")
    (document,) = read(said, write(tmp_path, "a.txt", LONG.replace("\n", "\r\n") + decomposed + "\r"))
    assert document.text == LONG + decomposed + "\r"  # only \r\n changes


def test_end_of_text_separates_documents(tmp_path, said):
    content = f"<|endoftext|>{LONG}<|endoftext|>\n<|endoftext|>{LONG}"
    assert [d.text for d in read(said, write(tmp_path, "a.txt", content))] == [LONG, LONG]
    assert said == ["training    1 file, 2,640 characters, UTF-8, 2 documents: a.txt"]


def test_records_are_recognised(tmp_path, said):
    write(tmp_path, "a.jsonl", '{"text": "one"}\n{"text": "two\\n"}\n')
    write(tmp_path, "b.jsonl.gz", gzip.compress(b'{"prompt": "2+2=", "completion": "4"}\n' * 2))
    write(tmp_path, "z.txt")
    documents = read(said, tmp_path)
    assert [d.text for d in documents] == ["one", "two\n", "2+2=4", "2+2=4", LONG]
    assert documents[2].counted == ((4, 5),)
    assert said == [
        "a.jsonl: 2 records, text",
        "b.jsonl.gz: 2 records, prompt + completion",
        "training    3 files, 1,337 characters, UTF-8, jsonl, jsonl.gz, 5 documents: a.jsonl, b.jsonl.gz, z.txt",
    ]
    write(tmp_path, "log.jsonl", '{"step": 1}\n')  # not for training
    for path in (tmp_path, tmp_path / "log.jsonl"):
        with refused("record.unknown-fields", tmp_path / "log.jsonl", "line 1", "step", "text, prompt"):
            read(said, path)


@pytest.mark.parametrize("through_folder", [False, True])
@pytest.mark.parametrize(
    ("content", "code", "names"),
    [
        (LONG.encode() + b"caf\xe9 au lait", "data.not-utf8", ["UTF-8", "byte 0xe9 at offset 1,323 ", "iconv"]),
        (b"\xef\xbb\xbf" + LONG.encode() + b"\xff", "data.not-utf8", ["byte 0xff at offset 1,323 "]),
        (b"\xff\xfe" + LONG.encode("utf-16-le") + b"\0", "data.not-utf8", ["UTF-16-LE", "byte 0x00 at offset 2,642 "]),
        (LONG.encode() + b"\0", "data.not-text", ["character 1,320 is NUL"]),
        (LONG.encode("utf-16-le"), "data.not-text", ["character 1 is NUL", "UTF-16"]),
        (bytes(999), "data.not-text", ["interrupted download"]),
        (LONG.encode("utf-32"), "data.not-text", ["character 0 is NUL"]),
        (b"\x1f\x8b\x08\0" + LONG.encode(), "data.not-text", ["gzip"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "file.lfs-pointer", ["git lfs pull"]),
        (b"%PDF-1.7\n" + LONG.encode(), "data.not-text", ["PDF"]),
    ],
)
def test_files_that_are_not_text(tmp_path, said, content, code, names, through_folder):
    path = write(tmp_path, "bad.txt", content)
    with refused(code, path, *names):
        read(said, tmp_path if through_folder else path)


@pytest.mark.parametrize("content", [" \n" * 2000, "x" * 999])
def test_too_little_text(tmp_path, said, content):
    characters = len(content) if content.strip() else 0
    with refused("data.too-short", "1 file, ", f" {characters} characters", "1,000"):
        read(said, write(tmp_path, "a.txt", content))


def test_missing(tmp_path, said):
    write(tmp_path, "shakespeare.txt")
    with refused("file.missing", tmp_path / "shakspeare.txt", "shakespeare.txt?"):
        read(said, tmp_path / "shakspeare.txt")
    with refused("file.missing", tmp_path / "no" / "b.txt"):
        read(said, tmp_path / "no" / "b.txt")


def test_a_pipe(tmp_path, said):
    os.mkfifo(tmp_path / "pipe")
    with refused("file.not-regular", tmp_path / "pipe"):
        read(said, tmp_path / "pipe")
    with refused("file.not-regular", tmp_path / "pipe"):
        read(said, tmp_path)


def test_a_name_that_is_too_long(said):
    with pytest.raises(LlmpyError, match="x" * 300) as error:
        find_files([Path("x" * 300)])
    assert error.value.code in ("file.unreadable", "file.missing")


def test_run_folders_within_are_skipped(tmp_path, said):
    """Otherwise logs and samples would become training data, which would change with every run."""
    write(tmp_path, "a.txt")
    for name in ("metrics.jsonl", "samples.txt"):
        write(tmp_path, f"runs/done/{name}")
    (tmp_path / "runs" / "done" / "config.json").write_text('{"options": {"model": "d1"}}', "utf-8")
    for name in ("run.lock", "console.log"):
        write(tmp_path, f"runs/new/{name}")
    write(tmp_path, "model/config.json")
    names = [os.path.relpath(f.path, tmp_path) for f in find_files([tmp_path], is_ours)]
    assert names == ["a.txt", "model/config.json"]
    assert len(find_files([tmp_path / "runs" / "done"], is_ours)) == 3  # but not if named


@pytest.mark.parametrize("name", ["a.jsonlines", "a.txt", "part-00000", "a.jl"])
def test_json_lines_by_any_name(name: str, tmp_path: Path, said: list[str]) -> None:
    path = write(tmp_path, name, '{"text": "%s"}\n' % ("x" * 999) * 2)
    assert [d.text for d in read(said, path)] == ["x" * 999] * 2


@pytest.mark.parametrize("name", ["a.txt", "blob", "app.log"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("before", ["", '"id": "a\\"}", "n": -1.5, "meta": {"a": [1]}, "no": null, '])
@pytest.mark.parametrize("array", [False, True])
def test_records_in_files_of_any_name(tmp_path, said, name, encoding, before, array):
    row = f'{{{before}"text": "{"ü" * 999}"}}'
    content = f"[\n{row},\n{row}]" if array else f"{row}\n{row}\n"
    (tmp_path / name).write_text(content, encoding)
    assert [d.text for d in read(said, tmp_path / name)] == ["ü" * 999] * 2
