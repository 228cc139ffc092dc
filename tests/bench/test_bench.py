"""`bench step`, `ops` and `decode` on a backend without compilation."""

from __future__ import annotations

import inspect
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import psutil
import pytest
from support.flops import FLOPS as BY_SIZE
from support.laptop import Laptop
from support.refused import refused

from llmpy import bench
from llmpy.backend import Ops
from llmpy.bench import decoding as decode
from llmpy.bench import ops as ops_module
from llmpy.bench import step
from llmpy.bench.decoding import bench_decode, prefill_flops
from llmpy.bench.ops import ARGUMENTS, BENCH, FLOPS, Case, arguments, bench_ops, moved_bytes
from llmpy.bench.peers import STEP_LINE, bench_peers
from llmpy.bench.step import WARM_STEPS, bench_step, table
from llmpy.cli import main as cli
from llmpy.errors import LlmpyError
from llmpy.formats import config_of
from llmpy.model.config import LlamaConfig, ModelConfig
from llmpy.model.families import flops_per_token, trained_table
from llmpy.options.bench import BenchOptions, DecodeOptions, OpsOptions, PeersOptions

TINY = Case(B=2, T=3, C=4, NH=2, OC=5, V=7, Vp=8, n=9)


def test_step_prints_one_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = bench_step(BenchOptions("d1", 1, 8, steps=4), Laptop())
    monkeypatch.setattr(step, "bench_step", lambda _: numbers)
    assert cli.main(["bench", "step", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert set(shown) == {
        "median_ms", "min_ms", "gflops", "peak_gflops", "share_of_peak", "tokens_per_s", "peak_rss_mb",
        "first_step_ms", "seconds_to_first_step", "dtype", "isa", "numpy", "threads", "step_ms", "bandwidth_gb_s",
        "roofline_ms", "share_of_roofline", "operations",
    }  # fmt: skip
    assert shown["peak_gflops"] == 10.0
    assert shown["share_of_peak"] == pytest.approx(shown["gflops"] / 10)
    assert shown["tokens_per_s"] == pytest.approx(8e3 / shown["median_ms"])
    assert shown["min_ms"] == min(shown["step_ms"]) <= shown["median_ms"]
    assert len(shown["step_ms"]) == 4
    assert shown["peak_rss_mb"] > 30
    assert shown["seconds_to_first_step"] > shown["first_step_ms"] / 1e3 > 0
    assert (shown["dtype"], shown["threads"]) == ("float32", 1)
    assert cli.main(["bench", "step"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == table(numbers)


def test_a_step_and_a_token_of_every_family(tmp_path: Path) -> None:
    config = LlamaConfig(2, 4, 16, 64, 300, kv_heads=2, head_size=6, ffn=24)
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16, "vocab_size": 300,
        "max_position_embeddings": 64, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 24,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 1e4,
    }))  # fmt: skip
    assert config_of(str(tmp_path)) == config
    for lora in (None, 2):
        found = bench_step(BenchOptions(str(tmp_path), 1, 8, steps=1, lora=lora), Laptop())
        flops = flops_per_token(config_of(str(tmp_path), lora=lora), 8)
        assert found["gflops"] == pytest.approx(flops * 8 / found["median_ms"] / 1e6)
    found = bench_decode(DecodeOptions(str(tmp_path), prompt_tokens=4, tokens=2, prefill=8), Laptop())
    assert found["weights_mb"] == pytest.approx(4e-6 * config.matrix_parameters)
    with refused("bench.unsupported-model", "llama:d6", "bench step"):
        bench_peers(PeersOptions("llama:d6"), print)


def test_another_vocabulary_of_a_size_only(tmp_path: Path) -> None:
    config = ModelConfig.from_dial("d1", 300)
    found = bench_step(BenchOptions("d1", 1, 8, 300, steps=1), Laptop())
    assert found["gflops"] == pytest.approx(flops_per_token(config, 8) * 8 / found["median_ms"] / 1e6)
    found = bench_decode(DecodeOptions("d1", prompt_tokens=4, tokens=2, prefill=8, vocab_size=300), Laptop())
    assert found["weights_mb"] == pytest.approx(4e-6 * config.matrix_parameters)
    for name in (str(tmp_path), "someone/model"):
        with refused("option.conflict", "--vocab-size", name):
            bench_step(BenchOptions(name, vocab_size=300), Laptop())


def test_every_step_is_a_line_as_llmc_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    bench_step(BenchOptions("d1", 1, 8, steps=2), Laptop())
    lines = [line for line in capsys.readouterr().err.splitlines() if STEP_LINE.match(line)]
    assert [line.split(":")[0] for line in lines] == [f"step {n}" for n in range(1, WARM_STEPS + 3)]


def test_step_refuses_a_model_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9))
    with pytest.raises(LlmpyError, match=r"gpt2-xl.* \d\d\.\d GB.* 1\.0 GB"):
        bench_step(BenchOptions("gpt2-xl"), Laptop())


