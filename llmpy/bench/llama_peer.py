"""Decoding in llama.cpp, for `llmpy bench peers`. A script for any Python with llama-cpp-python; never imported.

    python llmpy/bench/llama_peer.py '{"model": "gpt2.gguf", "vocab_size": 50257, "B": 1, "T": 32, "steps": 64, …}'

Calls llama_decode, without the library's sampler and loop; the likeliest token is next. Settings are llama.cpp's
defaults: keys and values in float16, flash attention where it is faster. Prints the times of the tokens, and the
instructions that the library was built for, as JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from types import SimpleNamespace
from typing import Any

import llama_cpp as llama
import numpy as np

WARM_TOKENS, PREFILLS = 4, 5  # as in `llmpy bench decode`


def main() -> None:
    """Time prompts of one text and the tokens of B; print them, in ms."""
    o = SimpleNamespace(**json.loads(sys.argv[1]))
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(o.model.encode(), llama.llama_model_default_params())
    settings = llama.llama_context_default_params()
    settings.n_threads = settings.n_threads_batch = o.threads
    settings.n_seq_max = o.B
    settings.n_ctx = o.B * (o.T + WARM_TOKENS + o.steps)
    settings.n_batch = max(o.B, o.T)
    context = llama.llama_init_from_model(model, settings)
    batch = llama.llama_batch_init(settings.n_batch, 0, 1)

    def decode(tokens: Any, start: int, texts: Any) -> list[int]:
        """Append tokens (B, T) at positions start … of these texts; return the likeliest next ones."""
        batch.n_tokens = tokens.size
        for i, (row, t) in enumerate(np.ndindex(tokens.shape)):
            batch.token[i], batch.pos[i], batch.seq_id[i][0] = int(tokens[row, t]), start + t, texts[row]
            batch.n_seq_id[i], batch.logits[i] = 1, t == tokens.shape[1] - 1
        if code := llama.llama_decode(context, batch):
            sys.exit(f"llama_decode returned {code}")
        last = range(tokens.shape[1] - 1, tokens.size, tokens.shape[1])
        logits = (llama.llama_get_logits_ith(context, i) for i in last)
        return [int(np.ctypeslib.as_array(x, (o.vocab_size,)).argmax()) for x in logits]

    text = np.random.default_rng(0).integers(0, o.vocab_size, (o.B, o.T))
    tokens, prefills, times = [0] * o.B, [], []
    for i in [*[0] * PREFILLS, *range(1, o.B)]:
        llama.llama_memory_seq_rm(llama.llama_get_memory(context), i, -1, -1)
        start = time.perf_counter()
        tokens[i : i + 1] = decode(text[i : i + 1], 0, [i])
        prefills.append(1e3 * (time.perf_counter() - start))
    for n in range(o.T, o.T + WARM_TOKENS + o.steps):
        start = time.perf_counter()
        tokens = decode(np.array(tokens)[:, None], n, range(o.B))
        times.append(1e3 * (time.perf_counter() - start))
    built = {"llama_cpp_python": llama.__version__, "features": llama.llama_print_system_info().decode()}
    print(json.dumps({"prefill_ms": statistics.median(prefills), "token_ms": times[WARM_TOKENS:], **built}), flush=True)


if __name__ == "__main__":
    main()
