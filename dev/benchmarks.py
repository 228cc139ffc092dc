"""Write the tables of docs/benchmarks.md from bench/results/*.json, one file per CPU and work.

llmpy bench peers … --json bench/results/CPU-WORK.json
python dev/benchmarks.py

A table per kind of CPU, the newest first; a row per file, and one for prompts. `transcribed` marks medians that were
copied from an earlier table.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmpy.model.config import ModelConfig

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "bench" / "results", ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- dev/benchmarks.py writes what follows -->\n", "<!-- to here -->\n"
OURS, DTYPES = "llm.py", ("float32", "bfloat16", "int8")
PROGRAMS = {"torch.compile": "PyTorch"}  # the faster of eager and compiled
VERSIONS = {"numba": "Numba", "numpy": "NumPy", "torch": "PyTorch", "llama_cpp_python": "llama-cpp-python"}
Best = dict[str, dict[str, dict[str, Any]]]  # program → dtype → its fastest peer


def best_of(n: dict[str, Any], figure: str) -> Best:
    """Return the fastest peer of each program and dtype that has the figure, in ms."""
    found: Best = {}
    for peer in (p for p in n["peers"] if figure in p):
        name = re.sub(r" (fp32|bf16|int8)$", "", peer["name"])
        of_name, dtype = found.setdefault(PROGRAMS.get(name, name), {}), peer["dtype"]
        of_name[dtype] = min(of_name.get(dtype, peer), peer, key=lambda p: p[figure])
    return found


def pair(peers: dict[str, dict[str, Any]], value: Callable[[dict[str, Any]], float | None], form: str) -> str:
    """Return a number of each type, as `540 / 330`; "" if there is none. int8 only if it was measured."""
    found = [value(peers[dtype]) if dtype in peers else None for dtype in DTYPES if dtype != "int8" or dtype in peers]
    return " / ".join("–" if x is None else form.format(x) for x in found) if any(found) else ""


def row(n: dict[str, Any], work: str, figure: str, share: str) -> dict[str, str]:
    """Return the cells of a row by the names of their columns; `share` of the limit is llm.py's."""
    best = best_of(n, figure)
    ours = best.get(OURS, {})

    def time(p: dict[str, Any]) -> float:
        return float(p[figure])

    def ratio(p: dict[str, Any]) -> float | None:
        if figure == "median_ms":
            return p["ratio"]
        return time(p) / time(ours[p["dtype"]]) if p["dtype"] in ours else None

    cells, least = {"work": work}, min(time(p) for peers in best.values() for p in peers.values())
    for name, peers in sorted(best.items(), key=lambda item: item[0] != OURS):
        if n["decoding"] and figure == "median_ms":
            cells[name] = pair(peers, lambda p: p["tokens_per_s"], "{:,.0f}") + " tokens/s"
        elif least >= 2000:
            cells[name] = pair(peers, lambda p: time(p) / 1e3, "{:,.1f}") + " s"
        else:
            cells[name] = pair(peers, time, "{:,.0f}" if least >= 100 else "{:,.1f}") + " ms"
        if name != OURS and (times_ours := pair(peers, ratio, "{:.2f}")):
            cells[name] += f" ({times_ours} ×)"
    limit = pair(ours, lambda p: 100 * p[share] if share in p else None, "{:.0f}")
    cells["of the limit"] = f"{limit} %" if limit else ""
    if not n["decoding"]:
        own, torch = (
            pair(best.get(name, {}), lambda p: p["peak_rss_mb"] and p["peak_rss_mb"] / 1e3, "{:.1f}")
            for name in (OURS, "PyTorch")
        )
        cells["GB (PyTorch)"] = f"{own} ({torch})" if own and torch else own
    return cells | {"date": n["date"][:10]}


def rows(n: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Yield the rows of a result: one, and one for the prompts of decoding."""
    model = "GPT-2 124M" if n["model"] == "gpt2" else n["model"]
    model += f", vocabulary {n['vocab_size']:,}" if n["vocab_size"] else ""
    B, T = n["batch_size"], n["sequence_length"]
    if n["decoding"]:
        yield row(n, f"{model}, decoding, batch {B}, after {T} tokens", "median_ms", "share_of_bandwidth")
        if any("prefill_ms" in p for p in n["peers"]):
            yield row(n, f"{model}, prompt of {T} tokens", "prefill_ms", "prefill_share_of_peak")
    else:
        yield row(n, f"{model}, step of {B} × {T} tokens", "median_ms", "share_of_roofline")


def cpu_of(n: dict[str, Any]) -> str:
    """Return the kind of CPU and its cores."""
    name = re.sub(r"\((R|TM)\)| Processor| CPU", "", n["machine"]["cpu"])
    isa = next((f" ({p['isa']})" for p in n["peers"] if "isa" in p), "")
    return f"{name}{isa}, {n['machine']['cores']} cores"


def section(title: str, results: list[dict[str, Any]]) -> str:
    """Return heading, table, versions and commands of a kind of CPU."""
    found = [cells for n in results for cells in rows(n)]
    last = ["of the limit", "GB (PyTorch)", "date"]
    names = list(dict.fromkeys(name for cells in found for name in cells if name not in last and any(cells[name])))
    names += [name for name in last if any(cells.get(name) for cells in found)]
    lines = [f"### {title}", "", f"| {' | '.join(names)} |", f"|---{'|---:' * (len(names) - 1)}|"]
    lines += [f"| {' | '.join(cells.get(name, '') for name in names)} |" for cells in found]
    versions = {f"{name} {p[key]}" for n in results for p in n["peers"] for key, name in VERSIONS.items() if key in p}
    versions |= {f"llm.py {n['llmpy']}" for n in results if "llmpy" in n}
    versions |= {"tcmalloc for PyTorch" if n["tcmalloc"] else "no tcmalloc" for n in results}
    notes = dict.fromkeys(n.get("transcribed", "") for n in results)
    if failed := sorted({name for n in results for name in n.get("failed", ())}):
        notes[f"Could not be measured: {', '.join(failed)}."] = None
    lines += ["", textwrap.fill(" ".join(filter(None, [f"With {', '.join(sorted(versions))}.", *notes])), 118)]
    if commands := list(dict.fromkeys(n["command"] for n in results if n["command"])):
        lines += ["", "```", *commands, "```"]
    return "\n".join(lines) + "\n"


def tables(results: list[dict[str, Any]]) -> str:
    """Return the sections of all CPUs."""

    def order(n: dict[str, Any]) -> tuple[Any, ...]:
        size = ModelConfig.from_dial(n["model"], n["vocab_size"]).matrix_parameters
        return n["decoding"], -size, n["batch_size"] * n["sequence_length"], n["date"]

    groups: dict[str, list[dict[str, Any]]] = {}
    for n in sorted(results, key=lambda n: n["date"], reverse=True):
        groups.setdefault(cpu_of(n), []).append(n)
    return "\n".join(section(title, sorted(group, key=order)) for title, group in groups.items())


def written(page: str, results: list[dict[str, Any]]) -> str:
    """Return the page with the tables of these results."""
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    return f"{before}{BEGIN}\n{tables(results)}\n{END}{after}"


def load() -> list[dict[str, Any]]:
    """Return all results."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*.json"))]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8"), load()), "utf-8")
