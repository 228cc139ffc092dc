"""GPT-2 in PyTorch, for `llmpy bench peers`. A script for any Python with PyTorch; never imported.

    python llmpy/bench/torch_peer.py '{"model": {"layers": 12, …}, "B": 4, "T": 64, "dtype": "bfloat16", …}'

Training is written to be fast: fused AdamW, scaled_dot_product_attention, the tied head padded to a multiple of 128,
bfloat16 by autocast over float32 parameters, gradients set to None. It does less than llm.py, which also
computes the global norm of the gradients and clips. Prints llm.c's line for every step.

Decoding is greedy. The cache is allocated once and written in place, and all weights are stored in the dtype of the
products. Prints the times of the tokens as JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WARM_TOKENS, PREFILLS = 4, 5  # as in `llmpy bench decode`


class Block(nn.Module):
    """A transformer layer."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.fc = nn.Linear(channels, 4 * channels)
        self.mlp_proj = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        """Return the layer's output for positions start …; cache (2, B, NH, S, HS) holds the earlier ones."""
        B, T, C = x.shape
        q, k, v = self.qkv(self.ln_1(x)).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache[0, :, :, start : start + T], cache[1, :, :, start : start + T] = k, v
            k, v = cache[:, :, :, : start + T]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_proj(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """The model; `size` holds the fields of llm.py's ModelConfig and the padded vocabulary."""

    def __init__(self, size: dict[str, int]) -> None:
        super().__init__()
        self.wte = nn.Embedding(size["padded_vocab_size"], size["channels"])
        self.wpe = nn.Embedding(size["context"], size["channels"])
        self.blocks = nn.ModuleList(Block(size["channels"], size["heads"]) for _ in range(size["layers"]))
        self.ln_f = nn.LayerNorm(size["channels"])
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        T = tokens.shape[1]
        x = self.wte(tokens) + self.wpe.weight[:T]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def decode(self, tokens: Tensor, caches: list[Tensor], start: int) -> Tensor:
        """Return the likeliest tokens (B, 1) after tokens (B, T) at positions start …"""
        x = self.wte(tokens) + self.wpe.weight[start : start + tokens.shape[1]]
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache, start)
        return F.linear(self.ln_f(x[:, -1:]), self.wte.weight).argmax(-1)


def train(model: GPT2, o: SimpleNamespace) -> None:
    """Time and print steps."""
    run = torch.compile(model) if o.compile else model
    groups = [
        {"params": [p for p in model.parameters() if (p.dim() == 2) == matrices], "weight_decay": 0.1 * matrices}
        for matrices in (True, False)
    ]
    fused = [*map(int, torch.__version__.split(".")[:2])] >= [2, 4]  # since 2.4 for CPUs
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, fused=fused)
    text = torch.randint(0, o.model["vocab_size"], (o.B * o.T + 1,))
    tokens, targets = text[:-1].view(o.B, o.T), text[1:].view(o.B, o.T)

    for step in range(1, o.steps + 1):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16) if o.dtype == "bfloat16" else nullcontext():
            loss = run(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        took = 1e3 * (time.perf_counter() - start)
        print(f"step {step}: train loss {value:.6f} (took {took:.3f} ms)", flush=True)


@torch.inference_mode()
def decode(model: GPT2, o: SimpleNamespace) -> None:
    """Time prompts of one text and the tokens of B; print them, in ms."""
    dtype, heads = getattr(torch, o.dtype), o.model["heads"]
    model.to(dtype).eval()
    length = o.T + WARM_TOKENS + o.steps
    caches = [torch.zeros(2, o.B, heads, length, o.model["channels"] // heads, dtype=dtype) for _ in model.blocks]
    text = torch.randint(0, o.model["vocab_size"], (o.B, o.T))
    prefills, times = [], []
    for _ in range(PREFILLS):
        start = time.perf_counter()
        model.decode(text[:1], [c[:, :1] for c in caches], 0)
        prefills.append(1e3 * (time.perf_counter() - start))
    tokens = model.decode(text, caches, 0)
    for n in range(o.T, length):
        start = time.perf_counter()
        tokens = model.decode(tokens, caches, n)
        tokens.tolist()
        times.append(1e3 * (time.perf_counter() - start))
    print(json.dumps({"prefill_ms": statistics.median(prefills), "token_ms": times[WARM_TOKENS:]}), flush=True)


def main() -> None:
    """Run the work given as JSON."""
    o = SimpleNamespace(**json.loads(sys.argv[1]))
    torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    print(json.dumps({"torch": torch.__version__}), flush=True)
    (decode if o.decoding else train)(GPT2(o.model), o)


if __name__ == "__main__":
    main()
