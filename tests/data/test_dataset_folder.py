"""`llmpy data`: complete folders of tokens, ready for training, identical to llm.c's where that is deterministic."""

import functools
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.refused import refused
from support.samples import SHARED, needs_data

from llmpy.cli import main as cli
from llmpy.data import dataset_folder, pipeline
from llmpy.data.dataset_folder import data, find_dataset
from llmpy.data.datasets import SOURCES
from llmpy.data.hellaswag import read_examples
from llmpy.data.loader import Loader
from llmpy.data.rank_tables import parse_llmc
from llmpy.data.records import Document
from llmpy.data.shards import open_shard
from llmpy.data.tokenizer import EOT, Tokenizer
from llmpy.data.user_data import Vocabulary, prepare
from llmpy.options.data import DataOptions

SPEECHES = [f"Speaker {i}:\nLine {i * i} of the play, and another.\n\n" for i in range(300)]


@pytest.fixture
def raw(tmp_path):
    path = tmp_path / "input.txt"
    path.write_text("".join(SPEECHES) + "The end.\n")
    return path


def make(said, *what, **options):
    return data(DataOptions(what=tuple(map(str, what)), **({"tokenizer": "bytes"} | options)), said.append)


def tokens(folder, name):
    return open_shard(folder / name, 50257).tokens[:]


def text(folder, *names):
    ids = np.concatenate([tokens(folder, name) for name in names])
    return Tokenizer.load(folder / "tokenizer.json").decode(ids)


@functools.cache
def shakespeare():
    """Return GPT-2's tokenizer, and tinyshakespeare as llm.c prepares it."""
    gpt2 = Tokenizer.load(SHARED / "gpt2.tiktoken")
    original = (SHARED / "tinyshakespeare.txt").read_text("utf-8")
    return gpt2, gpt2.encode(EOT + original.replace("\n\n", "\n\n" + EOT))


@needs_data
@pytest.mark.parametrize("form", ["auto", "int32"])
def test_tinyshakespeare_is_llmcs(tmp_path, said, form):
    options = {"source": SHARED / "tinyshakespeare.txt", "tokenizer": str(SHARED / "gpt2.tiktoken"), "format": form}
    folder = make(said, "tinyshakespeare", out=tmp_path / "out", **options)
    train, val = tokens(folder, "tiny_shakespeare_train.bin"), tokens(folder, "tiny_shakespeare_val.bin")
    assert (len(train), len(val)) == (305_260, 32_768)
    gpt2, marked = shakespeare()
    assert np.array_equal(np.concatenate([val, train]), marked)
    size = (folder / "tiny_shakespeare_train.bin").stat().st_size
    assert size == (611_544 if form == "auto" else 4 * 305_260)
    if form == "int32":
        assert parse_llmc((folder / "gpt2_tokenizer.bin").read_bytes()) == gpt2.ranks()


def test_output_folder_and_log(raw, tmp_path, said):
    folder = make(said, "tinyshakespeare", source=raw, tokens=9000)
    assert folder == tmp_path / "cache" / "tinyshakespeare" / "bytes-9000"
    assert sorted(p.name for p in folder.iterdir()) == [
        "dataset.json", "tiny_shakespeare_train.bin", "tiny_shakespeare_val.bin", "tokenizer.json",
    ]  # fmt: skip
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    whole = text(folder, "tiny_shakespeare_val.bin", "tiny_shakespeare_train.bin")
    assert whole == (EOT + EOT.join(SPEECHES))[: len(whole)]
    record = json.loads((folder / "dataset.json").read_text())
    assert record["files"] == {"tiny_shakespeare_val.bin": 900, "tiny_shakespeare_train.bin": 8100}
    assert EOT in said[-2]
    assert said[-1].startswith(f"wrote {folder}")
    assert said[-1].endswith(f"llmpy train --data {folder}")
    said.clear()
    assert make(said, "tinyshakespeare", source=raw, tokens=9000) == folder
    assert len(said) == 1
    assert str(folder) in said[0]


def test_another_source_of_existing_tokens(raw, tmp_path, said):
    other = tmp_path / "other.txt"
    other.write_text("x" * 20_000 + "\n\nand more.\n")
    folder = make(said, "tinyshakespeare", source=raw)
    before = (folder / "tiny_shakespeare_train.bin").read_bytes()
    said.clear()
    make(said, "tinyshakespeare", source=other)
    make(said, "tinyshakespeare")
    assert (folder / "tiny_shakespeare_train.bin").read_bytes() == before
    assert len(said) == 2
    assert all(str(folder) in line and str(raw) in line for line in said)


