"""Batches in llm.c's order, compared with its own loader's."""

from pathlib import Path

import numpy as np
import pytest
from support.golden import FIRST_TOKENS, LAST_SAMPLE, SAMPLES
from support.refused import refused

from llmpy.data.loader import Loader
from llmpy.data.shards import Shard


def shard(size, first=0, name="shard.bin"):
    return Shard(Path(name), (np.arange(size) + first).astype(np.uint16))


def four(**options):
    shards = [shard(140, 140 * i, f"shard_{i:04}.bin") for i in range(4)]
    return Loader(shards, 2, 8, **options)


def check_batch(tokens, targets):
    """Each token is its own position here: check that rows are consecutive and targets one ahead."""
    assert tokens.dtype == targets.dtype == np.int32
    flat = tokens.reshape(-1)
    assert np.array_equal(flat, flat[0] + np.arange(flat.size))
    assert np.array_equal(targets, tokens + 1)
    return int(flat[0])


@pytest.mark.parametrize(("rank", "ranks"), FIRST_TOKENS)
def test_four_shards_golden(rank, ranks):
    golden = FIRST_TOKENS[rank, ranks]
    loader = four(shuffle=True, rank=rank, ranks=ranks)
    assert tuple(check_batch(*loader.next()) for _ in golden) == golden


@pytest.mark.parametrize(("seed", "rank", "epoch"), SAMPLES)
def test_tinyshakespeare_golden(seed, rank, epoch):
    golden = SAMPLES[seed, rank, epoch]
    places = np.zeros(305260, np.uint16)
    places[::256] = np.arange(places[::256].size)  # each sample's first token is its number
    loader = Loader([Shard(Path("t.bin"), places)], 4, 64, shuffle=True, seed=seed, rank=rank)
    assert loader.batches_per_epoch == 1192
    order = [int(loader.next()[0][0, 0]) for _ in range(2 * 1192)]
    assert order[epoch * 1192 :][: len(golden)] == list(golden)
    assert sorted(order[:1192]) == sorted(order[1192:]) == list(range(1192))
    if seed == 42:
        assert order[1191] == LAST_SAMPLE


def test_unshuffled_batches_are_in_order():
    loader = four(shuffle=False)
    starts = [check_batch(*loader.next()) for _ in range(loader.batches_per_epoch + 3)]
    epoch = [140 * s + 16 * i for s in range(4) for i in range(8)]
    assert starts == epoch + epoch[:3]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_token_once_an_epoch(shuffle, ranks):
    seen = np.zeros(560, int)
    for rank in range(ranks):
        loader = four(shuffle=shuffle, rank=rank, ranks=ranks)
        for _ in range(loader.batches_per_epoch):
            seen[loader.next()[0]] += 1
    samples = 139 // (16 * ranks)
    expected = np.tile(np.arange(140) < samples * 16 * ranks, 4)
    assert np.array_equal(seen, expected)


def test_batches_share_two_arrays():
    loader = four(shuffle=True)
    tokens, targets = loader.next()
    again = loader.next()
    assert again[0] is tokens
    assert again[1] is targets


def test_reset_draws_new_orders():
    loader = four(shuffle=True, ranks=2)
    for _ in range(16):
        loader.next()
    loader.reset()
    golden = FIRST_TOKENS[0, 2][16:]
    assert tuple(check_batch(*loader.next()) for _ in golden) == golden


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 7, 8, 9, 31, 32, 33, 50])
def test_resume_from_a_position(shuffle, steps):
    loader = four(shuffle=shuffle)
    for _ in range(steps):
        loader.next()
    position = loader.position
    expected = [check_batch(*loader.next()) for _ in range(80)]
    other = four(shuffle=shuffle, seed=7)
    other.position = position
    assert [check_batch(*other.next()) for _ in range(80)] == expected
    other.position = position  # not modified by reading
    assert check_batch(*other.next()) == expected[0]


def test_position_of_other_data_is_refused():
    position = four(shuffle=True).position
    others = [
        Loader([shard(140)], 2, 8, shuffle=True),
        Loader([shard(140)] * 4, 1, 8, shuffle=True),
        Loader([shard(400)] * 4, 2, 8, shuffle=True),
    ]
    for other in others:
        before = other.position
        with refused("resume.position-mismatch", "--data, -B, -T"):
            other.position = position
        assert np.array_equal(other.position.sample_order, before.sample_order)


def test_smallest_shard_and_one_less():
    loader = Loader([shard(33)], 2, 8, shuffle=True, rank=1, ranks=2)
    assert loader.batches_per_epoch == 1
    assert [check_batch(*loader.next()) for _ in range(3)] == [16, 16, 16]
    with refused("shard.too-short", "small.bin", "32 tokens", "-B 2 -T 8", "2 processes", "33"):
        Loader([shard(100), shard(32, name="small.bin")], 2, 8, shuffle=True, rank=1, ranks=2)


@pytest.mark.parametrize("place", [0, 15, 16])  # the last is only a target
def test_tokens_that_change_under_the_loader(place):
    tokens = np.arange(33).astype(np.uint16)
    loader = Loader([Shard(Path("one.bin"), tokens)], 2, 8, shuffle=False, vocab_size=33)
    check_batch(*loader.next())
    loader.reset()
    tokens[place] = 33
    with refused("shard.changed", "one.bin", "token 33", "33 tokens"):
        loader.next()
