"""Plans follow the model: its calls, its tables, the cost of the network. For measured times see docs/plan.md."""

from __future__ import annotations

import collections
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.flops import FLOPS
from support.laptop import Laptop
from support.samples import in_memory

from llmpy.backend.recorder import Recorder
from llmpy.bench.ops import Case, arguments
from llmpy.cli import main as cli
from llmpy.distributed.cost import communication
from llmpy.formats import huggingface
from llmpy.model.config import LlamaConfig, ModelConfig
from llmpy.model.families import flops_per_token, trained_table, with_adapters
from llmpy.model.gpt2 import params_table
from llmpy.options.tools import PlanOptions
from llmpy.tools import plan
from llmpy.tools.plan import case_of, smaller, step_parts, table
from llmpy.train.memory import memory_parts

GPT2_124M = ModelConfig.from_dial("gpt2")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure as briefly as possible."""
    monkeypatch.setattr(plan, "BUDGET", 0.0)
    monkeypatch.setattr(plan, "REPEATS", 1)
    monkeypatch.setattr(plan, "CACHES", 10)


@pytest.mark.parametrize(("dtype", "narrowed"), [(np.float32, 0), (np.float16, 6)])
@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_the_parts_are_what_a_step_calls(recompute: int, dtype: Any, narrowed: int) -> None:
    config, B, T = ModelConfig(layers=3, heads=2, channels=8, context=16, vocab_size=40), 2, 6
    parts = step_parts(config, B, T, recompute, dtype)
    calls = sum((collections.Counter({part.op: part.calls}) for part in parts), collections.Counter[str]())
    forward = {"embedding_forward": 1, "layernorm_forward": 1, "residual_layernorm_forward": 6, "linear_forward": 12}
    backward = {"embedding_backward": 1, "layernorm_backward": 7, "linear_backward": 12, "attention_backward": 3}
    other = {"attention_forward": 3, "classifier": 1, "zero": 1, "narrow": narrowed, "global_norm": 1, "adamw": 2}
    again = {"activation_forward": 3 * (recompute >= 1), "layernorm_forward": 6 * (recompute >= 2)}
    assert calls == collections.Counter(forward | backward | other) + collections.Counter(again)
    products = [(p.stage, p.case.C, p.case.OC, p.case.variant) for p in parts if p.kind == "products"]
    assert products[:4] == [
        ("forward", 8, 24, "bias"), ("forward", 8, 8, "bias"), ("forward", 8, 32, "bias gelu"),
        ("forward", 32, 8, "bias"),
    ]  # fmt: skip
    assert {p.case for p in parts if p.kind == "attention"} == {Case(B, T, C=8, NH=2)}
    updated = sum(p.case.n for p in parts if p.op == "adamw")
    assert updated == sum(t.size for t in params_table(config))


@pytest.mark.parametrize("op", ["head_rmsnorm_forward", "head_rmsnorm_backward", "rope"])
def test_sizes_of_grouped_heads(op: str) -> None:
    case = Case(T=6, C=16, NH=4, NKV=2)
    assert case_of(op, arguments(op, case, Laptop())) == case


def test_a_case_has_its_key_heads_and_tables() -> None:
    recorder = Recorder(np.float32)
    out, stats, qkv = (recorder.empty(shape, np.float32) for shape in ((10, 32), (2, 8, 5), (10, 48)))
    recorder.attention_forward(out, stats, qkv)
    recorder.embedding_forward(out, np.zeros((2, 5), np.int32), np.zeros((7, 32)), None)
    attention, embedding = (plan.case_of(*call) for call in recorder.calls)
    assert attention == Case(2, 5, C=32, NH=8, NKV=2)
    assert embedding == Case(T=10, C=32, V=7, Vp=7, variant="tokens")
    shapes = {k: x.shape for k, x in arguments("attention_forward", attention, Laptop()).items() if x is not None}
    assert shapes == {"out": (2, 5, 32), "stats": (2, 8, 5), "qkv": (2, 5, 48)}


def test_the_sizes_of_swiglu_and_of_frozen_weights() -> None:
    """A SwiGLU MLP of 5 → 7 → 5 with LoRA's frozen weights, and a frozen head."""
    ops, x = Recorder(np.float32), np.zeros
    rows, pre, act = x((6, 5)), x((6, 14)), x((6, 7))
    ops.linear_forward(act, rows, x((14, 5)), None, pre)
    ops.activation_forward(act, pre)
    ops.linear_backward(pre, None, None, rows, None, x((5, 7)), pre, False)
    ops.activation_backward(pre, act, pre)
    ops.take_columns(act, pre, 7, 0.5)
    ops.classifier(x(6), rows, None, rows, x((9, 5)), x(6, np.int32), 8, 1.0, False)
    assert [case_of(op, arguments) for op, arguments in ops.calls] == [
        Case(T=6, C=5, OC=7, variant="swiglu"), Case(T=6, C=7, variant="swiglu"),
        Case(T=6, C=7, OC=5, variant="frozen swiglu"), Case(T=6, C=7, variant="swiglu"), Case(T=6, C=7),
        Case(T=6, C=5, V=8, Vp=9, variant="frozen"),
    ]  # fmt: skip


