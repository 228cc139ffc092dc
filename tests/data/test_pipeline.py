"""Text becomes the same tokens by `train` and `data`: split, encoded, written."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.laptop import Laptop
from support.refused import refused

from llmpy.data import encode, pipeline
from llmpy.data.dataset_folder import data
from llmpy.data.pipeline import choose_vocab_size, divided
from llmpy.data.records import Document
from llmpy.data.shards import open_shard
from llmpy.data.tokenizer import Tokenizer
from llmpy.data.user_data import Vocabulary, prepare
from llmpy.options.data import DataOptions
from llmpy.options.train import TrainOptions
from llmpy.train.assemble import train

TEXT = "".join(f"Line {i}: the {'quick brown fox' if i % 3 else 'lazy dog'} — {i * 7919}.\n" for i in range(200))
CHAT = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i * i}!"}] for i in range(300)]


@pytest.fixture
def source(tmp_path, request):
    """A text, or conversations, where only answers count."""
    path = tmp_path / request.param
    rows = (json.dumps({"messages": messages}) for messages in CHAT)
    path.write_text(TEXT if path.suffix == ".txt" else "\n".join(rows), "utf-8")
    return path


def documents(*lengths):
    return [Document(str(i), ("line\n" * n)[: n - 1] + "\n") for i, n in enumerate(lengths)]


def split(documents):
    parts = list(divided(lambda log: documents, print).read())
    assert [held for held, _ in parts] == sorted(held for held, _ in parts)
    return [d for held, d in parts if not held], [d for held, d in parts if held]


def test_split_at_the_document_boundary_nearest_to_nine_tenths():
    many = documents(*[100] * 47)
    train, val = split(many)
    assert train + val == many
    assert len(val) == 5


@pytest.mark.parametrize("lengths", [[1000], [10, 1000], [1000, 2, 10], [500, 500], [300, 300, 300, 300]])
def test_split_inside_a_document(lengths):
    all_documents = documents(*lengths)
    train, val = split(all_documents)
    joined = "".join(d.text for d in all_documents)
    assert "".join(d.text for d in train) + "".join(d.text for d in val) == joined
    assert train[-1].text.endswith("\n")
    assert 0.05 * len(joined) <= sum(len(d.text) for d in val) <= 0.16 * len(joined)


def test_split_without_lines():
    train, val = split([Document("a", "x" * 1000)])
    assert (len(train[0].text), len(val[0].text)) == (900, 100)


@given(st.lists(st.text("ab\n", min_size=10, max_size=60), min_size=1, max_size=12))
def test_split_loses_nothing(texts):
    all_documents = [Document(str(i), t) for i, t in enumerate(texts)]
    train, val = split(all_documents)
    assert "".join(d.text for d in train + val) == "".join(texts)
    assert all(d.text for d in train + val)
    assert train
    assert val


@pytest.mark.parametrize(
    ("characters", "size"),
    [(0, 512), (1000, 512), (335_000, 1024), (1_003_854, 2048), (2_600_000, 8192), (10**9, 8192)],
)
def test_choose_vocab_size(characters, size):
    assert choose_vocab_size(characters) == size


def test_a_tokenizer_trains_on_a_sample_of_a_large_text(monkeypatch, said):
    monkeypatch.setattr(pipeline, "TOKENIZER_SEES", 1000)
    monkeypatch.setattr(encode, "PIECE", 100)
    seen = []
    train = Tokenizer.train

    def watch(texts, vocab_size):
        seen.extend(texts)
        return train(seen, vocab_size)

    monkeypatch.setattr(Tokenizer, "train", watch)
    pipeline.choose_tokenizer(None, divided(lambda log: [Document("a", TEXT)], said.append), said.append)
    assert 500 < sum(map(len, seen)) <= 1100
    assert seen[-1] in TEXT[len(TEXT) // 2 :]  # sampled from the whole text
    assert all(piece in TEXT[: -len(TEXT) // 11] for piece in seen)  # of the training part only


@pytest.mark.parametrize("source", ["book.txt", "chat.jsonl"], indirect=True)
@pytest.mark.parametrize("name", [None, "bpe:300", "own.json"])
def test_train_and_data_write_the_same_tokens(source, tmp_path, said, name):
    """`train --data FILE` and `data FILE; train --data FOLDER`: identical files."""
    model, size = None, None
    if name == "own.json":
        own = Tokenizer.train([TEXT], 290)
        own.save(tmp_path / name)
        model = Vocabulary(290, tmp_path / name, lambda: (own, "the model's"))
        name = str(tmp_path / name)
    elif name:
        size = int(name.removeprefix("bpe:"))
    direct = prepare([source], tmp_path / "run", size, said.append, model)
    folder = data(DataOptions(what=(str(source),), tokenizer=name, out=tmp_path / "tokens"), said.append)
    names = {"train.bin", "val.bin", "tokenizer.json"} | (
        {"train.mask", "val.mask"} if "chat" in source.name else set()
    )
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    assert {path.name for path in folder.iterdir()} == names | {"dataset.json"}
    for file in names:
        assert (folder / file).read_bytes() == (tmp_path / "run" / file).read_bytes()
    made = prepare([folder], tmp_path / "other", None, said.append, model)
    assert made.vocab_size == direct.vocab_size


@pytest.mark.parametrize("source", ["book.txt"], indirect=True)
def test_train_and_data_give_the_same_model(source, tmp_path, said):
    folder = data(DataOptions(what=(str(source),), out=tmp_path / "tokens"), said.append)
    for name, path in (("a", source), ("b", folder)):
        options = TrainOptions(
            data=(path,), model="d1", batch_size=2, sequence_length=8, steps=3, out=tmp_path / name, sample_tokens=4
        )
        assert train(options, Laptop()) == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_the_first_tokens_of_a_text(tmp_path, said):
    """A tenth of them is held out, wherever they end."""
    path = tmp_path / "a.txt"
    path.write_text(TEXT, "utf-8")
    folder = data(DataOptions(what=(str(path),), tokenizer="bytes", tokens=1000, out=tmp_path / "out"), said.append)
    ids = [open_shard(folder / name, 257).tokens[:] for name in ("train.bin", "val.bin")]
    assert list(map(len, ids)) == [900, 100]
    assert bytes(np.concatenate(ids)[1:].tolist()) == TEXT.encode()[:999]


@pytest.mark.parametrize("source", ["chat.jsonl"], indirect=True)
@pytest.mark.parametrize(
    "record",
    [
        lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "user", "content": a}]},
        lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": " "}]},
        lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a, "weight": 0}]},
        lambda q, a: {"prompt": q + a, "completion": ""},
        lambda q, a: {"instruction": q, "input": a, "output": ""},
    ],
)
def test_text_without_counted_tokens(source, tmp_path, said, record):
    """Neither end-of-text nor the blank line after an empty answer is something to learn."""
    rows = [json.loads(line)["messages"] for line in source.read_text().splitlines()]
    source.write_text("\n".join(json.dumps(record(q["content"], a["content"])) for q, a in rows))
    with refused("data.nothing-counted", "assistant"):
        prepare([source], tmp_path / "run", log=said.append)
    assert not (tmp_path / "run").exists()
