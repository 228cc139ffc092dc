"""docs/benchmarks.md against bench/results/, and how dev/benchmarks.py formats a result."""

from __future__ import annotations

import json
import runpy
from typing import Any

from support.pages import ROOT

TOOL = runpy.run_path(str(ROOT / "dev" / "benchmarks.py"))
PAGE = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")


def result(*peers: tuple[str, float, float | None], **more: Any) -> dict[str, Any]:
    """A result of programs with a median in ms and a ratio."""
    made = [
        {
            "name": name, "dtype": "bfloat16" if "bf16" in name else "float32", "median_ms": ms, "ratio": ratio,
            "tokens_per_s": 2e3 / ms, "peak_rss_mb": 1e3 * ms, "prefill_ms": 50 * ms,
        }
        for name, ms, ratio in peers
    ]  # fmt: skip
    made[0] |= {"isa": "amx", "share_of_roofline": 0.876, "share_of_bandwidth": 0.5, "numba": "0.9"}
    about = {"model": "d3", "vocab_size": 512, "batch_size": 2, "sequence_length": 64, "decoding": False}
    machine = {"cpu": "Intel(R) Xeon(R) Processor", "cores": 2}
    about |= {"command": "llmpy bench", "date": "2026-11-29T10:00:00", "tcmalloc": None, "machine": machine}
    return about | {"llmpy": "0.2.0", "peers": made} | more


def test_the_page_shows_the_results() -> None:
    assert TOOL["written"](PAGE, TOOL["load"]()) == PAGE
    assert len(TOOL["load"]()) == len([*(ROOT / "bench" / "results").iterdir()])


def test_a_row_has_the_faster_of_eager_and_compiled() -> None:
    ours, theirs = [("llm.py fp32", 2.0, 1.0), ("llm.py bf16", 1.0, 1.0)], ("llm.c", 9.0, 4.5)
    torch = [("PyTorch fp32", 5.0, 2.5), ("torch.compile fp32", 4.0, 2.0), ("PyTorch bf16", 3.0, 3.0)]
    text = TOOL["tables"]([result(*ours, *torch, theirs)])
    head = "work | llm.py | PyTorch | llm.c | of the limit | GB (PyTorch) | date"
    cells = "d3, vocabulary 512, step of 2 × 64 tokens | 2.0 / 1.0 ms | 4.0 / 3.0 ms (2.00 / 3.00 ×)"
    cells += " | 9.0 / – ms (4.50 / – ×) | 88 / – % | 2.0 / 1.0 (4.0 / 3.0) | 2026-11-29"
    lines = ["### Intel Xeon (amx), 2 cores", "", f"| {head} |", "|---" + 6 * "|---:" + "|", f"| {cells} |", ""]
    assert text.splitlines() == [*lines, "With Numba 0.9, llm.py 0.2.0, no tcmalloc.", "", "```", "llmpy bench", "```"]


def test_decoding_has_a_row_for_prompts() -> None:
    n = result(("llm.py fp32", 20.0, 1.0), ("llama.cpp fp32", 30.0, 1.5), ("llama.cpp bf16", 50.0, None), decoding=True)
    text = TOOL["tables"]([json.loads(json.dumps(n | {"tcmalloc": "x", "vocab_size": None, "model": "gpt2"}))])
    assert "| work | llm.py | llama.cpp | of the limit | date |" in text
    rows = (
        "100 / – tokens/s | 67 / 40 tokens/s (1.50 / – ×) | 50 / – %",
        "1,000 / – ms | 1,500 / 2,500 ms (1.50 / – ×) |",
    )
    assert f"| GPT-2 124M, decoding, batch 2, after 64 tokens | {rows[0]} | 2026-11-29 |" in text
    assert f"| GPT-2 124M, prompt of 64 tokens | {rows[1]}  | 2026-11-29 |" in text


def test_the_newest_cpu_is_first() -> None:
    old = result(("llm.py fp32", 2.0, 1.0), date="2026-01", machine={"cpu": "Old", "cores": 4}, transcribed="Copied.")
    text = TOOL["tables"]([old, result(("llm.py fp32", 2.0, 1.0))])
    assert 0 == text.index("### Intel Xeon") < text.index("### Old (amx), 4 cores") < text.index(" Copied.")
