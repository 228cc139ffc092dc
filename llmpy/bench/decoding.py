"""`llmpy bench decode`: generation against the peaks of the machine, all measured in one run.

decode     every token reads all matrices once: bytes per token · tokens/s, against a read-only stream of these bytes
           (a triad is faster where reads and writes overlap; both are printed)
prefill    FLOP/s of a long prompt, against the FMA peak

The model is untrained, the prompt random, and decoding greedy, as in `llmpy sample`.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, cast

import numpy as np

from .. import backend
from ..backend.machine import Machine
from ..errors import LlmpyError
from ..formats import config_of
from ..generate.generation import check_memory
from ..generate.kv_cache import Decoder
from ..generate.sampling import Choice, choose
from ..model.arena import Arena
from ..model.config import ModelConfig
from ..model.families import language_model, params_table
from ..model.initialise import initialise
from ..model.language_model import LanguageModel
from ..options.bench import DecodeOptions
from ..rng import Xorshift64Star
from ..system.terminal import aside
from ..system.words import columns, count_of
from . import peak_memory

WARM_TOKENS = 4  # the first packs the matrices
TOKENS_A_PEAK = 16  # tokens between two bandwidth measurements
PREFILLS = 5
GREEDY = Choice(temperature=0)
COIN = Xorshift64Star(1)  # unused by greedy choices


def bench_decode(options: DecodeOptions, machine: Machine | None = None) -> dict[str, Any]:
    """Return rates in tokens/s, GB/s (10⁹ bytes) and GFLOP/s, times in ms, memory in MB of 10⁶ bytes."""
    o, config = options, config_of(options.model, vocab_size=options.vocab_size)
    longest = max(o.prompt_tokens + WARM_TOKENS + o.tokens, o.prefill)
    if longest > config.context:
        what = f"{longest} tokens exceed the context of {o.model} ({config.context})"
        raise LlmpyError("model.context-exceeded", what, "Reduce --tokens, --prompt-tokens or --prefill")
    ops = machine or cast(Machine, backend.load("cpu", threads=o.threads, dtype=o.dtype))
    check_memory(config, ops, o.batch_size, longest)
    ops.warm_up(aside, decoding=True, kinds=config.kinds)
    model = language_model(config, ops, trainable=False)
    fill(model)
    decoder = Decoder(model, o.batch_size, longest)
    text = np.random.default_rng(0).integers(0, config.vocab_size, max(o.prefill, o.prompt_tokens)).tolist()

    peaks, prefills = [ops.measure_peak()], []
    for _ in range(PREFILLS):
        start = time.perf_counter()
        decoder.prefill(0, text[: o.prefill])
        prefills.append(1e3 * (time.perf_counter() - start))
        peaks.append(ops.measure_peak())

    slots = range(o.batch_size)
    tokens = [choose(decoder.prefill(slot, text[: o.prompt_tokens]), COIN, GREEDY) for slot in slots]
    readings, triads, times = [], [], []
    for n in range(-WARM_TOKENS, o.tokens + 1):
        if n >= 0 and n % TOKENS_A_PEAK == 0 or n == o.tokens:
            matrices = decoder.matrices.buffer.view(ops.dtype)
            readings.append(ops.measure_reading(matrices))
            triads.append(ops.measure_bandwidth())
        if n == o.tokens:
            break
        start = time.perf_counter()
        tokens = [choose(logits, COIN, GREEDY) for logits in decoder.decode(slots, tokens)]
        if n >= 0:
            times.append(1e3 * (time.perf_counter() - start))

    prefill, peak, ms, reading, triad = map(statistics.median, (prefills, peaks, times, readings, triads))
    weights = decoder.matrices.buffer.nbytes
    rate = weights / ms / 1e6
    gflops = prefill_flops(config, o.prefill) / prefill / 1e6
    return {
        "tokens_per_s": 1e3 * o.batch_size / ms, "share_of_bandwidth": rate / reading, "ms_a_token": ms,
        "weights_mb": weights / 1e6, "weights_gb_s": rate, "reading_gb_s": reading, "triad_gb_s": triad,
        "prefill_tokens": o.prefill, "prefill_ms": prefill, "prefill_gflops": gflops, "peak_gflops": peak,
        "prefill_share_of_peak": gflops / peak, "batch_size": o.batch_size, "prompt_tokens": o.prompt_tokens,
        **ops.version_info(), "dtype": "int8" if ops.quantises else np.dtype(ops.dtype).name, "threads": ops.threads,
        "peak_rss_mb": peak_memory() / 1e6, "token_ms": times,
    }  # fmt: skip


def fill(model: LanguageModel) -> None:
    """Set the parameters as in training from scratch."""
    if not model.quantised:
        initialise(model.params, model.config)
        return
    whole = Arena(params_table(model.config), np.empty, np.float32)
    initialise(whole, model.config)
    for tensor, x in whole.items():
        model.assign(tensor.name, x)


def prefill_flops(config: ModelConfig, T: int) -> int:
    """Return the FLOPs of a forward pass over T tokens with the logits of the last; attention is causal."""
    head = config.padded_vocab_size * config.channels
    layers = config.matrix_parameters - head
    return 2 * T * layers + 2 * head + 2 * config.layers * config.heads * config.head_size * T * T


def table(n: dict[str, Any]) -> str:
    """Return the result of `bench_decode` as a table."""
    rows = [
        ("arithmetic", f"{n['dtype']}, {count_of(n['threads'], 'thread')}"),
        ("decoding", f"{n['tokens_per_s']:,.1f} tokens/s"),
        ("a token", f"{n['ms_a_token']:,.2f} ms"),
        ("weights read", f"{n['weights_gb_s']:,.1f} GB/s"),
        ("memory, reading", f"{n['reading_gb_s']:,.1f} GB/s"),
        ("memory, triad", f"{n['triad_gb_s']:,.1f} GB/s"),
        ("share of reading", f"{100 * n['share_of_bandwidth']:.1f} %"),
        (f"prefill of {n['prefill_tokens']} tokens", f"{n['prefill_ms']:,.1f} ms"),
        ("its rate", f"{n['prefill_gflops']:,.1f} GFLOP/s"),
        ("machine's peak", f"{n['peak_gflops']:,.1f} GFLOP/s"),
        ("share of peak", f"{100 * n['prefill_share_of_peak']:.1f} %"),
        ("peak memory", f"{n['peak_rss_mb']:,.0f} MB"),
    ]
    return columns(rows)