QWEN = LlamaConfig(2, 4, 24, 64, 300, kv_heads=2, head_size=8, ffn=40, tied=False, qkv_bias=True, qk_norm=True)


@pytest.mark.parametrize("config", [GPT2_124M, ModelConfig.from_dial("llama:d3"), QWEN], ids=["gpt2", "llama", "qwen"])
@pytest.mark.parametrize("lora", [None, 4])
def test_the_parts_hold_all_flops(config: ModelConfig, lora: int | None) -> None:
    config = config if lora is None else with_adapters(config, lora)
    B, T = 4, 64
    found = sum(p.calls * FLOPS[p.op](p.case) for p in step_parts(config, B, T, 1, np.float32) if p.op in FLOPS)
    again = sum(t.size for t in trained_table(config) if t.name.endswith("lora_A"))  # x·Aᵀ, recomputed by backward
    assert found == (flops_per_token(config, T) + 2 * again) * B * T


@pytest.mark.parametrize("model", ["gpt2", "gpt2-xl", "gpt3:c12288"])
def test_a_smaller_size_scales_to_the_same_work(model: str) -> None:
    for part in step_parts(ModelConfig.from_dial(model), 48, 512, 1, np.float32):
        case, times = smaller(part)
        assert case.OC * case.C <= plan.MATRIX
        assert case.Vp * case.C <= plan.MATRIX
        if part.op in FLOPS:
            assert times * FLOPS[part.op](case) == pytest.approx(FLOPS[part.op](part.case))
            assert case.rows <= plan.PRODUCT_ROWS
            assert part.kind != "attention" or case.T == 512
        elif part.case.n > 1:
            assert times * case.n == pytest.approx(part.case.n)
        else:
            assert times * case.rows == part.case.rows


