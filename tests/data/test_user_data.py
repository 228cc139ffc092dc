"""Text or shards → a dataset: nothing lost, no overlap of the parts, all of it logged."""

import shutil
import sys

import numpy as np
import pytest
from support.refused import refused

from llmpy.data import builtin
from llmpy.data.shards import write_shard
from llmpy.data.tokenizer import EOT, Tokenizer
from llmpy.data.user_data import prepare

TEXT = "".join(f"Line {i}: the {'quick brown fox' if i % 3 else 'lazy dog'} — {i * 7919}.\n" for i in range(200))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "in" / "book.txt"
    path.parent.mkdir()
    path.write_text(TEXT, "utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "one"


def whole(dataset, part):
    return dataset.tokenizer.decode(np.concatenate([s.tokens[:] for s in getattr(dataset, part)]))


def test_text_round_trips_through_its_shards(text, folder, said):
    dataset = prepare([text], folder, log=said.append)
    assert sorted(p.name for p in folder.iterdir()) == ["tokenizer.json", "train.bin", "val.bin"]
    train, val = whole(dataset, "train"), whole(dataset, "val")
    assert train.startswith(EOT)
    assert val.startswith(EOT)
    assert train.removeprefix(EOT) + val.removeprefix(EOT) == TEXT
    assert train.endswith("\n")  # cut after a line
    assert 0.05 < len(val) / len(TEXT) < 0.15
    assert dataset.vocab_size == dataset.tokenizer.vocab_size <= 512
    assert Tokenizer.load(folder / "tokenizer.json").encode(TEXT) == dataset.tokenizer.encode(TEXT)
    counts = len(dataset.train[0]), len(dataset.val[0])
    assert said[:4] == [
        f"training    1 file, {len(TEXT):,} characters, UTF-8: book.txt",
        "validation  the last tenth of the training text",
        f"tokenizer: byte-level BPE trained on this text, {dataset.vocab_size} tokens, {len(TEXT) / sum(counts):.2f} "
        "characters per token",
        f"{counts[0]:,} training tokens, {counts[1]:,} validation tokens",
    ]
    assert "'<|endoftext|>Line 0: the lazy dog" in said[4]


def test_builtin(folder, said):
    dataset = prepare(None, folder, log=said.append)
    documents = builtin.builtin_documents()
    assert said[0] == builtin.describe(documents)
    assert "sha256" in said[0]
    assert 700_000 < sum(len(d.text) for d in documents) < 1_500_000
    assert len({d.text for d in documents}) == len(documents)
    train, val = whole(dataset, "train"), whole(dataset, "val")
    parts = train.split(EOT)[1:], val.split(EOT)[1:]
    assert sorted(parts[0] + parts[1]) == sorted(d.text for d in documents)
    assert 0.05 < len(val) / (len(train) + len(val)) < 0.2
    # no paragraph of the validation part is in the training part
    seen = {" ".join(p.split()) for p in train.split("\n\n")}
    paragraphs = [" ".join(p.split()) for p in val.split("\n\n") if len(p) > 200]
    assert len(paragraphs) > 20
    assert sum(p in seen for p in paragraphs) <= len(paragraphs) // 50


def test_builtin_without_topics(monkeypatch, folder, said):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with refused("data.builtin-missing", "llmpy train --data"):
        prepare(None, folder, log=said.append)


def test_a_vocabulary_too_small_for_bytes(text, folder, said):
    with refused("tokenizer.vocab-too-small", "256", "--vocab-size 257"):
        prepare([text], folder, vocab_size=256, log=said.append)
    assert not folder.parent.exists()


def test_invalid_input_creates_no_folder(tmp_path, folder, said):
    (tmp_path / "bad.txt").write_bytes(b"\xff" * 2000)
    for name, code in (("bad.txt", "data.not-utf8"), ("missing.txt", "file.missing")):
        with refused(code, tmp_path / name):
            prepare([tmp_path / name], folder, log=said.append)
    assert not folder.parent.exists()


# token shards


def make_shards(folder, *names, size=1000):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        write_shard(folder / name, (np.arange(size) + i * size) % 50257)
    return folder


@pytest.mark.parametrize("how", ["folder", "pattern", "files", "no suffix"])
def test_shards(tmp_path, folder, said, how):
    names = ["x_train_000001.bin", "x_train_000002.bin", "x_val_000000.bin"]
    where = make_shards(tmp_path / "data", *names)
    paths = {"folder": [where], "pattern": [where / "x_*.bin"], "files": [where / n for n in names]}
    if how == "no suffix":  # the content decides, not the name
        for name in names:
            (where / name).rename(where / name.replace(".bin", ""))
    dataset = prepare(paths.get(how, [where]), folder, log=said.append)
    assert [int(s.tokens[:1][0]) for s in dataset.train] == [0, 1000]
    assert [int(s.tokens[:1][0]) for s in dataset.val] == [2000]
    assert (dataset.vocab_size, dataset.tokenizer) == (50257, None)
    assert said[0].startswith(f"training    2 token shards, 2,000 tokens: {names[0].removesuffix('.bin')}")
    assert said[1].startswith(f"validation  1 token shard, 1,000 tokens: {names[2].removesuffix('.bin')}")
    assert "tokenizer.json" in said[2]
    assert "50,257" in said[2]
    assert said[3] == "2,000 training tokens, 1,000 validation tokens"
    assert "[0, 1, 2" in said[4]
    assert not folder.exists()


@pytest.mark.parametrize("name", ["tokens.bin", "medieval_train.bin"])
def test_a_single_shard_gives_both_parts(tmp_path, folder, said, name):
    where = make_shards(tmp_path / "data", "a.bin", name) if name == "tokens.bin" else make_shards(tmp_path, name)
    dataset = prepare([where], folder, log=said.append)
    assert name in said[1]
    assert len(dataset.train[-1]) == 900
    assert len(dataset.val[0]) == 100
    assert dataset.val[0].tokens[:][0] == dataset.train[-1].tokens[:][-1] + 1


def test_shards_with_their_tokenizer(text, tmp_path, folder, said):
    made = prepare([text], tmp_path / "made", log=said.append)
    again = prepare([tmp_path / "made"], folder, log=said.append)
    assert again.vocab_size == made.vocab_size
    assert whole(again, "train") == whole(made, "train")
    assert any(line.startswith("tokenizer: ") and "made" in line for line in said)
    with refused("tokenizer.vocab-mismatch", tmp_path / "made" / "tokenizer.json", "999", "--vocab-size"):
        prepare([tmp_path / "made"], folder, vocab_size=999, log=said.append)


def test_shards_of_another_vocabulary(tmp_path, folder, said):
    where = make_shards(tmp_path / "data", "a.bin")
    with refused("shard.outside-vocabulary", where / "a.bin", "token 500 at position 500", "500 tokens"):
        prepare([where], folder, vocab_size=500, log=said.append)
    assert prepare([where], folder, vocab_size=1000, log=said.append).vocab_size == 1000


def test_text_and_shards_together(text, tmp_path, folder, said):
    where = make_shards(tmp_path / "data", "a.bin")
    with refused("data.mixed", where / "a.bin", text):
        prepare([where, text], folder, log=said.append)
    (where / "README.md").write_text("About these tokens.")
    prepare([where], folder, log=said.append)
    assert any("README.md" in line for line in said)
    shutil.copy(text, where)
    said.clear()
    with refused("data.mixed", where / "book.txt"):
        prepare([where], folder, log=said.append)


def test_a_bin_that_is_not_a_shard(tmp_path, folder, said):
    path = tmp_path / "train.bin"
    path.write_bytes(b"<!DOCTYPE html>" + b" " * 5000)
    with refused("shard.unrecognized", path, "b'<!DOCTYPE html>"):
        prepare([path], folder, log=said.append)
    assert not folder.exists()


def test_shards_of_several_types(tmp_path, folder, said):
    write_shard(tmp_path / "train.bin", np.arange(1, 5000))
    write_shard(tmp_path / "labels.bin", np.arange(1, 5000), "int32")
    with refused("shard.mixed-types", "int32, uint16"):
        prepare([tmp_path], folder, log=said.append)
