"""The KV cache: logits of the next token without recomputing the whole text.

prefill    run a whole text through the training kernels and cache its keys and values
decode     append one token to each of B texts: every weight is read once for all

Both run `LanguageModel.layers` with their own attention; decode also with its own products. Both sum in the same
order: logits are bitwise equal to those of `LanguageModel.logits` on the whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..backend import Ops
from ..model.arena import Arena, Tensor
from ..model.config import ModelConfig
from ..model.families import activations_table, head_of, params_table
from ..model.language_model import ForwardOps, LanguageModel


def packed_table(c: ModelConfig, ops: Ops) -> list[Tensor]:
    """Return the packed matrices, named as in `params_table`, and the head; none where the model has quantised ones."""
    if ops.quantises:
        return []
    table = params_table(c)
    layers = [t for t in table if t.decay and t.per_layer]
    head = [t for t in table if t.name == head_of(c)]
    packed = [(t.name, t.shape[:-2], ops.packed_size(*t.shape[-2:])) for t in [*layers, *head]]
    return [Tensor(name, (*stacked, size)) for name, stacked, size in packed]


def cache_table(c: ModelConfig, B: int, S: int) -> list[Tensor]:
    """Return the table of keys and values of B texts of up to S positions."""
    return [Tensor("keys_values", (c.layers, B, c.kv_heads, 2, S, c.head_size))]


def prefill_table(c: ModelConfig, T: int) -> list[Tensor]:
    """Return the activations of a text of T tokens."""
    return activations_table(c, 1, T, training=False)


def rows_table(c: ModelConfig, B: int) -> list[Tensor]:
    """Return the activations of one token of each of B texts."""
    return [*activations_table(c, B, 1, training=False), Tensor("logits", (B, c.padded_vocab_size))]


def lender(table: list[Tensor], ops: Ops) -> Callable[[int, Any], Any]:
    """Allocate memory for a table; return the allocator that lends it to arenas of smaller such tables."""
    whole = Arena(table, ops.empty, ops.dtype, ops.wide)
    kinds = [ops.dtype, ops.wide] if len(whole.buffers) > 1 else [ops.dtype]
    rooms = dict(zip(kinds, whole.buffers, strict=True))
    return lambda count, dtype: rooms[dtype][:count]


class _Rows:
    """The next tokens of B texts; `again`, once captured, computes their logits after embedding."""

    def __init__(self, acts: Arena, B: int) -> None:
        self.acts = acts
        self.tokens = np.empty((B, 1), np.int32)
        self.slots, self.positions = np.empty((2, B), np.int32)
        self.again: Callable[[], object] | None = None


class Decoder:
    """A model with B slots for texts of up to S ≤ context positions.

    With `pack` the first `decode` copies the matrices into a packed form, which halves the time of a token. Results are
    bitwise identical with and without.
    """

    def __init__(self, model: LanguageModel, B: int, S: int, pack: bool = True) -> None:
        self.model, self.ops, self.length = model, model.ops, S
        model.extend(S)
        self.matrices = model.weights
        self.multiply: Callable[..., None] = model.ops.linear_forward  # also of quantised weights
        self.cache = Arena(cache_table(model.config, B, S), self.ops.empty, self.ops.dtype).keys_values
        self.positions = np.zeros(B, np.int32)  # of the next token in each slot
        self._to_pack = pack and not model.quantised
        self._rows: dict[int, _Rows] = {}

    def pack(self) -> None:
        """Pack the model's current matrices; from now on products read the copy."""
        ops, w = self.ops, self.model.weights
        self._to_pack = False
        self.matrices = Arena(packed_table(self.model.config, ops), ops.empty, ops.dtype)
        self.multiply = ops.packed_linear_forward
        for tensor, packed in self.matrices.items():
            weight = getattr(w, tensor.name)
            stacks = zip(packed, weight, strict=True) if packed.ndim == 2 else [(packed, weight)]
            for one, matrix in stacks:
                ops.pack(one, matrix)
        self._rows.clear()  # captured graphs read the old matrices

    def prefill(self, slot: int, text: Sequence[int]) -> np.ndarray:
        """Restart a slot with a text of 1 … S tokens; return the next token's logits (V,)."""
        T, c, ops = len(text), self.model.config, self.ops
        last = slice(T - 1, T)

        def attention(l: int, out: Any, stats: Any, qkv: Any) -> None:
            ops.cache_fill(self.cache[l, slot : slot + 1], qkv)
            if l < c.layers - 1:
                ops.attention_forward(out, stats, qkv)
            else:
                where = np.array([[slot], [T - 1]], np.int32)
                ops.attention_decode(out[last], self.cache[l], qkv[last], *where)

        def select(a: Arena) -> Arena:
            one = Arena(rows_table(c, 1), self._room_of_tokens, ops.dtype, ops.wide)
            one.resid[0], one.attn_out[0] = a.resid[0][last], a.attn_out[0][last]
            return one

        a = Arena(prefill_table(c, T), self._room_of_texts, ops.dtype, ops.wide)
        one = self.model.forward(np.array([text], np.int32), a, attention, select=select)
        self.positions[slot] = T
        self.multiply(one.logits, one.final, getattr(self.matrices, self.model.head), None)
        return self._on_host(one.logits)[0]

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Append a token to each of these distinct slots, all with text and room; return the next logits (B, V)."""
        if self._to_pack:
            self.pack()
        ops, B = self.ops, len(slots)
        if B not in self._rows:
            acts = Arena(rows_table(self.model.config, B), self._room_of_tokens, ops.dtype, ops.wide)
            self._rows[B] = _Rows(acts, B)
        rows = self._rows[B]
        rows.slots[:], rows.tokens[:, 0] = slots, tokens
        rows.positions[:] = self.positions[rows.slots]
        if rows.positions.max() >= self.length:  # kernels check no bounds
            raise ValueError(f"a text of {rows.positions.max()} positions has no room in a slot of {self.length}")
        self.model.embed(rows.acts.resid[0], rows.tokens, rows.positions[:, None])
        if rows.again is None:
            rows.again = ops.capture(lambda: self._logits(rows))
        else:
            rows.again()
        self.positions[rows.slots] += 1
        return self._on_host(rows.acts.logits)

    def _logits(self, rows: _Rows) -> None:
        """Run the layers and the head on one row of each text, with cached attention."""

        def attention(l: int, out: Any, stats: Any, qkv: Any) -> None:
            self.ops.attention_decode(out, self.cache[l], qkv, rows.slots, rows.positions)

        a = self.model.layers(rows.acts, ForwardOps(self.matrices, self.multiply, attention, rows.positions))
        self.multiply(a.logits, a.final, getattr(self.matrices, self.model.head), None)

    def _on_host(self, logits: Any) -> np.ndarray:
        """Return (B, Vp) of the backend as a new host array (B, V) of wide floats."""
        return np.asarray(self.ops.to_host(logits))[:, : self.model.config.vocab_size].astype(self.ops.wide)

    @cached_property
    def _room_of_texts(self) -> Callable[[int, Any], Any]:
        return lender(prefill_table(self.model.config, self.length), self.ops)

    @cached_property
    def _room_of_tokens(self) -> Callable[[int, Any], Any]:
        return lender(rows_table(self.model.config, len(self.positions)), self.ops)
