"""What all model families share: arenas, embedding, logits, loss and gradients.

A family (`gpt2`, `llama`) adds its tables of tensors, `layers`, the list of operations of a forward pass, and
`backward`, the list reversed. Both call linear layers by name, so that the same list trains, decodes from packed
weights, and runs with low-rank adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np

from ..backend import Ops
from ..backend.machine import Machine
from ..errors import LlmpyError
from .arena import Arena, Tensor
from .config import ModelConfig
from .lora import Adapters, Module

# Activations that backward recomputes, see `activations_table` of the families. 1 costs 0.5 % of a step's time
# (dev/LOG.md) and saves a quarter of the activations, as in llm.c.
RECOMPUTE = 1
INT8_LIMIT = 127 * 65504.0  # weights up to the largest scale, a float16


class ForwardOps(NamedTuple):
    """The operations of `LanguageModel.layers` that differ between training, prefill and decoding."""

    weights: Any  # the matrices as `multiply` reads them, named as in `params_table`
    multiply: Callable[..., None]  # Ops.linear_forward or Ops.packed_linear_forward
    attention: Callable[[int, Any, Any, Any], None]  # layer, and Ops.attention_forward's arguments
    positions: Any  # (rows,) int32: each token's position in its text
    # From the activations to those of the rows that the last layer completes; it copies `resid` and `attn_out`.
    select: Callable[[Arena], Arena] | None = None


class LanguageModel:
    """A model: its parameters, loss and gradients, with arenas allocated once per (B, T).

    Without `trainable` it keeps its matrices only in the backend's type: a third of the memory for bfloat16, a sixth if
    the backend quantises them.

    `positions` (B, T) int32, where methods take it: several texts in a row of the batch. Each counts from 0 in its own
    text, and attends to that alone. None: one text.
    """

    def __init__(self, config: ModelConfig, ops: Ops, recompute: int = RECOMPUTE, trainable: bool = True) -> None:
        """Allocate the parameters. `recompute`: see `activations_table`."""
        self.config = config
        self.head = self.head_of(config)
        self.ops = ops
        self.recompute = recompute
        self.trainable = trainable
        table = self.params_table(config)
        matrices = [t for t in table if t.decay]
        # `weights`, the operands of products: the matrices, or a copy in the backend's smaller type.
        self.mixed = ops.dtype != ops.wide
        self.quantised = ops.quantises and not trainable
        if self.quantised:
            self.params = Arena(kept_table(table, self.head), ops.empty, ops.dtype, ops.wide)
            self.weights = Arena(quantised_table(table, self.head, ops), ops.empty, np.uint8)
        elif trainable and config.lora is None:
            self.params = Arena(table, ops.empty, ops.wide)
            self.weights = Arena(matrices, ops.empty, ops.dtype) if self.mixed else self.params
        else:
            self.params = Arena([replace(t, wide=not t.decay) for t in table], ops.empty, ops.dtype, ops.wide)
            self.weights = self.params
        self.embeddings = self.params if self.quantised else self.weights
        # What training updates, of which `matrix_elements` have weight decay, and its copy as operands.
        self.adapters: Adapters | None = None
        self.trained, self.stored = self.params, self.embeddings
        if config.lora is not None:
            self.adapters = Adapters(config.lora, self.modules(config), ops, config.layers)
            self.trained, self.stored = self.adapters.params, self.adapters.weights
        self.matrix_elements = sum(t.size for t in self.trained.table if t.decay)
        self.grads: Arena | None = None
        # Hooks for ranks to exchange data: before forward reads the weights of layer l, and after backward has written
        # its gradients; −1 stands for the embeddings.
        self.before_layer: Callable[[int], None] | None = None
        self.after_layer: Callable[[int], None] | None = None
        self._acts: dict[tuple[int, int, bool], Arena] = {}
        self._counting: dict[tuple[int, int], np.ndarray] = {}  # positions of a batch of whole texts

    @staticmethod
    def params_table(c: Any) -> list[Tensor]:
        """Return every parameter. Matrices, which have weight decay, come first (`matrix_elements`)."""
        raise NotImplementedError

    @staticmethod
    def modules(c: Any) -> list[Module]:
        """Return the linear layers of a layer, as Hugging Face divides and names them."""
        raise NotImplementedError

    @staticmethod
    def head_of(c: Any) -> str:
        """Return the name of the head's weight (Vp, C)."""
        return "wte"

    @staticmethod
    def activations_table(
        c: Any, B: int, T: int, training: bool, recompute: int = 0, mixed: bool = False
    ) -> list[Tensor]:
        """Return every activation, and for training those of backward.

        `recompute` 0 keeps all activations for backward; 1 recomputes the output of the MLP's activation function; 2
        also the norms' outputs. Every family has resid (L, BT, C), final (BT, C), attn_stats and losses.
        """
        raise NotImplementedError

    def embed(self, out: Any, tokens: np.ndarray, positions: np.ndarray | None) -> None:
        """out (B, T, C) := the embedding of tokens (B, T)."""
        raise NotImplementedError

    def extend(self, length: int) -> None:
        """Prepare for texts of this length."""

    def layers(self, a: Arena, by: ForwardOps) -> Arena:
        """Run every layer on the embedded tokens in `resid[0]`; fill and return the activations, up to `final`."""
        raise NotImplementedError

    def backward(
        self, a: Arena, tokens: np.ndarray, targets: np.ndarray, scale: float, acc: bool,
        positions: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Compute losses and the gradients of scale·Σloss into `self.grads`, from the head to the embeddings."""
        raise NotImplementedError

    def assign(self, name: str, x: np.ndarray) -> None:
        """Set one parameter of a quantised model. x has its shape, any float dtype, and is finite.

        Raises LlmpyError for weights beyond the scales of int8.
        """
        packed = getattr(self.weights, name, None)
        if packed is not None:
            if max(x.max(), -x.min()) > INT8_LIMIT:
                what = f"{name} has weights above {INT8_LIMIT:.0f}"
                raise LlmpyError("model.int8-range", what, "Use --dtype float32 or bfloat16")
            stacks = zip(packed, x, strict=True) if packed.ndim == 3 else [(packed, x)]
            for one, matrix in stacks:
                cast(Machine, self.ops).quantise(one, np.ascontiguousarray(matrix, np.float32))
        if (kept := getattr(self.params, name, None)) is not None:
            kept[...] = x

    def store_weights(self) -> None:
        """Update `stored` from `trained`. Call it after writing to `trained`; the optimizer does so itself."""
        if self.stored is not self.trained:
            self.ops.narrow(self.stored.buffer, self.trained.buffer[: self.matrix_elements])

    def reserve(self, B: int, T: int, training: bool) -> Arena:
        """Allocate the arenas for batches (B, T) and return the activations. Raises LlmpyError for invalid B or T."""
        if not 1 <= T <= self.config.context:
            what = f"a sequence of {T} tokens does not fit the model's context of {self.config.context}"
            raise LlmpyError("model.context-exceeded", what, f"Use -T between 1 and {self.config.context}")
        if B < 1:
            raise LlmpyError("model.batch-size", f"batch size {B} is below 1", "Use -B 1 or more")
        if training and not self.trainable:
            what = "a model for generation has no float32 matrices, and no gradients"
            raise LlmpyError("model.no-gradients", what, "Load it as trainable, with dtype float32 or bfloat16")
        ops = self.ops
        self.extend(T)
        if training and self.grads is None:
            self.grads = Arena(self.trained.table, ops.zeros, ops.wide)  # unwritten ones are seen; see `movement`
        # Evaluation reuses a training arena; its own keeps a single layer.
        if (B, T, True) in self._acts:
            training = True
        if (B, T, training) not in self._acts:
            table = self.activations_table(self.config, B, T, training, self.recompute, self.mixed)
            self._acts[B, T, training] = Arena(table, ops.empty, ops.dtype, ops.wide)
        return self._acts[B, T, training]

    def release(self) -> None:
        """Free the arenas of `reserve`, except the gradients."""
        self._acts.clear()

    def logits(self, tokens: np.ndarray, position: int | None = -1) -> np.ndarray:
        """Return logits (B, V) of one position of tokens (B, T), or of all (B, T, V) for None: a new host array."""
        B, T = tokens.shape
        a = self.forward(tokens, self.reserve(B, T, training=False))
        rows = self.ops.to_host(a.final).reshape(B, T, -1)
        chosen = rows if position is None else rows[:, position]
        return self.head_logits(chosen.reshape(-1, chosen.shape[-1])).reshape(*chosen.shape[:-1], -1)

    def head_logits(self, rows: np.ndarray) -> np.ndarray:
        """Return logits (n, V) of rows (n, C) of `final`, a new host array."""
        out = self.ops.empty((len(rows), self.config.padded_vocab_size), self.ops.dtype)
        self.ops.linear_forward(out, np.ascontiguousarray(rows), getattr(self.weights, self.head), None)
        return self.ops.to_host(out)[:, : self.config.vocab_size].astype(self.ops.wide)

    def loss(self, tokens: np.ndarray, targets: np.ndarray, positions: np.ndarray | None = None) -> float:
        """Return the mean cross-entropy in nats of targets (B, T) given tokens (B, T); no gradients."""
        B, T = tokens.shape
        a = self.forward(tokens, self.reserve(B, T, training=False), positions=positions)
        head, V = getattr(self.weights, self.head), self.config.vocab_size
        self.ops.classifier(a.losses, None, None, a.final, head, targets, V, 0.0, False)
        return self._mean(a.losses, targets)

    def loss_and_grads(
        self, tokens: np.ndarray, targets: np.ndarray, accumulate: bool = False, micro_steps: float = 1,
        positions: np.ndarray | None = None,
    ) -> float:  # fmt: skip
        """Return the mean loss of a micro-batch; gradients of (loss / micro_steps) go into `self.grads`.

        `accumulate` False overwrites the gradients (the first micro-step), True adds to them.
        """
        B, T = tokens.shape
        a = self.forward(tokens, self.reserve(B, T, training=True), positions=positions)
        counted = max(1, int(np.count_nonzero(targets >= 0)))
        self.backward(a, tokens, targets, 1.0 / (counted * micro_steps), accumulate, positions)
        return self._mean(a.losses, targets)

    def _mean(self, losses: Any, targets: np.ndarray) -> float:
        counted = max(1, int(np.count_nonzero(targets >= 0)))
        return float(self.ops.to_host(losses).real.sum(dtype=np.float64) / counted)

    def forward(
        self, tokens: np.ndarray, a: Arena, attention: Callable[[int, Any, Any, Any], None] | None = None,
        positions: np.ndarray | None = None, select: Callable[[Arena], Arena] | None = None,
    ) -> Arena:  # fmt: skip
        """Run the model on tokens (B, T); fill and return the activations, up to `final`.

        `attention`, by default Ops.attention_forward, and `select`: see `ForwardOps`.
        """

        def attend(l: int, out: Any, stats: Any, qkv: Any) -> None:
            self.ops.attention_forward(out, stats, qkv, positions)

        if self.before_layer is not None:
            self.before_layer(-1)
        self.embed(a.resid[0], tokens, positions)
        where = self.counted(tokens.shape, positions)
        return self.layers(a, ForwardOps(self.weights, self.ops.linear_forward, attention or attend, where, select))

    def counted(self, shape: tuple[int, ...], positions: np.ndarray | None) -> np.ndarray:
        """Return positions as (BT,) int32; those of whole texts for None."""
        if positions is not None:
            return positions.reshape(-1)
        B, T = shape
        if (B, T) not in self._counting:
            self._counting[B, T] = np.tile(np.arange(T, dtype=np.int32), B)
        return self._counting[B, T]

    def linear(self, by: ForwardOps, name: str, l: int, out: Any, inp: Any, pre: Any = None) -> None:
        """out := the linear layer `name` of layer l on inp; with `pre` followed by its activation function."""
        bias = getattr(self.params, f"{name}_b", None)
        operands = inp, getattr(by.weights, f"{name}_w")[l], None if bias is None else bias[l]
        if self.adapters is None or not self.adapters.of(name):
            by.multiply(out, *operands, pre)
            return
        before = out if pre is None else pre
        by.multiply(before, *operands)
        self.adapters.add(name, l, before, inp)
        if pre is not None:
            self.ops.activation_forward(out, pre)

    def linear_backward(self, name: str, l: int, dinp: Any, dout: Any, inp: Any, acc: bool, pre: Any = None) -> None:
        """Compute the gradients of a linear layer, as Ops.linear_backward."""
        weight = getattr(self.weights, f"{name}_w")[l]
        if self.adapters is None or not self.adapters.of(name):
            d = self.gradient(f"{name}_w", l), self.gradient(f"{name}_b", l)
            self.ops.linear_backward(dinp, *d, dout, inp, weight, pre, acc)
            return
        assert self.grads is not None
        before = dinp if pre is None else self.adapters.dhidden(inp.size // inp.shape[-1], inp.shape[-1])
        self.ops.linear_backward(before, None, None, dout, inp, weight, None, acc)
        self.adapters.backward(self.grads, name, l, before, dout, inp, acc)
        if pre is not None:
            self.ops.activation_backward(dinp, before, pre)

    def gradient(self, name: str, l: int | None = None) -> Any:
        """Return the gradient of a parameter, or of its layer l; None if there is no such parameter or it is frozen."""
        found = getattr(self.grads, name, None)
        return found if l is None or found is None else found[l]


def quantised_table(table: Iterable[Tensor], head: str, ops: Ops) -> list[Tensor]:
    """Return the matrices that a quantised model holds as bytes: those of the layers, and the head."""
    packed = [t for t in table if t.name == head or (t.decay and t.per_layer)]
    shape = cast(Machine, ops).quantised_shape
    return [Tensor(t.name, (*t.shape[:-2], *shape(*t.shape[-2:]))) for t in packed]


def kept_table(table: Iterable[Tensor], head: str) -> list[Tensor]:
    """Return the parameters that a quantised model keeps: embeddings, biases, weights of norms."""
    kept = [t for t in table if not (t.decay and t.per_layer) and (t.name != head or head == "wte")]
    return [replace(t, wide=not t.decay) for t in kept]


def matrix(name: str, *shape: int, std: float = 0.02) -> Tensor:
    """Return a parameter under weight decay, of each layer if it has three dimensions."""
    return Tensor(name, shape, "normal", std, decay=True, per_layer=len(shape) == 3)


def vector(name: str, *shape: int, init: str = "zeros") -> Tensor:
    """Return a parameter without weight decay, of each layer if it has two dimensions."""
    return Tensor(name, shape, init, per_layer=len(shape) == 2)


def shared(name: str, *shape: int, steps: Iterable[int], wide: bool = False) -> Tensor:
    """Return an activation that all layers share, live in these steps."""
    return Tensor(name, shape, wide=wide, steps=frozenset(steps))


def keeping(layers: int, recompute: int) -> Callable[..., Tensor]:
    """Return `kept`, which returns an activation of each layer, or one that all share if backward recomputes it.

    `layers` 0: there is no backward.
    """

    def kept(name: str, *shape: int, steps: Iterable[int], unless: int = 3) -> Tensor:
        """`unless`: the `recompute` from which on it is shared."""
        if layers and recompute < unless:
            return Tensor(name, (layers, *shape))
        return shared(name, 1, *shape, steps=steps)

    return kept


def at(tensor: Any, l: int) -> Any:
    """Return layer l of an activation, or its last layer if it is shared."""
    return tensor[min(l, tensor.shape[0] - 1)]
