"""GPT-2 on both backends against an independent one in PyTorch: logits, gradients, ten AdamW steps.

PyTorch is optional. It runs in float64 from the same float32 values, so differences are ours. The reference must
agree to 1e-10, the CPU backend to 1e-5.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmpy.backend import load
from llmpy.model.config import ModelConfig
from llmpy.model.gpt2 import GPT2

torch = pytest.importorskip("torch")
F = torch.nn.functional

CONFIG = ModelConfig(layers=2, heads=3, channels=48, context=40, vocab_size=97)
TOLERANCE = {"reference": 1e-10, "cpu": 1e-5}
LR, BETA1, BETA2, DECAY = 1e-3, 0.9, 0.95, 0.1
# Adam divides a gradient by its own size: one that is nearly 0 moves its parameter by a whole lr, in a direction
# chosen by float32 rounding. A larger eps damps those; float64 covers the usual one.
EPS = {"reference": 1e-8, "cpu": 1e-4}


def torch_logits(p: dict[str, Any], tokens: Any) -> Any:
    """Return logits (B, T, V) from named parameters: the textbook GPT-2, in PyTorch's own layers."""
    B, T = tokens.shape
    C, NH, V = CONFIG.channels, CONFIG.heads, CONFIG.vocab_size
    x = F.embedding(tokens, p["wte"]) + p["wpe"][:T]
    for l in range(CONFIG.layers):
        h = F.layer_norm(x, (C,), p["ln_1_w"][l], p["ln_1_b"][l], eps=1e-5)
        qkv = F.linear(h, p["attn_qkv_w"][l], p["attn_qkv_b"][l])
        q, k, v = (y.view(B, T, NH, C // NH).transpose(1, 2) for y in qkv.split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
        x = x + F.linear(y, p["attn_proj_w"][l], p["attn_proj_b"][l])
        h = F.layer_norm(x, (C,), p["ln_2_w"][l], p["ln_2_b"][l], eps=1e-5)
        h = F.gelu(F.linear(h, p["mlp_fc_w"][l], p["mlp_fc_b"][l]), approximate="tanh")
        x = x + F.linear(h, p["mlp_proj_w"][l], p["mlp_proj_b"][l])
    return F.linear(F.layer_norm(x, (C,), p["ln_f_w"], p["ln_f_b"], eps=1e-5), p["wte"])[..., :V]


def torch_loss(p: dict[str, Any], tokens: Any, targets: Any) -> Any:
    return F.cross_entropy(torch_logits(p, tokens).flatten(0, 1), targets.flatten(), ignore_index=-1)


@pytest.fixture(params=["reference", "cpu"])
def model(request: pytest.FixtureRequest) -> GPT2:
    ops = load("cpu", threads=2) if request.param == "cpu" else load("reference")
    model = GPT2(CONFIG, ops)
    rng = np.random.default_rng(1)
    for tensor, view in model.params.items():
        view[...] = rng.normal((tensor.init == "ones") * 1.0, 0.1, tensor.shape).astype(np.float32)
    return model


@pytest.fixture
def twin(model: GPT2) -> dict[str, Any]:
    """Return the model's parameters as PyTorch leaves in float64."""
    return {t.name: torch.tensor(view, dtype=torch.float64, requires_grad=True) for t, view in model.params.items()}


def batch(seed: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and targets (2, 33), int32, with some targets masked."""
    text = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (2, 34), dtype=np.int32)
    targets = text[:, 1:].copy()
    targets[1, :4] = -1
    return text[:, :-1].copy(), targets


def as_torch(x: np.ndarray) -> Any:
    return torch.from_numpy(x.astype(np.int64))


def check(model: GPT2, what: str, got: np.ndarray, want: Any) -> None:
    want = want.detach().numpy()
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error <= TOLERANCE[model.ops.name], f"{what}: relative error {error:.2e}"


def test_logits(model: GPT2, twin: dict[str, Any]) -> None:
    tokens, _ = batch()
    want = torch_logits(twin, as_torch(tokens))
    for position in (0, 15, -1):
        check(model, f"logits at {position}", model.logits(tokens, position), want[:, position])


def test_loss_and_gradients(model: GPT2, twin: dict[str, Any]) -> None:
    tokens, targets = batch()
    loss = torch_loss(twin, as_torch(tokens), as_torch(targets))
    loss.backward()
    assert model.loss_and_grads(tokens, targets) == pytest.approx(loss.item(), rel=TOLERANCE[model.ops.name])
    assert model.grads is not None
    for tensor, gradient in model.grads.items():
        check(model, tensor.name, gradient, twin[tensor.name].grad)


def test_ten_adamw_steps(model: GPT2, twin: dict[str, Any]) -> None:
    matrices = [twin[t.name] for t in model.params.table if t.decay]
    vectors = [twin[t.name] for t in model.params.table if not t.decay]
    theirs = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=LR,
        betas=(BETA1, BETA2),
        eps=EPS[model.ops.name],
    )
    ops, end = model.ops, model.matrix_elements
    m, v = np.zeros((2, model.params.size), model.ops.dtype)
    for step in range(1, 11):
        tokens, targets = batch(seed=step)
        loss = torch_loss(twin, as_torch(tokens), as_torch(targets))
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        assert model.loss_and_grads(tokens, targets) == pytest.approx(loss.item(), rel=TOLERANCE[model.ops.name])
        assert model.grads is not None
        for part, decay in ((slice(end), DECAY), (slice(end, None), 0.0)):
            arrays = (x[part] for x in (model.params.buffer, model.grads.buffer, m, v))
            ops.adamw(*arrays, LR, BETA1, BETA2, EPS[ops.name], decay, 1.0, step)
    for tensor, view in model.params.items():
        check(model, tensor.name, view, twin[tensor.name])
