"""Llama, Qwen2 and Qwen3: the tables of their tensors, forward, and backward.

A layer, with residual stream r (B, T, C):

    q, k, v = attn_qkv(RMSNorm(r))           with a bias in Qwen2; q, k := RMSNorm of each head in Qwen3
    r_mid   = r     + attn_proj(attention(RoPE(q), RoPE(k), v))
    r'      = r_mid + mlp_down(SwiGLU(mlp_gate_up(RMSNorm(r_mid))))

and after the last one  loss = cross-entropy(RMSNorm(r) · headᵀ): the head is the token embedding if `tied`.
Queries, keys and values are one matrix here, gate and up another. Source: Touvron et al. 2023, Grattafiori et al.
2024, Yang et al. 2024 and 2025; the numbers are those of Hugging Face's transformers.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from .arena import Arena, Tensor
from .config import LlamaConfig
from .language_model import ForwardOps, LanguageModel, at, keeping, matrix, shared, vector
from .lora import Module
from .rope import tables


def params_table(c: LlamaConfig) -> list[Tensor]:
    """Return every parameter. Matrices, which have weight decay, come first (`matrix_elements`)."""
    L, C, Vp, HS = c.layers, c.channels, c.padded_vocab_size, c.head_size
    std_resid = 0.02 / math.sqrt(2 * L)
    heads = [vector(f"{x}_norm_w", L, HS, init="ones") for x in "qk"]
    return [
        matrix("wte", Vp, C),
        *([] if c.tied else [matrix("head", Vp, C)]),
        matrix("attn_qkv_w", L, c.qkv_size, C),
        matrix("attn_proj_w", L, C, c.heads * HS, std=std_resid),
        matrix("mlp_gate_up_w", L, 2 * c.ffn, C),
        matrix("mlp_down_w", L, C, c.ffn, std=std_resid),
        vector("norm_1_w", L, C, init="ones"),
        *([vector("attn_qkv_b", L, c.qkv_size)] if c.qkv_bias else []),
        *(heads if c.qk_norm else []),
        vector("norm_2_w", L, C, init="ones"),
        vector("norm_f_w", C, init="ones"),
    ]


# The steps of a batch, for `Tensor.steps`: a layer forward, the end, a layer backward.
QKV, ATTENTION, PROJECTION, GATE_UP, DOWN, FINAL_NORM, HEAD, MLP_BACKWARD, ATTENTION_BACKWARD = range(9)


def activations_table(
    c: LlamaConfig, B: int, T: int, training: bool, recompute: int = 0, mixed: bool = False
) -> list[Tensor]:
    """Return every activation, and for training those of backward; see `LanguageModel.activations_table`."""
    C, NH, F, W, BT = c.channels, c.heads, c.ffn, c.qkv_size, B * T
    L = c.layers if training else 1
    kept = keeping(L if training else 0, recompute)
    table = [
        Tensor("resid", (L, BT, C), wide=True),  # input of each layer; the first is the embedding
        Tensor("resid_mid", (L, BT, C), wide=True),
        shared("resid_out", BT, C, steps=(FINAL_NORM, HEAD), wide=True),  # output of the last layer
        kept("norm_1", BT, C, steps=(QKV, ATTENTION_BACKWARD), unless=2),
        Tensor("norm_1_rstd", (L, BT), wide=True),
        kept("qkv", BT, W, steps=(QKV, ATTENTION)),  # rotated in place, unless the heads are normalised
        *([kept("qkv_rotated", BT, W, steps=(QKV, ATTENTION))] if c.qk_norm else []),
        *([Tensor("qk_rstd", (L, BT, NH + c.kv_heads), wide=True)] if c.qk_norm else []),
        kept("attn_out", BT, NH * c.head_size, steps=(ATTENTION, PROJECTION)),
        Tensor("attn_stats", (L, B, NH, T), wide=True),
        kept("norm_2", BT, C, steps=(GATE_UP, MLP_BACKWARD), unless=2),
        Tensor("norm_2_rstd", (L, BT), wide=True),
        kept("mlp_gate_up", BT, 2 * F, steps=(GATE_UP,)),
        kept("mlp_swiglu", BT, F, steps=(GATE_UP, DOWN, MLP_BACKWARD), unless=1),
        shared("branch", BT, C, steps=range(FINAL_NORM + 1)),  # the next addend of the residual stream
        shared("final", BT, C, steps=(FINAL_NORM, HEAD)),
        Tensor("norm_f_rstd", (BT,), wide=True),
        Tensor("losses", (BT,), wide=True),
    ]
    if training:
        backward = HEAD, MLP_BACKWARD, ATTENTION_BACKWARD
        if mixed:
            table.append(shared("dresid_stored", BT, C, steps=backward))  # dresid rounded, for products
        table += [
            shared("dresid", BT, C, steps=backward, wide=True),
            shared("dnorm", BT, C, steps=backward),
            shared("dattn_out", BT, NH * c.head_size, steps=(ATTENTION_BACKWARD,)),
            shared("dqkv", BT, W, steps=(ATTENTION_BACKWARD,)),
            shared("dmlp_gate_up", BT, 2 * F, steps=(MLP_BACKWARD,)),
        ]
    return table


class Llama(LanguageModel):
    """Llama, Qwen2 or Qwen3; see `LanguageModel`."""

    config: LlamaConfig
    params_table = staticmethod(params_table)
    activations_table = staticmethod(activations_table)

    @staticmethod
    def modules(c: LlamaConfig) -> list[Module]:
        """See `LanguageModel.modules`."""
        C, q, kv = c.channels, c.heads * c.head_size, c.kv_heads * c.head_size
        return [
            Module("self_attn.q_proj", "attn_qkv", 0, q, C),
            Module("self_attn.k_proj", "attn_qkv", q, kv, C),
            Module("self_attn.v_proj", "attn_qkv", q + kv, kv, C),
            Module("self_attn.o_proj", "attn_proj", 0, C, q),
            Module("mlp.gate_proj", "mlp_gate_up", 0, c.ffn, C),
            Module("mlp.up_proj", "mlp_gate_up", c.ffn, c.ffn, C),
            Module("mlp.down_proj", "mlp_down", 0, C, c.ffn),
        ]

    @staticmethod
    def head_of(c: LlamaConfig) -> str:
        """See `LanguageModel.head_of`."""
        return "wte" if c.tied else "head"

    def embed(self, out: Any, tokens: np.ndarray, positions: np.ndarray | None) -> None:
        """out (B, T, C) := wte[token]."""
        self.ops.embedding_forward(out, tokens, self.embeddings.wte, None)

    def _rotate(self, x: Any, positions: Any, inverse: bool = False) -> None:
        """Rotate the heads of queries and keys in x (rows, W)."""
        c = self.config
        cos, sin = self._rotations
        self.ops.rope(x, cos, sin, positions, c.heads + c.kv_heads, inverse)

    _rotations: tuple[Any, Any] = (np.empty((0, 0)), np.empty((0, 0)))  # cos and sin (length, HS/2)

    def extend(self, length: int) -> None:
        """Compute the angles of positions below `length`."""
        if len(self._rotations[0]) < length:
            self._rotations = tables(self.config, length)

    def layers(self, a: Arena, by: ForwardOps) -> Arena:
        """See `LanguageModel.layers`."""
        ops, p, c, linear = self.ops, self.params, self.config, partial(self.linear, by)
        for l in range(c.layers):
            if self.before_layer is not None:
                self.before_layer(l)
            resid, norm_1 = at(a.resid, l), at(a.norm_1, l)
            if l == 0:
                ops.rmsnorm_forward(norm_1, at(a.norm_1_rstd, l), resid, p.norm_1_w[0], c.norm_eps)
            else:
                before = at(a.resid_mid, l - 1), a.branch
                ops.residual_rmsnorm_forward(resid, norm_1, at(a.norm_1_rstd, l), *before, p.norm_1_w[l], c.norm_eps)
            qkv, attn_out = at(a.qkv, l), at(a.attn_out, l)
            linear("attn_qkv", l, qkv, norm_1)
            if c.qk_norm:
                rotated = at(a.qkv_rotated, l)
                by_heads = p.q_norm_w[l], p.k_norm_w[l]
                ops.head_rmsnorm_forward(rotated, at(a.qk_rstd, l), qkv, *by_heads, c.norm_eps)
                qkv = rotated
            self._rotate(qkv, by.positions)
            by.attention(l, attn_out, at(a.attn_stats, l), qkv)
            if by.select is not None and l == c.layers - 1:
                a = by.select(a)
                resid, attn_out = at(a.resid, l), at(a.attn_out, l)
            resid_mid, norm_2 = at(a.resid_mid, l), at(a.norm_2, l)
            linear("attn_proj", l, a.branch, attn_out)
            ops.residual_rmsnorm_forward(
                resid_mid, norm_2, at(a.norm_2_rstd, l), resid, a.branch, p.norm_2_w[l], c.norm_eps
            )
            mlp_swiglu = at(a.mlp_swiglu, l)
            linear("mlp_gate_up", l, mlp_swiglu, norm_2, pre=at(a.mlp_gate_up, l))
            linear("mlp_down", l, a.branch, mlp_swiglu)
        before = at(a.resid_mid, c.layers - 1), a.branch
        ops.residual_rmsnorm_forward(a.resid_out, a.final, a.norm_f_rstd, *before, p.norm_f_w, c.norm_eps)
        return a

    def backward(
        self, a: Arena, tokens: np.ndarray, targets: np.ndarray, scale: float, acc: bool,
        positions: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """See `LanguageModel.backward`."""
        ops, p, c, d, linear = self.ops, self.params, self.config, self.gradient, self.linear_backward
        where = self.counted(tokens.shape, positions)
        dresid = a.dresid_stored if self.mixed else a.dresid  # operand of products
        head = getattr(self.weights, self.head), targets, c.vocab_size, scale, acc
        ops.classifier(a.losses, a.dnorm, d(self.head), a.final, *head)
        ops.zero(a.dresid)
        ops.rmsnorm_backward(a.dresid, d("norm_f_w"), a.dnorm, a.resid_out, a.norm_f_rstd, p.norm_f_w, acc)
        for l in reversed(range(c.layers)):
            mlp_swiglu, norm_2, norm_1 = at(a.mlp_swiglu, l), at(a.norm_2, l), at(a.norm_1, l)
            if self.recompute >= 1:
                ops.activation_forward(mlp_swiglu, a.mlp_gate_up[l])
            ops.narrow(dresid, a.dresid)
            linear("mlp_down", l, a.dmlp_gate_up, dresid, mlp_swiglu, acc, pre=a.mlp_gate_up[l])
            if self.recompute >= 2:
                ops.rmsnorm_forward(norm_2, a.norm_2_rstd[l], a.resid_mid[l], p.norm_2_w[l], c.norm_eps)
            linear("mlp_gate_up", l, a.dnorm, a.dmlp_gate_up, norm_2, acc)
            of = a.resid_mid[l], a.norm_2_rstd[l], p.norm_2_w[l]
            ops.rmsnorm_backward(a.dresid, d("norm_2_w", l), a.dnorm, *of, acc)
            ops.narrow(dresid, a.dresid)
            linear("attn_proj", l, a.dattn_out, dresid, a.attn_out[l], acc)
            rotated = a.qkv_rotated[l] if c.qk_norm else a.qkv[l]
            ops.attention_backward(a.dqkv, a.dattn_out, rotated, a.attn_out[l], a.attn_stats[l], positions)
            self._rotate(a.dqkv, where, inverse=True)
            if c.qk_norm:
                heads = d("q_norm_w", l), d("k_norm_w", l), a.dqkv, a.qkv[l], a.qk_rstd[l]
                ops.head_rmsnorm_backward(a.dqkv, *heads, p.q_norm_w[l], p.k_norm_w[l], acc)
            if self.recompute >= 2:
                ops.rmsnorm_forward(norm_1, a.norm_1_rstd[l], a.resid[l], p.norm_1_w[l], c.norm_eps)
            linear("attn_qkv", l, a.dnorm, a.dqkv, norm_1, acc)
            of = a.resid[l], a.norm_1_rstd[l], p.norm_1_w[l]
            ops.rmsnorm_backward(a.dresid, d("norm_1_w", l), a.dnorm, *of, acc)
            if self.after_layer is not None:
                self.after_layer(l)
        if (dwte := d("wte")) is not None:
            if not c.tied and not acc:
                ops.zero(dwte)  # the head, which otherwise writes it first, has its own
            ops.embedding_backward(dwte, None, a.dresid, tokens, acc)
        if self.after_layer is not None:
            self.after_layer(-1)
