"""Fine-tuning as in PyTorch: 20 steps of every parameter with transformers, and of adapters with peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmpy
from llmpy import backend
from llmpy.formats import open_model
from llmpy.model.families import language_model
from llmpy.train.optimizer import AdamW

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")  # of these libraries

SHAPE = {
    "vocab_size": 97, "hidden_size": 72, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 64, "initializer_range": 0.1, "head_dim": 8,
    "attn_implementation": "eager",
}  # fmt: skip
STRETCHED = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
KINDS = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "untied": ("Llama", {"tie_word_embeddings": False, "rope_parameters": STRETCHED}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 128}),
}
LR, STEPS = 1e-3, 20
BATCHES = [np.random.default_rng(i).integers(0, 97, (2, 34), dtype=np.int32) for i in range(3)]


def made(kind: str, folder: Path) -> Any:
    """Return a random model of transformers, saved in `folder`."""
    torch.manual_seed(1)
    name, more = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **more})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def theirs(model: Any, tokens: np.ndarray) -> Any:
    """Return PyTorch's loss of rows with their targets."""
    x = torch.from_numpy(tokens.astype(np.int64))
    logits = model(x[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), x[:, 1:].reshape(-1))


def trained(model: Any, parameters: list[Any]) -> list[float]:
    """Return the losses of PyTorch's AdamW."""
    optimizer = torch.optim.AdamW(parameters, LR, (0.9, 0.95), 1e-8, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        loss = theirs(model, BATCHES[step % 3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def ours(folder: Path) -> tuple[list[float], Any]:
    """Return the losses of our AdamW on the model in `folder`, and the model."""
    source = open_model(folder)
    model = language_model(source.config, backend.load("cpu", threads=2, dtype="float32"))
    source.load_into(model)
    model.reserve(2, 33, training=True)
    optimizer = AdamW(model, 0.9, 0.95, 0.0, clip=0.0)
    losses = []
    for step in range(STEPS):
        rows = BATCHES[step % 3]
        losses.append(model.loss_and_grads(np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])))
        optimizer.step(LR)
    return losses, model


@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_gradients(kind: str, tmp_path: Path) -> None:
    """To 5e-6 of the largest of each tensor, in float32."""
    peer = made(kind, tmp_path)
    model = llmpy.load(tmp_path, dtype="float32", threads=2)
    rows = BATCHES[0]
    loss = theirs(peer, rows)
    loss.backward()
    value, gradients = model.loss_and_grads(rows)
    assert value == pytest.approx(loss.item(), rel=1e-6)
    with torch.no_grad():
        logits = peer(torch.from_numpy(rows.astype(np.int64))).logits.numpy()
    assert np.abs(model.logits(rows) - logits).max() <= 5e-6 * np.abs(logits).max()
    known = {name: p.grad.numpy() for name, p in peer.named_parameters()}
    assert gradients.keys() == known.keys()
    for name, gradient in known.items():
        assert np.abs(gradients[name] - gradient).max() <= 5e-6 * np.abs(gradient).max(), name


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_fine_tuning(kind: str, tmp_path: Path) -> None:
    peer = made(kind, tmp_path)
    losses, _ = ours(tmp_path)
    assert losses == pytest.approx(trained(peer, list(peer.parameters())), rel=1e-5)
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize(("kind", "targets"), [("llama", "all-linear"), ("qwen3", ["q_proj", "v_proj", "down_proj"])])
def test_losses_of_adapters(kind: str, targets: Any, tmp_path: Path) -> None:
    """From peft's files, which ours equal again after training."""
    peft = pytest.importorskip("peft")
    base = made(kind, tmp_path / "base")
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    peer = peft.get_peft_model(base, config)
    peer.base_model.model.config._name_or_path = str(tmp_path / "base")
    peer.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    peer.save_pretrained(tmp_path / "adapter")
    losses, model = ours(tmp_path / "adapter")
    assert losses == pytest.approx(trained(peer, [p for p in peer.parameters() if p.requires_grad]), rel=1e-5)
    api = llmpy.load(tmp_path / "adapter", dtype="float32", threads=2)
    for (_, view), (_, new) in zip(api._net.trained.items(), model.trained.items(), strict=True):
        view[...] = new
    api.store_weights()
    api.export_hf(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "ours"
    )
    x = torch.from_numpy(BATCHES[0].astype(np.int64))
    with torch.no_grad():
        want, got = peer(x).logits.numpy(), again(x).logits.numpy()
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()
    assert np.abs(api.logits(BATCHES[0]) - got).max() <= 5e-6 * np.abs(got).max()
