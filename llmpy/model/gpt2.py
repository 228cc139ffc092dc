"""GPT-2: the tables of its tensors, forward, and backward.

A layer, with residual stream r (B, T, C):

    r_mid = r     + attn_proj(attention(attn_qkv(ln_1(r))))
    r'    = r_mid + mlp_proj(GELU(mlp_fc(ln_2(r_mid))))

and after the last one  loss = cross-entropy(ln_f(r) · wteᵀ): the head is the token embedding.
Source: Radford et al. 2019; the numbers are those of llm.c and nanoGPT.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from .arena import Arena, Tensor
from .config import ModelConfig
from .language_model import ForwardOps, LanguageModel, at, keeping, matrix, shared, vector
from .lora import Module


def params_table(c: ModelConfig) -> list[Tensor]:
    """Return every parameter. Matrices, which have weight decay, come first (`matrix_elements`)."""
    L, C, Vp = c.layers, c.channels, c.padded_vocab_size
    std_resid = 0.02 / math.sqrt(2 * L)
    return [
        matrix("wte", Vp, C),
        matrix("wpe", c.context, C),
        matrix("attn_qkv_w", L, 3 * C, C),
        matrix("attn_proj_w", L, C, C, std=std_resid),
        matrix("mlp_fc_w", L, 4 * C, C),
        matrix("mlp_proj_w", L, C, 4 * C, std=std_resid),
        vector("ln_1_w", L, C, init="ones"),
        vector("ln_1_b", L, C),
        vector("attn_qkv_b", L, 3 * C),
        vector("attn_proj_b", L, C),
        vector("ln_2_w", L, C, init="ones"),
        vector("ln_2_b", L, C),
        vector("mlp_fc_b", L, 4 * C),
        vector("mlp_proj_b", L, C),
        vector("ln_f_w", C, init="ones"),
        vector("ln_f_b", C),
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
    kept = keeping(L if training else 0, recompute)
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
        shared("final", BT, C, steps=(FINAL_NORM, HEAD)),
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


class GPT2(LanguageModel):
    """GPT-2; see `LanguageModel`."""

    params_table = staticmethod(params_table)
    activations_table = staticmethod(activations_table)

    @staticmethod
    def modules(c: ModelConfig) -> list[Module]:
        """See `LanguageModel.modules`."""
        C = c.channels
        return [
            Module("attn.c_attn", "attn_qkv", 0, 3 * C, C),
            Module("attn.c_proj", "attn_proj", 0, C, C),
            Module("mlp.c_fc", "mlp_fc", 0, 4 * C, C),
            Module("mlp.c_proj", "mlp_proj", 0, C, 4 * C),
        ]

    def embed(self, out: Any, tokens: np.ndarray, positions: np.ndarray | None) -> None:
        """out (B, T, C) := wte[token] + wpe[position]."""
        self.ops.embedding_forward(out, tokens, self.embeddings.wte, self.embeddings.wpe, positions)

    def layers(self, a: Arena, by: ForwardOps) -> Arena:
        """See `LanguageModel.layers`."""
        ops, p, linear, L = self.ops, self.params, partial(self.linear, by), self.config.layers
        for l in range(L):
            if self.before_layer is not None:
                self.before_layer(l)
            resid, ln_1 = at(a.resid, l), at(a.ln_1, l)
            stats = at(a.ln_1_mean, l), at(a.ln_1_rstd, l)
            if l == 0:
                ops.layernorm_forward(ln_1, *stats, resid, p.ln_1_w[0], p.ln_1_b[0])
            else:
                before = at(a.resid_mid, l - 1), a.branch
                ops.residual_layernorm_forward(resid, ln_1, *stats, *before, p.ln_1_w[l], p.ln_1_b[l])
            qkv, attn_out = at(a.qkv, l), at(a.attn_out, l)
            linear("attn_qkv", l, qkv, ln_1)
            by.attention(l, attn_out, at(a.attn_stats, l), qkv)
            if by.select is not None and l == L - 1:
                a = by.select(a)
                resid, attn_out = at(a.resid, l), at(a.attn_out, l)
            resid_mid, ln_2 = at(a.resid_mid, l), at(a.ln_2, l)
            linear("attn_proj", l, a.branch, attn_out)
            stats = at(a.ln_2_mean, l), at(a.ln_2_rstd, l)
            ops.residual_layernorm_forward(resid_mid, ln_2, *stats, resid, a.branch, p.ln_2_w[l], p.ln_2_b[l])
            mlp_gelu = at(a.mlp_gelu, l)
            linear("mlp_fc", l, mlp_gelu, ln_2, pre=at(a.mlp_fc, l))
            linear("mlp_proj", l, a.branch, mlp_gelu)
        stats = a.ln_f_mean, a.ln_f_rstd
        before = at(a.resid_mid, L - 1), a.branch
        ops.residual_layernorm_forward(a.resid_out, a.final, *stats, *before, p.ln_f_w, p.ln_f_b)
        return a

    def backward(
        self, a: Arena, tokens: np.ndarray, targets: np.ndarray, scale: float, acc: bool,
        positions: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """See `LanguageModel.backward`."""
        ops, p, c, linear = self.ops, self.params, self.config, self.linear_backward
        d = self.gradient
        dresid = a.dresid_stored if self.mixed else a.dresid  # operand of products
        head = self.weights.wte, targets, c.vocab_size, scale, acc
        ops.classifier(a.losses, a.dln, d("wte"), a.final, *head)
        ops.zero(a.dresid)
        final = a.resid_out, a.ln_f_mean, a.ln_f_rstd
        ops.layernorm_backward(a.dresid, d("ln_f_w"), d("ln_f_b"), a.dln, *final, p.ln_f_w, acc)
        for l in reversed(range(c.layers)):
            mlp_gelu, ln_2, ln_1 = at(a.mlp_gelu, l), at(a.ln_2, l), at(a.ln_1, l)
            if self.recompute >= 1:
                ops.activation_forward(mlp_gelu, a.mlp_fc[l])
            ops.narrow(dresid, a.dresid)
            linear("mlp_proj", l, a.dmlp_fc, dresid, mlp_gelu, acc, pre=a.mlp_fc[l])
            stats = a.ln_2_mean[l], a.ln_2_rstd[l]
            if self.recompute >= 2:
                ops.layernorm_forward(ln_2, *stats, a.resid_mid[l], p.ln_2_w[l], p.ln_2_b[l])
            linear("mlp_fc", l, a.dln, a.dmlp_fc, ln_2, acc)
            of = d("ln_2_w", l), d("ln_2_b", l)
            ops.layernorm_backward(a.dresid, *of, a.dln, a.resid_mid[l], *stats, p.ln_2_w[l], acc)
            ops.narrow(dresid, a.dresid)
            linear("attn_proj", l, a.dattn_out, dresid, a.attn_out[l], acc)
            ops.attention_backward(a.dqkv, a.dattn_out, a.qkv[l], a.attn_out[l], a.attn_stats[l], positions)
            stats = a.ln_1_mean[l], a.ln_1_rstd[l]
            if self.recompute >= 2:
                ops.layernorm_forward(ln_1, *stats, a.resid[l], p.ln_1_w[l], p.ln_1_b[l])
            linear("attn_qkv", l, a.dln, a.dqkv, ln_1, acc)
            of = d("ln_1_w", l), d("ln_1_b", l)
            ops.layernorm_backward(a.dresid, *of, a.dln, a.resid[l], *stats, p.ln_1_w[l], acc)
            if self.after_layer is not None:
                self.after_layer(l)
        if (dwte := d("wte")) is not None:
            ops.embedding_backward(dwte, d("wpe"), a.dresid, tokens, acc, positions)
        if self.after_layer is not None:
            self.after_layer(-1)