def test_a_plan(small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = PlanOptions("d1", 2, 8, vocab_size=300, total_batch=64, tokens=6400)
    numbers = plan.plan(options, Laptop())
    config = ModelConfig.from_dial("d1", vocab_size=300)
    assert numbers["model"]["parameters"] == sum(t.size for t in params_table(config))
    assert numbers["memory"]["total"] == sum(memory_parts(config, 2, 8, Laptop(), copied=True).values())
    assert numbers["batch"] == {"batch_size": 2, "sequence_length": 8, "gathered": 4, "nodes": 1, "tokens": 64}
    step = numbers["step"]
    once = step["ms_a_batch"].pop("update")
    assert step["ms"] == pytest.approx(4 * sum(step["ms_a_batch"].values()) + once)
    assert step["gflop"] == pytest.approx(flops_per_token(config, 8) * 64 / 1e9)
    assert step["share_of_peak"] == pytest.approx(step["gflop"] / (step["ms"] / 1e3) / 10)
    asked, chinchilla = numbers["training"]
    assert (asked["tokens"], asked["steps"]) == (6400, 100)
    assert asked["seconds"] == pytest.approx(100 * step["ms"] / 1e3)
    assert asked["machine_hours"] == pytest.approx(asked["seconds"] / 3600)
    assert chinchilla["tokens"] == 20 * numbers["model"]["parameters"]
    parameters, disk = numbers["model"]["parameters"], numbers["disk"]
    # two checkpoints kept and one being written; the last model and the best
    assert (disk["checkpoint"], disk["total"]) == (12 * parameters, (3 * 12 + 2 * 4) * parameters)
    step["ms_a_batch"]["update"] = once
    monkeypatch.setattr(plan, "plan", lambda _: numbers)
    assert cli.main(["plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == numbers
    assert cli.main(["plan"]) == 0
    assert all(part in table(numbers) for part in ("1 layer,", "2 x 8, 4 ", ": 64 tokens", "gradients", "Chinchilla"))


def test_a_plan_of_adapters_on_a_model_of_the_hub(small: None, tmp_path: Path) -> None:
    config = replace(QWEN, qkv_bias=False)
    huggingface.write_model(tmp_path, in_memory(config), "float32")
    (tmp_path / "model.safetensors").unlink()  # only config.json is read
    numbers = plan.plan(PlanOptions(str(tmp_path), 2, 8, lora=4, tokens=160), Laptop())
    config = with_adapters(config, 4)
    trained = sum(t.size for t in trained_table(config))
    assert (numbers["model"]["trained"], numbers["disk"]["checkpoint"]) == (trained, 12 * trained)
    assert numbers["memory"]["parts"]["rope tables"] == 4 * 8 * 8
    assert numbers["memory"]["total"] == sum(memory_parts(config, 2, 8, Laptop(), copied=True).values())
    assert [t["what"] for t in numbers["training"]] == ["--tokens"]
    assert all(part in table(numbers) for part in (f"{trained:,} of adapters", "Qwen3", "frozen weights", "rope"))
    assert "training" not in table(numbers | {"training": []})


def test_the_largest_batch_fits_and_the_next_does_not(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "available_memory", lambda: 500_000_000)
    config = ModelConfig.from_dial("d1", vocab_size=300)
    largest = plan.plan(PlanOptions("d1", 1, 64, vocab_size=300), Laptop())["memory"]["largest_batch"]
    for batch, line in ((largest, "\nlargest batch"), (largest + 1, "; largest batch")):
        assert (sum(memory_parts(config, batch, 64, Laptop(), copied=True).values()) <= 0.5e9) is (batch == largest)
        assert line in table(plan.plan(PlanOptions("d1", batch, 64, vocab_size=300), Laptop()))
    monkeypatch.setattr(plan, "available_memory", lambda: 10_000_000)
    assert "no batch" in table(plan.plan(PlanOptions("d1", 1, 64, vocab_size=300), Laptop()))


@pytest.mark.parametrize("slow", range(plan.ROUNDS))
def test_a_disturbance_of_one_round_changes_no_time(slow: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = step_parts(ModelConfig.from_dial("d1", vocab_size=300), 1, 8, 0, np.float32)
    calls = itertools.count()

    def timed(*_: object) -> dict[str, float]:
        return {"median_ms": 50.0 if next(calls) // len(parts) == slow else 1.0}

    monkeypatch.setattr(plan, "time_case", timed)
    measured = plan.measure(Laptop(), parts)
    assert measured.seconds == pytest.approx([p.calls * smaller(p)[1] / 1e3 for p in parts])
    assert not measured.steady


def test_a_busy_machine(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "measure", lambda _, parts: plan.Measured([1.0] * len(parts), 10.0, 20.0, steady=False))
    assert "\ncaution" in table(plan.plan(PlanOptions("d1", 1, 8), Laptop()))


def test_several_machines(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "time_case", lambda *_: {"median_ms": 1.0})
    alone = plan.plan(PlanOptions("d2", 1, 8, vocab_size=300, total_batch=16), Laptop())
    options = PlanOptions("d2", 1, 8, vocab_size=300, total_batch=64, nodes=4, bandwidth=0.01, latency=100.0)
    several = plan.plan(options, Laptop())
    config = ModelConfig.from_dial("d2", vocab_size=300)
    forward, backward = (
        1e-3 * sum(p.calls * smaller(p)[1] for p in step_parts(config, 1, 8, 1, np.float32) if p.stage == stage)
        for stage in ("forward", "backward")
    )
    cost = communication(config, 4, 1.25e6, 1e-4, forward, backward, False)
    network, update = several["network"], alone["step"]["ms_a_batch"]["update"]
    assert (network["sent_mb"], network["exposed_ms"]) == pytest.approx((cost.sent / 1e6, 1e3 * cost.exposed))
    assert several["step"]["ms_a_batch"]["update"] == pytest.approx(update / 4)
    assert several["step"]["ms"] == pytest.approx(alone["step"]["ms"] - 3 / 4 * update + 1e3 * cost.exposed)
    assert network["efficiency"] == pytest.approx(alone["step"]["ms"] / several["step"]["ms"])
    whole, divided = alone["memory"]["parts"], several["memory"]["parts"]
    assert divided["moments"] == pytest.approx(whole["moments"] / 4, rel=1e-3)  # parts are whole cache lines
    assert divided["master weights"] == divided["reduced gradients"] == divided["moments"] // 2
    assert divided["gradients"] == whole["gradients"]
    assert several["training"][0]["machine_hours"] == pytest.approx(4 * several["training"][0]["seconds"] / 3600)
    assert "exposed communication" in table(several)


def test_recommended_tokens() -> None:
    found = dict(plan.targets(GPT2_124M, PlanOptions(), 124_475_904))
    assert found["Chinchilla, 20 per parameter"] == 2_489_518_080
    assert found["llm.c's gpt2_124M"] == 10_000_000_000
    assert found["llm.c's gpt3_125M"] == 572_204 * 524_288
    assert dict(plan.targets(ModelConfig.from_dial("d24"), PlanOptions(), 1)) == {
        "Chinchilla, 20 per parameter": 20,
        "llm.c's gpt2_350M": 60_000 * 524_288,
    }


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("plan --nodes 2", "--bandwidth"),
        ("plan --total-batch 5000", "--total-batch 4096"),
        ("plan -T 2048", "-T 1024"),
        ("plan --model gpt3", "gpt3"),
    ],
)
def test_impossible_plans(line: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) == 1
    assert named in capsys.readouterr().err


def test_flags_override_a_recipe() -> None:
    options = PlanOptions.gather({"recipe": "gpt3_125M", "batch_size": 2})
    assert (options.model, options.sequence_length, options.total_batch) == ("gpt3:c768", 2048, 524_288)
    assert options.batch_size == 2
