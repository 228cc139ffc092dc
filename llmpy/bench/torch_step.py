"""A GPT-2 training step in PyTorch, for `llmpy bench peers`. A script for any Python with PyTorch; never imported.

    python llmpy/bench/torch_step.py '{"model": {"layers": 12, …}, "B": 4, "T": 64, "dtype": "bfloat16", …}'

Written to be fast: fused AdamW, scaled_dot_product_attention, the tied head padded to a multiple of 128,
bfloat16 by autocast over float32 parameters, gradients set to None. It does less than llm.py, which also
computes the global norm of the gradients and clips. Prints llm.c's line for every step.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(self.ln_1(x)).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
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


def main() -> None:
    """Time and print the steps."""
    o = SimpleNamespace(**json.loads(sys.argv[1]))
    torch.set_num_threads(o.threads)
    torch.manual_seed(0)

    model = GPT2(o.model)
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


if __name__ == "__main__":
    main()