def test_age_and_memory_of_this_process() -> None:
    process = psutil.Process()
    assert bench.process_age() == pytest.approx(time.time() - process.create_time(), abs=1.5)
    assert process.memory_info().rss * 0.9 < bench.peak_memory() < 100 * process.memory_info().rss
    assert bench.high_water(2**22 + 1) == 0


def test_the_roofline_of_a_step() -> None:
    """By operation and weight: calls, the least time at 10 GFLOP/s and 20 GB/s, and what bounds it."""
    found = bench_step(BenchOptions("d1", 2, 8, steps=1), Laptop())
    rows = {r["op"]: r for r in found["operations"]}
    C, Vp = 64, ModelConfig.from_dial("d1").padded_vocab_size
    assert rows["linear_forward 256 x 64"]["calls"] == rows["global_norm"]["calls"] == 1
    head = rows["classifier"]
    assert (head["bound"], head["floor_ms"]) == ("arithmetic", pytest.approx(6 * 16 * C * Vp / 1e7))
    norm, numbers = rows["global_norm"], sum(t.size for t in trained_table(ModelConfig.from_dial("d1")))
    assert (norm["bound"], norm["floor_ms"]) == ("memory", pytest.approx(4 * numbers / 2e7))
    assert found["roofline_ms"] == pytest.approx(sum(r["floor_ms"] for r in rows.values()))
    assert found["share_of_roofline"] == pytest.approx(found["roofline_ms"] / found["median_ms"])
    assert all(r["ms"] > 0 for r in rows.values())


def operations() -> set[str]:
    """The operations of the seam on arrays."""
    others = {"empty", "zeros", "to_host", "packed_size", "capture", "reversed"}
    return {n for n, f in vars(Ops).items() if inspect.isfunction(f) and not n.startswith("_")} - others


def test_every_operation_of_the_seam_has_cases() -> None:
    assert set(BENCH) == set(ARGUMENTS) == operations()
    assert all(BENCH.values())


@pytest.mark.parametrize("op", BENCH)
def test_arguments_are_those_of_the_seam(op: str) -> None:
    args = arguments(op, TINY, Laptop())
    assert list(args) == list(inspect.signature(getattr(Ops, op)).parameters)[1:]
    result = ops_module.time_case(Laptop(), op, TINY, 0.0, 1)
    assert result["gflop"] == (BY_SIZE[op](TINY) / 1e9 if op in FLOPS else 0)
    assert result["gb"] > 0
    assert all(np.isfinite(x).all() for x in args.values() if isinstance(x, np.ndarray) and x.dtype.kind == "f")


@pytest.mark.parametrize("op", FLOPS)
def test_flops_of_every_case(op: str) -> None:
    for variant in {case.variant for case in BENCH[op]}:
        case = replace(TINY, variant=variant)
        assert FLOPS[op](arguments(op, case, Laptop())) == BY_SIZE[op](case)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_module, "BUDGET", 0.0)


