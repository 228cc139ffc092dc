"""From text or shards to a dataset: nothing lost, nothing in both parts, everything said."""

import shutil
import sys

import numpy as np
import pytest

from llmpy.data import builtin
from llmpy.data.prepare import prepare
from llmpy.data.shards import write_shard
from llmpy.data.tokenizer import EOT, Tokenizer
from llmpy.errors import LlmpyError

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
    return dataset.tokenizer.decode(np.concatenate([s.tokens for s in getattr(dataset, part)]))


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
    assert dataset.bytes_per_token == pytest.approx(len(val.removeprefix(EOT).encode()) / sum(map(len, dataset.val)))
    assert Tokenizer.load(folder / "tokenizer.json").encode(TEXT) == dataset.tokenizer.encode(TEXT)
    counts = len(dataset.train[0]), len(dataset.val[0])
    assert said[:3] == [
        f"1 file, {len(TEXT):,} characters, UTF-8",
        f"tokenizer: byte-level BPE trained on this text, {dataset.vocab_size} tokens, {len(TEXT) / sum(counts):.2f} "
        "characters per token",
        f"{counts[0]:,} training tokens, {counts[1]:,} validation tokens",
    ]
    assert said[3].startswith("it begins: '<|endoftext|>Line 0: the lazy dog")


def test_builtin(folder, said):
    dataset = prepare(None, folder, log=said.append)
    documents = builtin.builtin_documents()
    assert said[0] == builtin.describe(documents)
    assert "sha256" in said[0]
    assert 200_000 < sum(len(d.text) for d in documents) < 1_000_000
    assert len({d.text for d in documents}) == len(documents)
    train, val = whole(dataset, "train"), whole(dataset, "val")
    parts = train.split(EOT)[1:], val.split(EOT)[1:]
    assert sorted(parts[0] + parts[1]) == sorted(d.text for d in documents)
    assert 0.05 < len(val) / (len(train) + len(val)) < 0.2
    # held out means unseen: no paragraph of the validation part stands in the training part
    seen = {" ".join(p.split()) for p in train.split("\n\n")}
    paragraphs = [" ".join(p.split()) for p in val.split("\n\n") if len(p) > 200]
    assert len(paragraphs) > 20
    assert sum(p in seen for p in paragraphs) <= len(paragraphs) // 50


def test_builtin_without_topics(monkeypatch, folder, said):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(LlmpyError, match="carries no text .* — give a text file"):
        prepare(None, folder, log=said.append)


def test_a_vocabulary_too_small_for_bytes(text, folder, said):
    with pytest.raises(LlmpyError, match="--vocab-size 257 or more"):
        prepare([text], folder, vocab_size=256, log=said.append)
    assert not folder.parent.exists()


def test_nothing_is_made_when_the_input_is_refused(tmp_path, folder, said):
    (tmp_path / "bad.txt").write_bytes(b"\xff" * 2000)
    for wrong in (tmp_path / "bad.txt", tmp_path / "missing.txt"):
        with pytest.raises(LlmpyError):
            prepare([wrong], folder, log=said.append)
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
    assert [s.tokens[0] for s in dataset.train] == [0, 1000]
    assert [s.tokens[0] for s in dataset.val] == [2000]
    assert (dataset.vocab_size, dataset.tokenizer, dataset.bytes_per_token) == (50257, None, None)
    assert said[0] == "3 token shards, 3,000 tokens"
    assert "no tokenizer.json beside them: vocabulary of 50,257 tokens, samples show token ids" in said[1]
    assert said[2] == "2,000 training tokens, 1,000 validation tokens"
    assert said[3].startswith("it begins: [0, 1, 2")
    assert not folder.exists()


@pytest.mark.parametrize("name", ["tokens.bin", "only_val.bin"])
def test_a_single_shard_gives_both_parts(tmp_path, folder, said, name):
    where = make_shards(tmp_path / "data", "a.bin", name) if name == "tokens.bin" else make_shards(tmp_path, name)
    dataset = prepare([where], folder, log=said.append)
    assert f"the last tenth of {name} is held out" in said[1]
    assert len(dataset.train[-1]) == 900
    assert len(dataset.val[0]) == 100
    assert dataset.val[0].tokens[0] == dataset.train[-1].tokens[-1] + 1


def test_shards_with_their_tokenizer(text, tmp_path, folder, said):
    made = prepare([text], tmp_path / "made", log=said.append)
    again = prepare([tmp_path / "made"], folder, log=said.append)
    assert again.vocab_size == made.vocab_size
    assert again.bytes_per_token == made.bytes_per_token
    assert whole(again, "train") == whole(made, "train")
    assert any(line.startswith("tokenizer: ") and "made" in line for line in said)
    with pytest.raises(LlmpyError, match=r"tokenizer\.json has .* not the 999 .* — leave --vocab-size out"):
        prepare([tmp_path / "made"], folder, vocab_size=999, log=said.append)


def test_shards_of_another_vocabulary(tmp_path, folder, said):
    where = make_shards(tmp_path / "data", "a.bin")
    with pytest.raises(LlmpyError, match="token 500 at position 500 is outside the vocabulary of 500 tokens"):
        prepare([where], folder, vocab_size=500, log=said.append)
    assert prepare([where], folder, vocab_size=1000, log=said.append).vocab_size == 1000


def test_text_and_shards_together(text, tmp_path, folder, said):
    where = make_shards(tmp_path / "data", "a.bin")
    with pytest.raises(LlmpyError, match=r"both token shards \(.*a\.bin\) and text \(.*book\.txt\).* — give one"):
        prepare([where, text], folder, log=said.append)
    (where / "README.md").write_text("About these tokens.")
    prepare([where], folder, log=said.append)
    assert "skipped 1 file beside the shards: README.md …" in said
    shutil.copy(text, where)
    with pytest.raises(LlmpyError, match="both token shards"):
        prepare([where], folder, log=said.append)


def test_a_bin_that_is_no_shard_says_what_it_is(tmp_path, folder, said):
    path = tmp_path / "train.bin"
    path.write_bytes(b"<!DOCTYPE html>" + b" " * 5000)
    with pytest.raises(
        LlmpyError, match=r"train\.bin is not a token shard of llm\.c: it starts with b'<!DOCTYPE html>"
    ):
        prepare([path], folder, log=said.append)
    assert not folder.exists()


def test_shards_of_several_kinds(tmp_path, folder, said):
    write_shard(tmp_path / "train.bin", np.arange(1, 5000))
    write_shard(tmp_path / "labels.bin", np.arange(1, 5000), "int32")
    with pytest.raises(LlmpyError, match="several kinds beside each other: int32, uint16"):
        prepare([tmp_path], folder, log=said.append)
