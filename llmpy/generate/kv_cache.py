"""Keys and values kept: the logits of a next token without computing the whole text again.

prefill    a text at once through the training kernels; its keys and values go into the cache
decode     one token more of each of B texts: every weight is read once for all of them

A position never sees a later one, so its keys and values stay as they are. Both ways compute a token's logits
by the same sums in the same order: they are equal to the bit to those of `GPT2.logits` on the whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from ..backend import Ops
from ..model.arena import Arena, Tensor
from ..model.config import ModelConfig
from ..model.gpt2 import ALWAYS, GPT2, activations_table, at


def packed_table(c: ModelConfig, ops: Ops) -> list[Tensor]:
    """The matrices of every product, packed, named as in `gpt2.params_table`; the head is the token embedding."""
    L, C, Vp = c.layers, c.channels, c.padded_vocab_size
    return [
        Tensor("attn_qkv_w", (L, ops.packed_size(3 * C, C))),
        Tensor("attn_proj_w", (L, ops.packed_size(C, C))),
        Tensor("mlp_fc_w", (L, ops.packed_size(4 * C, C))),
        Tensor("mlp_proj_w", (L, ops.packed_size(C, 4 * C))),
        Tensor("wte", (ops.packed_size(Vp, C),)),
    ]


def cache_table(c: ModelConfig, B: int, S: int) -> list[Tensor]:
    """Keys and values of B texts of up to S positions, by layer."""
    return [Tensor("keys_values", (c.layers, B, c.heads, 2, S, c.head_size))]


def prefill_table(c: ModelConfig, T: int) -> list[Tensor]:
    """The activations of a text of T tokens, with the keys and values of every layer."""
    every = (c.layers, T, 3 * c.channels)
    return [
        replace(t, shape=every, steps=ALWAYS) if t.name == "qkv" else t
        for t in activations_table(c, 1, T, training=False)
    ]


def rows_table(c: ModelConfig, B: int) -> list[Tensor]:
    """What a token of each of B texts is computed in."""
    return [*activations_table(c, B, 1, training=False), Tensor("logits", (B, c.padded_vocab_size))]


def lender(table: list[Tensor], ops: Ops) -> Callable[[int, Any], Any]:
    """Memory for a table, made now and lent to any smaller one of its kind: how an `Arena` gets its own."""
    whole = Arena(table, ops.empty, ops.dtype, ops.wide)
    kinds = [ops.dtype, ops.wide] if len(whole.buffers) > 1 else [ops.dtype]
    rooms = dict(zip(kinds, whole.buffers, strict=True))
    return lambda count, dtype: rooms[dtype][:count]


class _Rows:
    """The tokens of B texts and what comes of them; `again`, once captured, computes the logits of what is embedded."""

    def __init__(self, acts: Arena, B: int) -> None:
        self.acts = acts
        self.tokens = np.empty((B, 1), np.int32)
        self.slots, self.positions = np.empty((2, B), np.int32)
        self.again: Callable[[], object] | None = None


class Decoder:
    """A model with room for B texts, its slots, of up to S ≤ context positions.

    With `pack` the first `decode` copies the matrices into the form that a token is fastest multiplied by; without, a
    token takes twice as long, and the matrices are not in memory twice. Not a bit depends on it.
    """

    def __init__(self, model: GPT2, B: int, S: int, pack: bool = True) -> None:
        self.model, self.ops, self.length = model, model.ops, S
        self.matrices = model.weights
        self.multiply: Callable[..., None] = model.ops.linear_forward
        self.cache = Arena(cache_table(model.config, B, S), self.ops.empty, self.ops.dtype).keys_values
        self.positions = np.zeros(B, np.int32)  # where the next token of each slot goes
        self._to_pack = pack
        self._layers = self._by_layer()
        self._rows: dict[int, _Rows] = {}

    def pack(self) -> None:
        """Copy the matrices of the model as they are now; from here on products read the copy."""
        ops, w = self.ops, self.model.weights
        self._to_pack = False
        self.matrices = Arena(packed_table(self.model.config, ops), ops.empty, ops.dtype)
        self.multiply = ops.packed_linear_forward
        ops.pack(self.matrices.wte, w.wte)
        for name in ("attn_qkv_w", "attn_proj_w", "mlp_fc_w", "mlp_proj_w"):
            for packed, weight in zip(getattr(self.matrices, name), getattr(w, name), strict=True):
                ops.pack(packed, weight)
        self._layers = self._by_layer()
        self._rows.clear()  # what was captured reads the matrices as they lay

    def _by_layer(self) -> list[tuple[Any, ...]]:
        """Of each layer: its cache, and what each of its steps reads. Looked up once: a token has 100 steps."""
        p, k = self.model.params, self.matrices
        pairs = (
            (p.ln_1_w, p.ln_1_b), (k.attn_qkv_w, p.attn_qkv_b), (k.attn_proj_w, p.attn_proj_b),
            (p.ln_2_w, p.ln_2_b), (k.mlp_fc_w, p.mlp_fc_b), (k.mlp_proj_w, p.mlp_proj_b),
        )  # fmt: skip
        return [
            (self.cache[l], *((weight[l], bias[l]) for weight, bias in pairs)) for l in range(self.model.config.layers)
        ]

    def prefill(self, slot: int, text: Sequence[int]) -> np.ndarray:
        """Begin a slot anew with a text of 1 … S tokens; the logits (V,) of what follows it."""
        T, c, ops = len(text), self.model.config, self.ops
        a = Arena(prefill_table(c, T), self._room_of_texts, ops.dtype, ops.wide)
        self.model.forward(np.array([text], np.int32), a)
        for l in range(c.layers):
            ops.cache_fill(self.cache[l, slot : slot + 1], a.qkv[l])
        self.positions[slot] = T
        logits = ops.empty((1, c.padded_vocab_size), ops.dtype)
        self.multiply(logits, a.ln_f[T - 1 :], self.matrices.wte, None)
        return self._on_host(logits)[0]

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Append a token to each of these slots, none twice; the logits (B, V) of what follows.

        A slot must have been begun, and have room for a position more.
        """
        if self._to_pack:
            self.pack()
        ops, w, B = self.ops, self.model.weights, len(slots)
        if B not in self._rows:
            acts = Arena(rows_table(self.model.config, B), self._room_of_tokens, ops.dtype, ops.wide)
            self._rows[B] = _Rows(acts, B)
        rows = self._rows[B]
        rows.slots[:], rows.tokens[:, 0] = slots, tokens
        rows.positions[:] = self.positions[rows.slots]
        resid = at(rows.acts.resid, 0)
        for i, t in enumerate(rows.positions):
            ops.embedding_forward(resid[i : i + 1], rows.tokens[i : i + 1], w.wte, w.wpe[t:])
        if rows.again is None:
            rows.again = ops.capture(lambda: self._forward(rows))
        else:
            rows.again()
        self.positions[rows.slots] += 1
        return self._on_host(rows.acts.logits)

    def _forward(self, rows: _Rows) -> None:
        """As `GPT2.logits` once tokens are embedded, for a row of each text and with the cache as what came before."""
        ops, p, multiply, a = self.ops, self.model.params, self.multiply, rows.acts
        resid, resid_mid, ln_1, ln_2 = (at(x, 0) for x in (a.resid, a.resid_mid, a.ln_1, a.ln_2))
        qkv, attn_out, mlp_fc, mlp_gelu = (at(x, 0) for x in (a.qkv, a.attn_out, a.mlp_fc, a.mlp_gelu))
        stats, branch = (at(a.ln_1_mean, 0), at(a.ln_1_rstd, 0)), a.branch
        for l, (cache, ln_1_p, qkv_p, proj_p, ln_2_p, fc_p, mlp_proj_p) in enumerate(self._layers):
            if l == 0:
                ops.layernorm_forward(ln_1, *stats, resid, *ln_1_p)
            else:
                ops.residual_layernorm_forward(resid, ln_1, *stats, resid_mid, branch, *ln_1_p)
            multiply(qkv, ln_1, *qkv_p)
            ops.attention_decode(attn_out, cache, qkv, rows.slots, rows.positions)
            multiply(branch, attn_out, *proj_p)
            ops.residual_layernorm_forward(resid_mid, ln_2, *stats, resid, branch, *ln_2_p)
            multiply(mlp_gelu, ln_2, *fc_p, pre_gelu=mlp_fc)
            multiply(branch, mlp_gelu, *mlp_proj_p)
        ops.residual_layernorm_forward(a.resid_out, a.ln_f, *stats, resid_mid, branch, p.ln_f_w, p.ln_f_b)
        multiply(a.logits, a.ln_f, self.matrices.wte, None)

    def _on_host(self, logits: Any) -> np.ndarray:
        """(B, Vp) of the machine → (B, V), a new array of wide floats."""
        return np.asarray(self.ops.to_host(logits))[:, : self.model.config.vocab_size].astype(self.ops.wide)

    @cached_property
    def _room_of_texts(self) -> Callable[[int, Any], Any]:
        return lender(prefill_table(self.model.config, self.length), self.ops)

    @cached_property
    def _room_of_tokens(self) -> Callable[[int, Any], Any]:
        return lender(rows_table(self.model.config, len(self.positions)), self.ops)