class Mixed(Laptop):
    """A machine with bfloat16 products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ("op", "plain", "mixed"),
    [
        ("layernorm_forward", 4 * (24 + 2 * (24 + 6 + 6) + 4 + 4), 4 * (24 + 2 * (6 + 6) + 4 + 4) + 2 * 2 * 24),
        ("embedding_forward", 4 * (6 + 24 + 12 + 2 * 24), 4 * (6 + 2 * 24) + 2 * (24 + 12)),
        ("embedding_backward", 4 * (6 + 24 + 2 * 24 + 2 * 1024 * 4), 4 * (6 + 24 + 2 * 24 + 2 * 1024 * 4)),
        ("adamw", 4 * 9 * 7, 4 * 9 * 7 + 2 * 2 * 9),
        ("global_norm", 4 * 9, 4 * 9),
        ("zero", 2 * 4 * 9, 2 * 4 * 9),
        ("narrow", 3 * 4 * 9, 4 * 9 + 2 * 2 * 9),
    ],
)
def test_bytes_that_are_moved(op: str, plain: int, mixed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, expected in ((Laptop(), plain), (Mixed(), mixed)):
        assert moved_bytes(op, arguments(op, TINY, machine)) == expected


def test_ops_prints_a_table_and_one_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ops_module, "BENCH", {op: [TINY] for op in BENCH})
    numbers = bench_ops(OpsOptions(), lambda name, **_: Laptop())
    assert [r["op"] for r in numbers["ops"]] == [op for op in BENCH if op != "narrow"]  # nothing to narrow
    assert numbers["peaks"]["GB/s"] == {"one_thread": 20.0, "all_threads": 20.0}
    for r in numbers["ops"]:
        limits = {"GFLOP/s": r["gflop"] / 10, "GB/s": r["gb"] / 20}
        assert limits[r["unit"]] == max(limits.values())
        assert r["share_of_peak"] == pytest.approx(1e3 * max(limits.values()) / r["median_ms"])
        assert r["rate"] == pytest.approx(r["share_of_peak"] * (10 if r["unit"] == "GFLOP/s" else 20))
    monkeypatch.setattr(ops_module, "bench_ops", lambda _: numbers)
    assert cli.main(["bench", "ops", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == numbers
    assert cli.main(["bench", "ops"]) == 0
    shown = capsys.readouterr().out
    assert "10.0 GFLOP/s" in shown
    assert "B2-T3-C4-NH2-OC5-V7-Vp8-n9" in shown


@pytest.mark.parametrize(("last", "steady"), [(10.0, True), (9.0, True), (8.0, False), (13.0, False)])
def test_a_varying_peak_is_reported(monkeypatch: pytest.MonkeyPatch, last: float, steady: bool) -> None:
    """Even with one operation: measured before and after it."""
    rates = iter([1.0, 10.0, last])  # of one thread, then of all
    monkeypatch.setattr(ops_module, "BENCH", {"adamw": [TINY]})
    monkeypatch.setattr(Laptop, "measure_peak", lambda _: next(rates))
    numbers = bench_ops(OpsOptions(), lambda name, **_: Laptop())
    assert numbers["steady"] is steady
    assert ("\nwarning: " in ops_module.table(numbers)) is not steady


def test_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_module, "BENCH", {op: [TINY] for op in BENCH})
    numbers = bench_ops(OpsOptions(op="adamw"), lambda name, **_: Laptop())
    assert [r["op"] for r in numbers["ops"]] == ["adamw"]
    with refused("bench.no-case", "--op narrow", "float32", "--dtype bfloat16"):
        bench_ops(OpsOptions(op="narrow"), lambda name, **_: Laptop())


def test_decode_prints_one_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = DecodeOptions("d1", batch_size=2, prompt_tokens=3, tokens=3, prefill=5)
    numbers = bench_decode(options, Laptop())
    config = ModelConfig.from_dial("d1")
    assert numbers["weights_mb"] * 1e6 == 4 * config.matrix_parameters
    assert numbers["tokens_per_s"] == pytest.approx(2e3 / numbers["ms_a_token"])
    assert numbers["weights_gb_s"] == pytest.approx(numbers["weights_mb"] / numbers["ms_a_token"])
    assert numbers["share_of_bandwidth"] == pytest.approx(numbers["weights_gb_s"] / 16)
    assert numbers["prefill_share_of_peak"] == pytest.approx(prefill_flops(config, 5) / numbers["prefill_ms"] / 1e7)
    assert (numbers["triad_gb_s"], len(numbers["token_ms"])) == (20.0, 3)
    monkeypatch.setattr(decode, "bench_decode", lambda _: numbers)
    assert cli.main(["bench", "decode", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == numbers
    assert cli.main(["bench", "decode"]) == 0
    assert "share of reading" in capsys.readouterr().out
    with refused("model.context-exceeded", "1036", "d1", "1024"):
        bench_decode(DecodeOptions("d1", tokens=1000), Laptop())


def test_flops_of_a_prefill() -> None:
    config = ModelConfig(layers=2, heads=1, channels=8, context=16, vocab_size=128)
    assert prefill_flops(config, 5) == 2 * 5 * 2 * 12 * 64 + 2 * 128 * 8 + 2 * 2 * 2 * 8 * 25 // 2