def own_text(folder, *names):
    """Return the training and validation text joined. The rest of a cut document is a document, with EOT."""
    return "".join(text(folder, name).removeprefix(EOT) for name in names)


def test_the_users_own_text(raw, tmp_path, said, monkeypatch):
    folder = make(said, raw, tokenizer="bpe:300", out=tmp_path / "out")
    assert said[0] == f"training    1 file, {len(raw.read_text()):,} characters, UTF-8: input.txt"
    assert sum("characters, UTF-8" in line for line in said) == 1  # though read twice
    assert own_text(folder, "train.bin", "val.bin") == raw.read_text()
    share = len(tokens(folder, "val.bin")) / len(tokens(folder, "train.bin"))
    assert 0.08 < share < 0.14
    monkeypatch.chdir(tmp_path)
    assert make(said, raw) == Path("data/input")
    assert make(said, "in*.tx?") == Path("data/in")
    assert make(said, raw, out=tmp_path / "a name") == tmp_path / "a name"
    assert said[-1].endswith(f"--data '{tmp_path / 'a name'}'")
    with refused("folder.not-empty", "data/input", "llmpy train --data data/input", "--out"):
        make(said, raw)


def test_several_shards(raw, tmp_path, said, monkeypatch):
    monkeypatch.setattr(pipeline, "SHARD_TOKENS", 5000)
    monkeypatch.setattr(pipeline, "SEEKABLE", 10_000)
    folder = make(said, raw, out=tmp_path / "out")
    names = sorted(p.name for p in folder.glob("train_*.bin"))
    assert names == ["train_000001.bin", "train_000002.bin", "train_000003.bin"]
    assert own_text(folder, *names, "val.bin") == raw.read_text()
    dataset = prepare([folder], tmp_path / "run", log=said.append)
    assert (len(dataset.train), len(dataset.val), dataset.vocab_size) == (3, 1, 257)
    with refused("data.too-large", "llmpy data"):
        prepare([raw], tmp_path / "run", 257, said.append)


@pytest.mark.parametrize("most", [2**31 - 1, 8000])
def test_llmcs_names_and_split(raw, tmp_path, said, monkeypatch, most):
    """One training file, unless llm.c could not read it to the end; shards for the web."""
    monkeypatch.setattr(pipeline, "SHARD_TOKENS", 3000)
    monkeypatch.setattr(pipeline, "SEEKABLE", most)
    folder = make(said, "tinyshakespeare", source=raw, out=tmp_path / "a")
    names = sorted(p.name for p in folder.glob("*train*"))
    assert names[0] == ("tiny_shakespeare_train.bin" if most > 8000 else "tiny_shakespeare_train_000001.bin")
    assert text(folder, "tiny_shakespeare_val.bin", *names) == EOT + EOT.join([*SPEECHES, "The end.\n"])
    pages = [Document("x", raw.read_text())] * 2
    web = SOURCES["fineweb"]
    layout = replace(web.layout, val=3000)
    monkeypatch.setitem(SOURCES, "fineweb", replace(web, documents=lambda *_: iter(pages), layout=layout))
    folder = make(said, "fineweb", source=raw, out=tmp_path / "b")
    assert [p.name for p in sorted(folder.glob("*.bin"))][:2] == [
        "fineweb_train_000001.bin",
        "fineweb_train_000002.bin",
    ]
    assert len(tokens(folder, "fineweb_val_000000.bin")) == len(tokens(folder, "fineweb_train_000001.bin")) == 3000


