"""Documents in rows of T: each whole, once, apart from the others; what they learn; the same after a resume."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.laptop import TINY, Laptop
from support.models import build
from support.samples import in_memory, with_tokenizer

from llmpy.backend import load
from llmpy.data import document_rows
from llmpy.data.document_rows import described, groups, pack
from llmpy.data.loader import Loader
from llmpy.data.records import begins, holds_answers, question
from llmpy.data.shards import COUNTED, START, Shard, fingerprint, open_shard, write_shard
from llmpy.data.tokenizer import Tokenizer
from llmpy.data.user_data import prepare
from llmpy.formats import huggingface
from llmpy.model.config import LlamaConfig, ModelConfig
from llmpy.options.train import TrainOptions
from llmpy.train.assemble import train

EOT = 0
Stream = tuple[np.ndarray, np.ndarray | None, np.ndarray]


def stream(seed: int, T: int, kind: str) -> Stream:
    """Return ids, counted and starts of 40 documents of 2 to 3·T tokens: with EOT, rendered without, or both."""
    rng = np.random.default_rng(seed)
    lengths = np.where(rng.random(40) < 0.2, rng.integers(T, 3 * T, 40), rng.integers(2, T, 40))
    lengths[rng.integers(0, 40, 3)] = T, 2 * T, T + 1
    starts = np.cumsum(lengths) - lengths
    ids = rng.integers(1, 11, lengths.sum()).astype(np.uint16)
    plain = {"plain": starts, "rendered": starts[:0], "mixed": starts[rng.random(40) < 0.5]}[kind]
    ids[plain] = EOT
    counted = rng.random(len(ids)) < 0.5
    counted[plain] = True
    return ids, None if kind == "plain" and seed % 2 else counted, starts


def documents(ids: np.ndarray, starts: np.ndarray) -> list[bytes]:
    return [part.tobytes() for part in np.split(ids, starts[starts > 0])]


@pytest.mark.parametrize("kind", ["plain", "rendered", "mixed"])
@pytest.mark.parametrize(("seed", "T", "window"), [(0, 16, 512), (1, 16, 4), (2, 7, 1), (3, 64, 8), (4, 3, 3)])
def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, seed: int, T: int, window: int) -> None:
    monkeypatch.setattr(document_rows, "WINDOW", window)
    ids, counted, starts = stream(seed, T, kind)
    packed, mask, lengths = pack(ids, counted, np.append(starts, len(ids)), T, EOT, tmp_path / "a")
    again = pack(ids, counted, starts, T, EOT, tmp_path / "b")
    assert np.array_equal(packed, again[0]) and np.array_equal(mask, again[1])
    assert len(packed) % T == 1 and packed.dtype == ids.dtype
    assert lengths.tolist() == np.diff(starts, append=len(ids)).tolist()

    # Every document once, whole, and apart from padding nothing else.
    heads = np.flatnonzero(mask & START)
    found = documents(packed, heads)
    want = documents(ids, starts)
    padding = np.array([EOT], ids.dtype).tobytes()
    assert sorted(part for part in found if part != padding) == sorted(want)
    sizes = np.diff(heads, append=len(packed))
    assert all(at % T == 0 if size > T else at % T + size <= T for at, size in zip(heads, sizes, strict=True))

    # Within a document the mask is kept. Its end learns EOT if it does in the stream, padding nothing.
    kept = np.ones(len(ids), bool) if counted is None else counted
    order = {}  # documents are distinct, or have the same tokens and may differ in what counts
    for i, part in enumerate(want):
        order.setdefault(part, []).append(i)
    learned = [False] * len(want)
    for i, start in enumerate(starts[1:]):
        learned[i] = bool(ids[start] == EOT and kept[start])
    before: list[int] | None = None
    for at, size, part in zip(heads, sizes, found, strict=True):
        counts = bool(mask[at] & COUNTED)
        assert counts in {learned[i] and packed[at] == EOT for i in before} if before else not counts
        before = None if part == padding else order[part]
        tails = [kept[starts[i] + 1 : starts[i] + size].tolist() for i in before or ()]
        assert part == padding or (mask[at + 1 : at + size] & COUNTED).astype(bool).tolist() in tails
    assert sum(size > 1 for size in sizes) == len(want)


def test_best_fit_fills_rows() -> None:
    lengths = np.array([6, 3, 10, 2, 8, 25, 5, 5])
    assert [*groups(lengths, 10)] == [[0, 1], [2], [3, 4], [5, 6], [7]]
    sizes = np.random.default_rng(0).lognormal(np.log(300), 0.8, 5000).astype(int) + 2
    rows = sum(-(-int(sizes[group].sum()) // 1024) for group in groups(sizes, 1024))
    assert sizes.sum() / (rows * 1024) > 0.99
    said = described(lengths, 7, 10)
    assert said.startswith("packing  8 documents in 7 rows of 10: 8.6% padding (36.0% with one document per row); ")
    assert said.endswith("; longer than a row (-T): 1")
    assert described(np.array([3, 10]), 2, 10).endswith("per row)")


def shard(folder: Path, T: int, kind: str = "plain") -> tuple[Shard, Stream]:
    made = stream(5, T, kind)
    ids, mask, _ = pack(*made, T, EOT, folder / "a")
    write_shard(folder / "a.bin", ids, "uint16", mask)
    return open_shard(folder / "a.bin", 11), made


def test_positions(tmp_path: Path) -> None:
    """They count in each document and row; ranks and shuffling only choose other rows."""
    opened, _ = shard(tmp_path, 16)
    assert opened.packed and opened.mask is not None
    tokens, mask = opened.tokens[:], opened.mask[:]
    for rank, shuffle in ((0, False), (0, True), (1, True)):
        loader = Loader([opened], 2, 16, shuffle, rank=rank, ranks=2)
        for _ in range(9):
            _, targets = loader.next()
            first = (2 * loader.batch[1] + rank) * 32
            assert loader.positions is not None and loader.positions.dtype == np.int32
            for i, place in enumerate(loader.positions.reshape(-1).tolist()):
                last = max(first + i // 16 * 16, *np.flatnonzero(mask[: first + i + 1] & START))
                assert place == first + i - last
                counts = mask[first + i + 1] & COUNTED
                assert targets.reshape(-1)[i] == (tokens[first + i + 1] if counts else -1)
    half = opened.part(160, len(opened))
    assert half.packed and half.mask is not None and half.mask[:3].tolist() == mask[160:163].tolist()
    stream = Loader([Shard(Path("s"), tokens)], 2, 16, False)
    stream.next()
    assert stream.positions is None


def test_the_mask_has_a_version_and_a_place_in_the_fingerprint(tmp_path: Path) -> None:
    opened, _ = shard(tmp_path, 16)
    assert (tmp_path / "a.mask").read_bytes()[4:8] == b"\2\0\0\0"
    assert opened.mask is not None
    other = opened.mask[:]
    other[other == COUNTED] = 0
    write_shard(tmp_path / "b.bin", opened.tokens[:], "uint16", other)
    marks = fingerprint(opened)["blake2b"], fingerprint(open_shard(tmp_path / "b.bin", 11))["blake2b"]
    assert marks[0] != marks[1]


WIDE = {"layers": 2, "heads": 2, "channels": 8, "context": 16, "vocab_size": 11}
CONFIGS = [ModelConfig(**WIDE), LlamaConfig(**WIDE, kv_heads=1, head_size=4, ffn=10)]


@pytest.mark.parametrize("config", CONFIGS, ids=["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["plain", "mixed"])
def test_the_loss_is_that_of_each_document_alone(tmp_path: Path, config: ModelConfig, kind: str) -> None:
    opened, (ids, counted, starts) = shard(tmp_path, 16, kind)
    model = build(config, load("reference"))
    loader = Loader([opened], 1, 16, shuffle=True, vocab_size=11)
    total = count = 0.0
    for _ in range(loader.batches_per_epoch):
        tokens, targets = loader.next()
        n = int(np.count_nonzero(targets >= 0))
        total += n * model.loss(tokens, targets, loader.positions)
        count += n
    kept = np.ones(len(ids), bool) if counted is None else counted
    want = number = 0.0
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        learns = stop < len(ids) and ids[stop] == EOT and kept[stop]
        nexts = np.append(
            np.where(kept[start + 1 : stop], ids[start + 1 : stop].astype(int), -1), EOT if learns else -1
        )
        for at in range(0, stop - start, 16):
            row, goal = ids[start + at : stop][:16].astype(np.int32), nexts[at:][:16].astype(np.int32)
            n = int(np.count_nonzero(goal >= 0))
            want += n * model.loss(row[None], goal[None])
            number += n
    if kind == "plain":
        assert count == number
        assert total / count == pytest.approx(want / number, rel=1e-12)
    else:  # an end before a rendered document learns nothing, as in a stream
        assert number - 40 < count <= number


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model of bytes, and questions and answers."""
    config = replace(TINY, vocab_size=257)
    huggingface.write_model(tmp_path / "small", with_tokenizer(in_memory(config), tmp_path / "bytes.json"), "float32")
    rows = [{"prompt": f"{i}?", "completion": " yes, I do" * (1 + i % 5)} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def options(folder: Path, **changes: Any) -> TrainOptions:
    settings: dict[str, Any] = {
        "data": (folder / "a.jsonl",), "init": str(folder / "small"), "out": folder / "run", "batch_size": 2,
        "sequence_length": 16, "steps": 12, "eval_batches": 2, "eval_every": 5, "sample_tokens": 4,
        "checkpoint_every": 1, "keep": 0, "minutes": None,
    }  # fmt: skip
    return TrainOptions(**settings | changes)


@pytest.mark.parametrize("overfit", [False, True])
def test_a_packed_run_resumes_bitwise(folder: Path, capsys: pytest.CaptureFixture[str], overfit: bool) -> None:
    assert train(options(folder, overfit=overfit), Laptop()) == 0
    assert "packing  60 documents in" in capsys.readouterr().out
    run, cut = folder / "run", folder / "cut"
    for step in range(1, 12) if not overfit else (5,):
        later = [f"step-{n:08}" for n in range(step + 1, 13)]
        shutil.copytree(run, cut, ignore=shutil.ignore_patterns(*later))
        assert train(TrainOptions(resume=cut), Laptop()) == 0
        for name in ("model.safetensors", "main.log"):
            assert (cut / name).read_bytes() == (run / name).read_bytes(), step
        shutil.rmtree(cut)


def test_fine_tuning_packs_unless_asked_not_to(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Samples ask the first question of a document, also where others come before it in the row."""
    tokenizer = Tokenizer.load(folder / "small")
    found: dict[bool, Shard] = {}
    for packs in (True, False):
        assert train(options(folder, out=folder / str(packs), pack=packs, steps=1), Laptop()) == 0
        assert ("packing" in capsys.readouterr().out) == packs
        found[packs] = opened = open_shard(folder / str(packs) / "train.bin", 257)
        for at in begins(opened):
            asked = question([opened.part(max(0, at - 9), len(opened))], tokenizer, 9)
            assert asked[0] == 256 and asked[-1] == ord("?") and bytes(asked[1:-1]).isdigit()
        assert len([*begins(opened)]) == np.count_nonzero(opened.tokens[:] == ord("?"))
        assert not holds_answers(opened, tokenizer)
    assert found[True].packed and not found[False].packed
    plain = prepare([folder / "a.jsonl"], folder / "plain", 257, lambda _: None)
    assert not plain.train[0].packed


def test_plain_text_asks_no_question(tmp_path: Path) -> None:
    opened, _ = shard(tmp_path, 16)
    assert opened.mask is not None and [*begins(opened)] == []
