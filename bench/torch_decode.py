"""GPT-2 generation in eager PyTorch with a KV cache, to compare with `llmpy bench decode`.

    python bench/torch_decode.py --dtype bfloat16 -B 1

The layers are those of torch_step.py. The cache is allocated once and written in place; weights are stored in the
dtype of the products; no gradients. Greedy. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "llmpy" / "bench"))
from torch_step import GPT2  # noqa: E402 - as a file: llmpy may not be installed in this Python

SIZE = {"layers": 12, "heads": 12, "channels": 768, "context": 1024, "vocab_size": 50257, "padded_vocab_size": 50304}
WARM_TOKENS = 4


def attend(block: nn.Module, x: Tensor, cache: Tensor, start: int) -> Tensor:
    """Apply a layer to positions start … of x (B, T, C); cache (2, B, NH, S, HS) holds the earlier ones."""
    B, T, C = x.shape
    heads = block.heads
    q, k, v = block.qkv(block.ln_1(x)).view(B, T, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
    cache[0, :, :, start : start + T], cache[1, :, :, start : start + T] = k, v
    k, v = cache[0, :, :, : start + T], cache[1, :, :, : start + T]
    y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
    x = x + block.proj(y.transpose(1, 2).reshape(B, T, C))
    return x + block.mlp_proj(F.gelu(block.fc(block.ln_2(x)), approximate="tanh"))


def logits(model: GPT2, tokens: Tensor, caches: list[Tensor], start: int) -> Tensor:
    """Return logits (B, V) after the last of tokens (B, T) at positions start …"""
    x = model.wte(tokens) + model.wpe.weight[start : start + tokens.shape[1]]
    for block, cache in zip(model.blocks, caches, strict=True):
        x = attend(block, x, cache, start)
    return F.linear(model.ln_f(x[:, -1]), model.wte.weight)[:, : SIZE["vocab_size"]]


@torch.inference_mode()
def main() -> None:
    """Time decoding and prefill, in ms."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("-B", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, o.dtype)
    model = GPT2(SIZE).to(dtype).eval()
    shape = (2, o.B, SIZE["heads"], SIZE["context"], SIZE["channels"] // SIZE["heads"])
    caches = [torch.zeros(shape, dtype=dtype) for _ in model.blocks]
    text = torch.randint(0, SIZE["vocab_size"], (o.B, max(o.prefill, o.prompt_tokens)))
    prefills = []
    for _ in range(3):
        start = time.perf_counter()
        logits(model, text[:1, : o.prefill], [c[:, :1] for c in caches], 0)
        prefills.append(1e3 * (time.perf_counter() - start))
    tokens = logits(model, text[:, : o.prompt_tokens], caches, 0).argmax(-1, keepdim=True)
    times = []
    for n in range(WARM_TOKENS + o.tokens):
        start = time.perf_counter()
        tokens = logits(model, tokens, caches, o.prompt_tokens + n).argmax(-1, keepdim=True)
        tokens.tolist()
        times.append(1e3 * (time.perf_counter() - start))
    ms = statistics.median(times[WARM_TOKENS:])
    print(
        json.dumps(
            {
                "program": f"PyTorch {torch.__version__}, eager, sdpa",
                "dtype": o.dtype,
                "tokens_per_s": 1e3 * o.B / ms,
                "ms_a_token": ms,
                "prefill_ms": min(prefills),
            }
        )
    )


if __name__ == "__main__":
    main()
