"""What is said before training, and the refusal of what cannot fit."""

from __future__ import annotations

import pytest
from laptop import Laptop

from llmpy.config import ModelConfig
from llmpy.errors import LlmpyError
from llmpy.gpt2 import ACTS, PARAMS, RECOMPUTE, SCRATCH
from llmpy.options import TrainOptions
from llmpy.preflight import PROGRAM_BYTES, Preflight, check_memory, duration, inspect, memory_needed

GPT2_124M = ModelConfig.from_dial("gpt2")


def flight(**options: object) -> Preflight:
    told = TrainOptions(model="gpt2", batch_size=4, sequence_length=64, **options)  # type: ignore[arg-type]
    told = told.settled(768, 305_260)
    return inspect(GPT2_124M, told, Laptop(), 305_260, 32_768)


def test_memory_follows_the_tables() -> None:
    tables = (PARAMS(GPT2_124M), ACTS(GPT2_124M, 4, 64, True, RECOMPUTE), SCRATCH(GPT2_124M, 4, 64, False))
    sizes = [sum(t.size for t in table) for table in tables]
    assert sizes[0] == 124_475_904
    least = 4 * (4 * sizes[0] + sizes[1] + sizes[2])
    needed = memory_needed(GPT2_124M, 4, 64, Laptop())
    assert least + PROGRAM_BYTES < needed < 1.1 * least + PROGRAM_BYTES
    assert memory_needed(GPT2_124M, 8, 64, Laptop()) > needed
    assert memory_needed(GPT2_124M, 4, 128, Laptop()) > needed


def test_the_lines_say_what_will_run() -> None:
    text = "\n".join(flight(steps=100).lines())
    for part in ("gpt2", "124,475,904 parameters", "305,260 tokens", "4 x 64", "1 thread, numpy, float32"):
        assert part in text
    assert "measured peak 10 GFLOP/s" in text
    assert "stops at 100 steps" in text
    assert "stops at 11,920 steps or 3.5 minutes" in "\n".join(flight().lines())
    assert "stops at 7 minutes" in "\n".join(flight(minutes=7).lines())
    assert "whichever comes first" in "\n".join(flight(steps=3, minutes=1).lines())


def test_a_text_that_is_read_too_often_is_told_of() -> None:
    # 305,260 tokens are 1,192 batches of 256
    assert "by heart" not in "\n".join(flight(steps=20_000).lines())
    assert "by heart" in "\n".join(flight(steps=26_000).lines())


def test_time_is_estimated_from_the_peak() -> None:
    plan = flight(steps=100)
    assert plan.step_seconds == pytest.approx(GPT2_124M.flops_per_token(64) * 256 / 6e9)
    assert plan.steps == 100
    assert flight(minutes=10).steps == int(600 / plan.step_seconds)
    assert flight(minutes=0.01).steps == 1


def test_what_does_not_fit_is_refused() -> None:
    plan = flight(steps=1)
    check_memory(plan.options, plan.config, plan.machine, plan.memory)
    with pytest.raises(LlmpyError, match=r"needs about .* smaller -B, -T or --model"):
        check_memory(plan.options, plan.config, plan.machine, plan.memory - 1)


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59.4, 59.6, 150, 3599, 12_000)] == [
        "0 s",
        "59 s",
        "1 min 0 s",
        "2 min 30 s",
        "59 min 59 s",
        "3 h 20 min",
    ]
