"""The estimated cost of messages against measurements (docs/distributed.md)."""

from __future__ import annotations

import re

import pytest
from support.pages import ROOT

from llmpy.distributed.cost import Communication, communication
from llmpy.model.config import ModelConfig
from llmpy.model.gpt2 import params_table

GPT2_124M = ModelConfig.from_dial("gpt2")
SIZE = sum(t.size for t in params_table(GPT2_124M))
GIGABIT = 125e6, 1e-3  # bytes/s, seconds
FORWARD, HEAD, BACKWARD, UPDATE = 0.95, 1.15, 1.9, 0.1  # seconds of a step of 4.1


def cost(ranks: int, rate: float, latency: float, computing: float = 1.0, mixed: bool = True) -> Communication:
    return communication(GPT2_124M, ranks, rate, latency, computing * FORWARD, computing * BACKWARD, mixed)


def test_bytes_are_as_few_as_any_algorithm_needs() -> None:
    vectors = sum(t.size for t in params_table(GPT2_124M) if not t.decay)
    assert cost(4, *GIGABIT).sent == 0.75 * (4 * SIZE + 2 * SIZE + 2 * vectors)
    assert cost(4, *GIGABIT, mixed=False).sent == 2 * 0.75 * 4 * SIZE
    assert cost(1, *GIGABIT) == (0, 0, 0)


def test_overlap() -> None:
    """On a slow link, backward and forward hide messages; on a fast one only the first layers are exposed."""
    slow, fast = cost(2, 1e6, 0, mixed=False), cost(2, 1e9, 0, mixed=False)
    assert slow.exposed == pytest.approx(slow.seconds - FORWARD - BACKWARD)
    layer = 12 * 768 * 768 + 13 * 768
    assert fast.exposed / fast.seconds == pytest.approx((SIZE - 11 * layer) / SIZE, rel=1e-3)


def test_two_measured_hosts() -> None:
    found = cost(2, *GIGABIT)
    assert found.seconds == pytest.approx(3.56, rel=0.1)
    assert found.exposed == pytest.approx(1.21, rel=0.05)


@pytest.mark.parametrize(
    ("model", "mixed", "seconds"), [("d8", True, 0.155), ("gpt2", True, 0.415), ("gpt2", False, 0.484)]
)
def test_measured_copies(model: str, mixed: bool, seconds: float) -> None:
    """Two ranks on one machine: messages are copied in memory."""
    found = communication(ModelConfig.from_dial(model), 2, 66e9 / 8, 70e-6, 1, 2, mixed)
    assert found.seconds == pytest.approx(seconds, rel=0.1)


def test_the_table_of_a_thousand_nodes_matches_the_estimate() -> None:
    text = (ROOT / "docs" / "distributed.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) Gbit/s, (\d+) µs; (\d+) threads? \|(.*)\|$", text, re.MULTILINE)
    assert len(rows) == 3
    for gbit, latency, threads, shares in rows:
        found = []
        for n in (2, 8, 64, 256, 1000):
            computing = (FORWARD + HEAD + BACKWARD + UPDATE / n) / int(threads)
            exposed = cost(n, int(gbit) * 1e9 / 8, int(latency) * 1e-6, 1 / int(threads)).exposed
            found.append(f"{100 * computing / (computing + exposed):.0f} %")
        assert [share.strip() for share in shares.split("|")] == found


def test_more_ranks_a_slower_link_and_less_computation_cost_more() -> None:
    exposed = [cost(n, *GIGABIT).exposed for n in (1, 2, 8, 64, 1000)]
    assert exposed == sorted(exposed)
    assert cost(8, 1e9, 1e-3).exposed < exposed[2] < cost(8, *GIGABIT, computing=1 / 8).exposed
