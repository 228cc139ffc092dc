"""GPT-2: the tables of its tensors, forward, and backward.

A layer, with residual stream r (B, T, C):

    r_mid = r     + attn_proj(attention(attn_qkv(ln_1(r))))
    r'    = r_mid + mlp_proj(GELU(mlp_fc(ln_2(r_mid))))

and after the last one  loss = cross-entropy(ln_f(r) · wteᵀ): the head is the token embedding.
Source: Radford et al. 2019; the numbers are those of llm.c and nanoGPT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..backend import Ops
from ..errors import LlmpyError
from .arena import Arena, Tensor
from .config import ModelConfig

# Activations that backward recomputes, see `activations_table`. 1 costs 0.5 % of a step's time (dev/LOG.md) and saves a
# quarter of the activations, as in llm.c.
RECOMPUTE = 1


def params_table(c: ModelConfig) -> list[Tensor]:
    """Return every parameter. Matrices, which have weight decay, come first (`matrix_elements`)."""
    L, C, Vp = c.layers, c.channels, c.padded_vocab_size
    std, std_resid = 0.02, 0.02 / math.sqrt(2 * L)

    def matrix(name: str, shape: tuple[int, ...], std: float = std) -> Tensor:
        return Tensor(name, shape, "normal", std, decay=True)

    return [
        matrix("wte", (Vp, C)),
        matrix("wpe", (c.context, C)),
        matrix("attn_qkv_w", (L, 3 * C, C)),
        matrix("attn_proj_w", (L, C, C), std_resid),
        matrix("mlp_fc_w", (L, 4 * C, C)),
        matrix("mlp_proj_w", (L, C, 4 * C), std_resid),
        Tensor("ln_1_w", (L, C), "ones"),
        Tensor("ln_1_b", (L, C), "zeros"),
        Tensor("attn_qkv_b", (L, 3 * C), "zeros"),
        Tensor("attn_proj_b", (L, C), "zeros"),
        Tensor("ln_2_w", (L, C), "ones"),
        Tensor("ln_2_b", (L, C), "zeros"),
        Tensor("mlp_fc_b", (L, 4 * C), "zeros"),
        Tensor("mlp_proj_b", (L, C), "zeros"),
        Tensor("ln_f_w", (C,), "ones"),
        Tensor("ln_f_b", (C,), "zeros"),
    ]


# The steps of a batch, for `Tensor.steps`: a layer forward, the end, a layer backward.
QKV, ATTENTION, PROJECTION, FC, MLP_PROJECTION, FINAL_NORM, HEAD, MLP_BACKWARD, ATTENTION_BACKWARD = range(9)


def activations_table(
    c: ModelConfig, B: int, T: int, training: bool, recompute: int = 0, mixed: bool = False
) -> list[Tensor]:
    """Return every activation, and for training those of backward.

    `recompute` 0 keeps all activations for backward; 1 recomputes the GELU's output, a quarter of them; 2 also the
    LayerNorms' outputs.
    """
    C, NH, BT = c.channels, c.heads, B * T
    L = c.layers if training else 1

    def kept(name: str, *shape: int, steps: tuple[int, ...], unless: int = 3) -> Tensor:
        """Return one tensor per layer for backward if `recompute` < `unless`; else one shared by all layers."""
        if training and recompute < unless:
            return Tensor(name, (L, *shape))
        return Tensor(name, (1, *shape), steps=frozenset(steps))

    def shared(name: str, *shape: int, steps: Iterable[int], wide: bool = False) -> Tensor:
        return Tensor(name, shape, wide=wide, steps=frozenset(steps))

    table = [
        Tensor("resid", (L, BT, C), wide=True),  # input of each layer; the first is the embedding
        Tensor("resid_mid", (L, BT, C), wide=True),
        shared("resid_out", BT, C, steps=(FINAL_NORM, HEAD), wide=True),  # output of the last layer
        kept("ln_1", BT, C, steps=(QKV, ATTENTION_BACKWARD), unless=2),
        Tensor("ln_1_mean", (L, BT), wide=True),
        Tensor("ln_1_rstd", (L, BT), wide=True),
        kept("qkv", BT, 3 * C, steps=(QKV, ATTENTION)),
        kept("attn_out", BT, C, steps=(ATTENTION, PROJECTION)),
        Tensor("attn_stats", (L, B, NH, T), wide=True),
        kept("ln_2", BT, C, steps=(FC, MLP_BACKWARD), unless=2),
        Tensor("ln_2_mean", (L, BT), wide=True),
        Tensor("ln_2_rstd", (L, BT), wide=True),
        kept("mlp_fc", BT, 4 * C, steps=(FC,)),
        kept("mlp_gelu", BT, 4 * C, steps=(FC, MLP_PROJECTION, MLP_BACKWARD), unless=1),
        shared("branch", BT, C, steps=range(FINAL_NORM + 1)),  # the next addend of the residual stream
        shared("ln_f", BT, C, steps=(FINAL_NORM, HEAD)),
        Tensor("ln_f_mean", (BT,), wide=True),
        Tensor("ln_f_rstd", (BT,), wide=True),
        Tensor("losses", (BT,), wide=True),
    ]
    if training:
        backward = HEAD, MLP_BACKWARD, ATTENTION_BACKWARD
        if mixed:
            table.append(shared("dresid_stored", BT, C, steps=backward))  # dresid rounded, for products
        table += [
            shared("dresid", BT, C, steps=backward, wide=True),
            shared("dln", BT, C, steps=backward),
            shared("dattn_out", BT, C, steps=(ATTENTION_BACKWARD,)),
            shared("dqkv", BT, 3 * C, steps=(ATTENTION_BACKWARD,)),
            shared("dmlp_fc", BT, 4 * C, steps=(MLP_BACKWARD,)),
        ]
    return table


class ForwardOps(NamedTuple):
    """The operations of `GPT2.layers` that differ between training, prefill and decoding."""

    weights: Any  # the matrices as `linear` reads them, named as in `params_table`
    linear: Callable[..., None]  # Ops.linear_forward or Ops.packed_linear_forward
    attention: Callable[[int, Any, Any, Any], None]  # layer, and Ops.attention_forward's arguments


class GPT2:
    """A model: its parameters, loss and gradients, with arenas allocated once per (B, T).

    Without `trainable` it keeps its matrices only in the backend's type: a third of the memory for bfloat16.
    """

    def __init__(self, config: ModelConfig, ops: Ops, recompute: int = RECOMPUTE, trainable: bool = True) -> None:
        """Allocate the parameters. `recompute`: see `activations_table`."""
        self.config = config
        self.ops = ops
        self.recompute = recompute
        self.trainable = trainable
        table = params_table(config)
        matrices = [t for t in table if t.decay]
        self.matrix_elements = sum(t.size for t in matrices)
        # `weights`, the operands of products: the matrices, or a copy in the backend's smaller type.
        self.mixed = ops.dtype != ops.wide
        if trainable:
            self.params = Arena(table, ops.empty, ops.wide)
            self.weights = Arena(matrices, ops.empty, ops.dtype) if self.mixed else self.params
        else:
            self.params = Arena([replace(t, wide=not t.decay) for t in table], ops.empty, ops.dtype, ops.wide)
            self.weights = self.params
        self.grads: Arena | None = None
        # Hooks for ranks to exchange data: before forward reads the weights of layer l, and after backward has written
        # its gradients; −1 stands for the embeddings.
        self.before_layer: Callable[[int], None] | None = None
        self.after_layer: Callable[[int], None] | None = None
        self._acts: dict[tuple[int, int, bool], Arena] = {}

    def store_weights(self) -> None:
        """Update `weights` from `params`. Call it after writing to `params`; the optimizer does so itself."""
        if self.weights is not self.params:
            self.ops.narrow(self.weights.buffer, self.params.buffer[: self.matrix_elements])

    def reserve(self, B: int, T: int, training: bool) -> Arena:
        """Allocate the arenas for batches (B, T) and return the activations. Raises LlmpyError for invalid B or T."""
        if not 1 <= T <= self.config.context:
            what = f"a sequence of {T} tokens does not fit the model's context of {self.config.context}"
            raise LlmpyError("model.context-exceeded", what, f"Use -T between 1 and {self.config.context}")
        if B < 1:
            raise LlmpyError("model.batch-size", f"batch size {B} is below 1", "Use -B 1 or more")
        if training and not self.trainable:
            raise ValueError("cannot train a model made without `trainable`: it has no float32 matrices")
        ops = self.ops
        if training and self.grads is None:
            self.grads = Arena(self.params.table, ops.empty, ops.wide)
        # Evaluation reuses a training arena; its own keeps a single layer.
        if (B, T, True) in self._acts:
            training = True
        if (B, T, training) not in self._acts:
            table = activations_table(self.config, B, T, training, self.recompute, self.mixed)
            self._acts[B, T, training] = Arena(table, ops.empty, ops.dtype, ops.wide)
        return self._acts[B, T, training]

    def release(self) -> None:
        """Free the arenas of `reserve`, except the gradients."""
        self._acts.clear()

    def logits(self, tokens: np.ndarray, position: int = -1) -> np.ndarray:
        """Return logits (B, V) of one position of tokens (B, T), a new host array."""
        B, T = tokens.shape
        a = self.forward(tokens, self.reserve(B, T, training=False))
        return self.head(self.ops.to_host(a.ln_f).reshape(B, T, -1)[:, position])

    def head(self, rows: np.ndarray) -> np.ndarray:
        """Return logits (n, V) of the final LayerNorm's rows (n, C), a new host array."""
        out = self.ops.empty((len(rows), self.config.padded_vocab_size), self.ops.dtype)
        self.ops.linear_forward(out, np.ascontiguousarray(rows), self.weights.wte, None)
        return self.ops.to_host(out)[:, : self.config.vocab_size].astype(self.ops.wide)

    def loss(self, tokens: np.ndarray, targets: np.ndarray) -> float:
        """Return the mean cross-entropy in nats of targets (B, T) given tokens (B, T); no gradients."""
        B, T = tokens.shape
        a = self.forward(tokens, self.reserve(B, T, training=False))
        self.ops.classifier(a.losses, None, None, a.ln_f, self.weights.wte, targets, self.config.vocab_size, 0.0, False)
        return self._mean(a.losses, targets)

    def loss_and_grads(
        self, tokens: np.ndarray, targets: np.ndarray, accumulate: bool = False, micro_steps: float = 1
    ) -> float:
        """Return the mean loss of a micro-batch; gradients of (loss / micro_steps) go into `self.grads`.

        `accumulate` False overwrites the gradients (the first micro-step), True adds to them.
        """
        B, T = tokens.shape
        a = self.forward(tokens, self.reserve(B, T, training=True))
        counted = max(1, int(np.count_nonzero(targets >= 0)))
        self.backward(a, tokens, targets, 1.0 / (counted * micro_steps), accumulate)
        return self._mean(a.losses, targets)

    def _mean(self, losses: Any, targets: np.ndarray) -> float:
        counted = max(1, int(np.count_nonzero(targets >= 0)))
        return float(self.ops.to_host(losses).real.sum(dtype=np.float64) / counted)

    def forward(
        self, tokens: np.ndarray, a: Arena, attention: Callable[[int, Any, Any, Any], None] | None = None
    ) -> Arena:
        """Run the model on tokens (B, T); fill and return the activations, up to `ln_f`.

        `attention`: see `ForwardOps`, by default Ops.attention_forward.
        """
        w = self.weights
        if self.before_layer is not None:
            self.before_layer(-1)
        self.ops.embedding_forward(a.resid[0], tokens, w.wte, w.wpe)
        return self.layers(a, ForwardOps(w, self.ops.linear_forward, attention or self._attention))

    def _attention(self, l: int, out: Any, stats: Any, qkv: Any) -> None:
        self.ops.attention_forward(out, stats, qkv)

    def layers(self, a: Arena, by: ForwardOps) -> Arena:
        """Run every layer on the embedded tokens in `resid[0]`; fill and return the activations, up to `ln_f`."""
        ops, p, w, linear, L = self.ops, self.params, by.weights, by.linear, self.config.layers
        for l in range(L):
            if self.before_layer is not None:
                self.before_layer(l)
            resid, resid_mid, ln_1, ln_2 = at(a.resid, l), at(a.resid_mid, l), at(a.ln_1, l), at(a.ln_2, l)
            stats = at(a.ln_1_mean, l), at(a.ln_1_rstd, l)
            if l == 0:
                ops.layernorm_forward(ln_1, *stats, resid, p.ln_1_w[0], p.ln_1_b[0])
            else:
                before = at(a.resid_mid, l - 1), a.branch
                ops.residual_layernorm_forward(resid, ln_1, *stats, *before, p.ln_1_w[l], p.ln_1_b[l])
            qkv, attn_out = at(a.qkv, l), at(a.attn_out, l)
            linear(qkv, ln_1, w.attn_qkv_w[l], p.attn_qkv_b[l])
            by.attention(l, attn_out, at(a.attn_stats, l), qkv)
            linear(a.branch, attn_out, w.attn_proj_w[l], p.attn_proj_b[l])
            stats = at(a.ln_2_mean, l), at(a.ln_2_rstd, l)
            ops.residual_layernorm_forward(resid_mid, ln_2, *stats, resid, a.branch, p.ln_2_w[l], p.ln_2_b[l])
            mlp_gelu = at(a.mlp_gelu, l)
            linear(mlp_gelu, ln_2, w.mlp_fc_w[l], p.mlp_fc_b[l], pre=at(a.mlp_fc, l))
            linear(a.branch, mlp_gelu, w.mlp_proj_w[l], p.mlp_proj_b[l])
        stats = a.ln_f_mean, a.ln_f_rstd
        before = at(a.resid_mid, L - 1), a.branch
        ops.residual_layernorm_forward(a.resid_out, a.ln_f, *stats, *before, p.ln_f_w, p.ln_f_b)
        return a

    def backward(self, a: Arena, tokens: np.ndarray, targets: np.ndarray, scale: float, acc: bool) -> None:
        """Compute losses and the gradients of scale·Σloss into `self.grads`, from the head to the embeddings."""
        ops, p, w, g, c = self.ops, self.params, self.weights, self.grads, self.config
        assert g is not None
        dresid = a.dresid_stored if self.mixed else a.dresid  # operand of products
        ops.classifier(a.losses, a.dln, g.wte, a.ln_f, w.wte, targets, c.vocab_size, scale, acc)
        ops.zero(a.dresid)
        final = a.resid_out, a.ln_f_mean, a.ln_f_rstd
        ops.layernorm_backward(a.dresid, g.ln_f_w, g.ln_f_b, a.dln, *final, p.ln_f_w, acc)
        for l in reversed(range(c.layers)):
            mlp_gelu, ln_2, ln_1 = at(a.mlp_gelu, l), at(a.ln_2, l), at(a.ln_1, l)
            if self.recompute >= 1:
                ops.activation_forward(mlp_gelu, a.mlp_fc[l])
            ops.narrow(dresid, a.dresid)
            d = g.mlp_proj_w[l], g.mlp_proj_b[l]
            ops.linear_backward(a.dmlp_fc, *d, dresid, mlp_gelu, w.mlp_proj_w[l], a.mlp_fc[l], acc)
            stats = a.ln_2_mean[l], a.ln_2_rstd[l]
            if self.recompute >= 2:
                ops.layernorm_forward(ln_2, *stats, a.resid_mid[l], p.ln_2_w[l], p.ln_2_b[l])
            d = g.mlp_fc_w[l], g.mlp_fc_b[l]
            ops.linear_backward(a.dln, *d, a.dmlp_fc, ln_2, w.mlp_fc_w[l], None, acc)
            d = g.ln_2_w[l], g.ln_2_b[l]
            ops.layernorm_backward(a.dresid, *d, a.dln, a.resid_mid[l], *stats, p.ln_2_w[l], acc)
            ops.narrow(dresid, a.dresid)
            d = g.attn_proj_w[l], g.attn_proj_b[l]
            ops.linear_backward(a.dattn_out, *d, dresid, a.attn_out[l], w.attn_proj_w[l], None, acc)
            ops.attention_backward(a.dqkv, a.dattn_out, a.qkv[l], a.attn_out[l], a.attn_stats[l])
            stats = a.ln_1_mean[l], a.ln_1_rstd[l]
            if self.recompute >= 2:
                ops.layernorm_forward(ln_1, *stats, a.resid[l], p.ln_1_w[l], p.ln_1_b[l])
            d = g.attn_qkv_w[l], g.attn_qkv_b[l]
            ops.linear_backward(a.dln, *d, a.dqkv, ln_1, w.attn_qkv_w[l], None, acc)
            d = g.ln_1_w[l], g.ln_1_b[l]
            ops.layernorm_backward(a.dresid, *d, a.dln, a.resid[l], *stats, p.ln_1_w[l], acc)
            if self.after_layer is not None:
                self.after_layer(l)
        ops.embedding_backward(g.wte, g.wpe, a.dresid, tokens, acc)
        if self.after_layer is not None:
            self.after_layer(-1)


def at(tensor: Any, l: int) -> Any:
    """Return layer l of an activation, or its last layer if it is shared."""
    return tensor[min(l, tensor.shape[0] - 1)]
