"""`llmpy bench decode`: generation against what the machine allows, all measured in one run.

decode     a token reads every matrix once: bytes a token · tokens/s against a stream that only reads, the same bytes.
           (A triad moves more a second where reads and writes overlap; nothing that only reads can. Both are told.)
prefill    FLOPs a second of a long prompt against the peak of multiply-adds
first      a process that starts, loads the model from disk and says its first token, kernels compiled before

The model is untrained and the prompt random. Tokens are the likeliest, chosen as `llmpy sample` does.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np

from .. import backend
from ..backend.machine import Machine
from ..errors import LlmpyError
from ..formats import native
from ..generate.generation import check_memory, generate
from ..generate.kv_cache import Decoder
from ..generate.sampling import Choice, choose
from ..model.arena import Arena
from ..model.config import ModelConfig
from ..model.gpt2 import GPT2, params_table
from ..model.initialise import initialise
from ..options.bench import DecodeOptions
from ..rng import Xorshift64Star
from ..run import checkpoint
from ..run.folder import MODEL_FILE
from ..system.words import columns
from . import peak_memory, process_age

WARM_TOKENS = 4  # the first packs the matrices
TOKENS_A_PEAK = 16  # between two measurements of the memory
PREFILLS = 5
FIRST_TOKENS = 3  # processes
GREEDY = Choice(temperature=0)
COIN = Xorshift64Star(1)  # greedy choices do not ask it


def bench_decode(options: DecodeOptions, machine: Machine | None = None) -> dict[str, Any]:
    """Rates in tokens/s, GB/s (10⁹ bytes) and GFLOP/s, times in ms, memory in MB of 10⁶ bytes."""
    o, config = options, ModelConfig.from_dial(options.model)
    length = o.prompt_tokens + WARM_TOKENS + o.tokens
    for name, needed in (("--tokens", length), ("--prefill", o.prefill)):
        if needed > config.context:
            raise LlmpyError(
                f"{name}: a text of {needed} tokens is longer than the model's context of {config.context}", "use less"
            )
    ops = machine or cast(Machine, backend.load("cpu", threads=o.threads, dtype=o.dtype))
    check_memory(config, ops, o.batch_size, max(length, o.prefill))
    ops.warm_up(lambda line: print(line, file=sys.stderr), decoding=True)
    with tempfile.TemporaryDirectory(prefix="llmpy-decode-") as folder:
        path = Path(folder, MODEL_FILE)
        params = Arena(params_table(config), np.empty, np.float32)
        initialise(params, config)
        checkpoint.write_model(path, config, config.context, params.buffer)
        del params
        model = load(path, ops)
        first = time_first_token(path, np.dtype(ops.dtype).name, ops.threads, o.prompt_tokens)
    decoder = Decoder(model, o.batch_size, max(length, o.prefill))
    text = np.random.default_rng(0).integers(0, config.vocab_size, max(o.prefill, o.prompt_tokens)).tolist()
    prefill, peak = time_prefill(decoder, ops, text[: o.prefill])
    times, reading, triad = time_tokens(decoder, ops, o.batch_size, text[: o.prompt_tokens], o.tokens)
    weights = decoder.matrices.size * np.dtype(ops.dtype).itemsize
    ms = statistics.median(times)
    rate = weights / ms / 1e6
    gflops = prefill_flops(config, o.prefill) / prefill / 1e6
    return {
        "tokens_per_s": 1e3 * o.batch_size / ms,
        "share_of_bandwidth": rate / reading,
        "ms_to_first_token": first,
        "ms_a_token": ms,
        "weights_mb": weights / 1e6,
        "weights_gb_s": rate,
        "reading_gb_s": reading,
        "triad_gb_s": triad,
        "prefill_tokens": o.prefill,
        "prefill_ms": prefill,
        "prefill_gflops": gflops,
        "peak_gflops": peak,
        "prefill_share_of_peak": gflops / peak,
        "batch_size": o.batch_size,
        "prompt_tokens": o.prompt_tokens,
        "dtype": np.dtype(ops.dtype).name,
        "threads": ops.threads,
        "peak_rss_mb": peak_memory() / 1e6,
        "token_ms": times,
    }


def time_prefill(decoder: Decoder, ops: Machine, text: list[int]) -> tuple[float, float]:
    """Median ms of a prefill, and of the peak of multiply-adds between, GFLOP/s."""
    peaks, times = [ops.measure_peak()], []
    for _ in range(PREFILLS):
        start = time.perf_counter()
        decoder.prefill(0, text)
        times.append(1e3 * (time.perf_counter() - start))
        peaks.append(ops.measure_peak())
    return statistics.median(times), statistics.median(peaks)


def time_tokens(
    decoder: Decoder, ops: Machine, batch: int, prompt: list[int], count: int
) -> tuple[list[float], float, float]:
    """The ms of each token after the first ones; medians of reading and of the triad meanwhile, GB/s."""
    slots = range(batch)
    tokens = [choose(decoder.prefill(slot, prompt), COIN, GREEDY) for slot in slots]
    reading, triad, times = [], [], []
    for n in range(-WARM_TOKENS, count + 1):
        if n >= 0 and n % TOKENS_A_PEAK == 0 or n == count:
            reading.append(ops.measure_reading(decoder.matrices.buffer))
            triad.append(ops.measure_bandwidth())
        if n == count:
            break
        start = time.perf_counter()
        tokens = [choose(logits, COIN, GREEDY) for logits in decoder.decode(slots, tokens)]
        if n >= 0:
            times.append(1e3 * (time.perf_counter() - start))
    return times, statistics.median(reading), statistics.median(triad)


def prefill_flops(config: ModelConfig, T: int) -> int:
    """Operations of a forward pass over T tokens with the logits of the last: 2 a multiply-add, causal attention."""
    head = config.padded_vocab_size * config.channels
    layers = config.matrix_parameters - head
    return 2 * T * layers + 2 * head + 2 * config.layers * config.channels * T * T


def load(path: Path, ops: Machine) -> GPT2:
    """The model of a file as `llmpy sample` loads it."""
    source = native.read_model(path)
    model = GPT2(source.config, ops, trainable=False)
    source.fill(model.params)
    return model


def time_first_token(path: Path, dtype: str, threads: int, prompt_tokens: int) -> float:
    """Median ms from the start of a process to its first token; the model's file has been read before."""
    words = [str(path), dtype, str(threads), str(prompt_tokens)]
    found = []
    for _ in range(FIRST_TOKENS):
        process = subprocess.run(
            [sys.executable, "-m", "llmpy.bench.decoding", *words], capture_output=True, encoding="utf-8"
        )
        if process.returncode:
            last = process.stderr.strip().splitlines()[-1:] or ["it said nothing"]
            raise LlmpyError(f"the process that should say a first token failed: {last[0]}")
        found.append(float(json.loads(process.stdout)))
    return statistics.median(found)


def first_token(path: Path, dtype: str, threads: int, prompt_tokens: int) -> float:
    """In the new process: as `llmpy sample`, load and say a token; the ms that this process lives."""
    import tokenizers  # noqa: F401 - what `llmpy sample` loads too

    ops = cast(Machine, backend.load("cpu", threads=threads, dtype=dtype))
    ops.warm_up(lambda line: print(line, file=sys.stderr), decoding=True)
    model = load(path, ops)
    next(generate(model, [0] * prompt_tokens, 64, model.config.context, COIN, GREEDY))
    return 1e3 * process_age()


def table(numbers: dict[str, Any]) -> str:
    """The same for a reader."""
    n = numbers
    return columns(
        [
            ("arithmetic", f"{n['dtype']}, {n['threads']} thread{'s' * (n['threads'] > 1)}"),
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
            ("start to first token", f"{n['ms_to_first_token']:,.0f} ms"),
            ("peak memory", f"{n['peak_rss_mb']:,.0f} MB"),
        ]
    )


if __name__ == "__main__":
    print(json.dumps(first_token(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