def test_end_of_text_within_a_page(tmp_path, said, monkeypatch):
    """It is ordinary text in named datasets and in records, and separates documents in plain text."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": f"They write {EOT} there. " * 60}) + "\n")
    folder = make(said, "fineweb", source=path, out=tmp_path / "a")
    ids = np.concatenate([tokens(folder, p.name) for p in sorted(folder.glob("*.bin"), reverse=True)])
    assert np.count_nonzero(ids == 256) == 1
    (tmp_path / "b.txt").write_text(json.loads(path.read_text())["text"])
    for source, separators in ((path, 2), (tmp_path / "b.txt", 61)):
        folder = make(said, source, out=tmp_path / source.suffix)
        ids = np.concatenate([tokens(folder, p.name) for p in sorted(folder.glob("*.bin"))])
        assert np.count_nonzero(ids == 256) == separators


def test_stories_hold_the_first_file_out(tmp_path, said):
    """Even if --tokens leaves no more than that file, there are training tokens."""
    raw = tmp_path / "raw"
    raw.mkdir()
    for i in range(3):
        (raw / f"data{i:02}.json").write_text(stories(i))
    folder = make(said, "tinystories", source=raw, out=tmp_path / "out")
    assert text(folder, "TinyStories_val.bin").count("Story 0.") == 50
    assert "Story 0." not in text(folder, "TinyStories_train.bin")
    assert text(folder, "TinyStories_train.bin").count(EOT + "Story") == 100
    few = make(said, "tinystories", source=raw, out=tmp_path / "few", tokens=400)
    assert (len(tokens(few, "TinyStories_val.bin")), len(tokens(few, "TinyStories_train.bin"))) == (40, 360)


def test_only_completions_count(tmp_path, said):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "completion": f"{2 * i}"}) + "\n" for i in range(400)))
    folder = make(said, path, out=tmp_path / "out")
    shard = open_shard(folder / "train.bin", 257)
    plain = Tokenizer.bytes()
    assert any(line.startswith("the loss counts") for line in said)
    inputs, targets = Loader([shard], 2, 64, shuffle=True, vocab_size=257).next()
    assert (targets == -1).any()
    for row, target in zip(inputs, targets, strict=True):
        learned = target[target >= 0]
        assert "+" not in plain.decode(learned)
        assert "=" not in plain.decode(learned)
        assert np.array_equal(target[:-1][target[:-1] >= 0], row[1:][target[:-1] >= 0])


def test_hellaswag(tmp_path, said):
    raw = tmp_path / "val.jsonl"
    rows = [{"ctx": f"Man {i}", "endings": ["runs", "sits", "eats", "is"], "label": i % 4} for i in range(20)]
    raw.write_text("\n".join(map(json.dumps, rows)))
    folder = make(said, "hellaswag", source=raw, out=tmp_path / "out")
    examples = read_examples(folder / "hellaswag_val.bin", 257)
    assert [example.label for example in examples] == [i % 4 for i in range(20)]
    assert said[-1] == f"wrote {folder}"  # not for training
    with refused("option.conflict", "--tokenizer"):
        make(said, "hellaswag", source=raw, out=tmp_path / "b", tokenizer="bpe:300")


def test_training_by_name(raw, tmp_path, said, cache, monkeypatch):
    monkeypatch.setattr(Tokenizer, "gpt2", classmethod(lambda cls, log: cls.bytes()))
    monkeypatch.setattr("llmpy.data.datasets.fetch", lambda *_, **__: raw)
    monkeypatch.chdir(tmp_path)
    dataset = prepare([Path("tinyshakespeare")], tmp_path / "run", log=said.append)
    assert dataset.train[0].path == cache / "tinyshakespeare" / "gpt2" / "tiny_shakespeare_train.bin"
    assert dataset.vocab_size == 257
    with refused("dataset.evaluation-only", "hellaswag", "tinyshakespeare"):
        find_dataset("hellaswag", said.append)
    raw.with_name("tinystories").mkdir()  # a local folder takes precedence
    with refused("data.empty", "no files"):
        prepare([Path("tinystories")], tmp_path / "run", log=said.append)


def test_missing_tokens_are_written(raw, tmp_path, said, cache, monkeypatch):
    """All of TinyStories; a portion of the web, which is reused until all of it exists."""
    monkeypatch.setattr(Tokenizer, "gpt2", classmethod(lambda cls, log: cls.bytes()))
    folder = tmp_path / "stories"
    folder.mkdir()
    for i in range(2):
        (folder / f"data{i:02}.json").write_text(stories(i))
    monkeypatch.setattr("llmpy.data.datasets.from_hub", lambda *_, **__: folder)
    monkeypatch.chdir(tmp_path)
    dataset = prepare([Path("tinystories")], tmp_path / "run", log=said.append)
    assert dataset.train[0].path == cache / "tinystories" / "gpt2" / "TinyStories_train.bin"
    assert dataset.tokenizer.decode(dataset.train[0].tokens[:]).count("Story 1.") == 50
    web = replace(SOURCES["fineweb"], documents=lambda *_: iter([Document("x", raw.read_text())] * 3), portion=5000)
    monkeypatch.setitem(SOURCES, "fineweb", web)
    for _ in range(2):
        dataset = prepare([Path("fineweb")], tmp_path / "run", log=said.append)
        assert (len(dataset.train[0]), len(dataset.val[0])) == (4500, 500)
        assert dataset.train[0].path.parent == cache / "fineweb" / "gpt2-5000"
    assert sum("5,000" in line and "llmpy data fineweb" in line for line in said) == 1
    monkeypatch.setattr("llmpy.data.pipeline.SHARD_TOKENS", 10_000)
    monkeypatch.setitem(SOURCES, "fineweb", replace(web, layout=replace(web.layout, val=1000)))
    whole = data(DataOptions(what=("fineweb",)), said.append)
    assert find_dataset("fineweb", said.append) == whole == cache / "fineweb" / "gpt2"
    # for a model with another tokenizer the tokens are its own; the file's formatting does not matter
    own = Tokenizer.train([raw.read_text()], 300)
    own.save(tmp_path / "own.json")
    model = Vocabulary(300, tmp_path / "own.json", lambda: (own, "the model's"))
    first = prepare([Path("tinystories")], tmp_path / "run", log=said.append, model=model)
    assert first.tokenizer.same_tokens(own)
    (tmp_path / "own.json").write_text(json.dumps(json.loads((tmp_path / "own.json").read_text())))
    again = prepare([Path("tinystories")], tmp_path / "run", log=said.append, model=model)
    assert again.train[0].path == first.train[0].path


def stories(i):
    return json.dumps([{"story": f"Story {i}.{j}."} for j in range(50)])


COMMAND = "import sys; from llmpy.cli.main import main; sys.exit(main(sys.argv[1:]))"


def test_concurrent_processes(raw, tmp_path, said):
    """The second waits for the first and uses its result."""
    out = tmp_path / "own"
    words = [sys.executable, "-c", COMMAND, "data", raw, "--tokenizer", "bytes", "--out", out]
    with dataset_folder._workplace(out, print):  # until both have started
        both = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "ab"]
        waiting = [process.stdout.readline() for process in both]
    ends = [process.communicate(timeout=60) for process in both]
    assert all(line.startswith("waiting for ") and line.endswith(f"{out}\n") for line in waiting)
    assert [process.returncode for process in both] == [0, 0], ends
    last = next(end for end in ends if "llmpy train" not in end[0])
    assert f"{raw} is already in {out}\n" in last[0]
    assert len(tokens(out, "train.bin")) > 10_000
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["tinyshakespeare", "fineweb"], ["tinyshakespeare", "[dataset.not-alone]"]),
        (["{raw}", "--source", "{raw}"], ["--source", "[dataset.source-unnamed]"]),
        (["tinyshakespeare", "--source", "nowhere"], ["nowhere", "[file.missing]"]),
        (["{raw}", "--tokenizer", "nowhere.json"], ["nowhere.json", "[tokenizer.missing]"]),
        (["{raw}", "--tokenizer", "gpt3"], ["gpt2, bytes, bpe:N", "[tokenizer.missing]"]),
        (["{raw}", "--tokenizer", "bytes", "--out", "."], ["--out .", "[folder.in-use]"]),
        (["{raw}", "--tokenizer", "bpe:5"], ["--tokenizer bpe:5", "257"]),
        (["{raw}", "--tokenizer", "{raw}"], ["input.txt", "[tokenizer.invalid]"]),
        (["{raw}", "--tokens", "0"], ["--tokens 0"]),
        (["{raw}", "--tokenizer", "bytes", "--out", "{raw}"], ["input.txt", "[folder.not-empty]"]),
        (["tiny"], ["tiny", "[file.missing]"]),
    ],
)
def test_errors_leave_no_files(raw, tmp_path, capsys, monkeypatch, words, names):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", *(word.format(raw=raw) for word in words)]) == 1
    error = capsys.readouterr().err
    assert all(name in error for name in names), error
    assert error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["input.txt"]


def test_a_full_disk(raw, tmp_path, said, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "_spool", full)
    with refused("file.unwritable", "out.tmp", "No space left on device"):
        make(said, raw, out=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["input.txt"]


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("at", ["given_tokenizer", "write_tokens"])
def test_a_signal_leaves_no_files(raw, tmp_path, monkeypatch, capsys, at, number):
    """Neither the folder, nor its hidden lock and workplace."""
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("nohup")
    monkeypatch.setattr(dataset_folder, at, lambda *_: signal.raise_signal(number))
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert cli.main(["data", str(raw), "--tokenizer", "bytes", "--out", str(tmp_path / "a" / "out")]) == 128 + number
    assert list(tmp_path.iterdir()) == [raw]
    word = "Ctrl-C" if number == signal.SIGINT else number.name
    assert capsys.readouterr().err.endswith(f"llmpy: error: stopped by {word} [stopped]\n")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
