"""Low-rank adapters: a frozen model is trained through small matrices next to its linear layers.

    y = x·Wᵀ + scale·(x·Aᵀ)·Bᵀ         A (r, in) uniform in ±1/√in, B (out, r) zero; scale = alpha/r

W stays as products read it; only A and B have float32 copies, gradients and moments. A module is a linear layer as
Hugging Face divides the model; `q_proj` is some rows of our attn_qkv_w. Source: Hu et al. 2021; as in the library peft.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ..backend import Ops
from ..errors import LlmpyError
from ..system.words import did_you_mean
from .arena import Arena, Tensor

A, B = "lora_A", "lora_B"


class Module(NamedTuple):
    """Rows `start` … `start + size` of the linear layer `layer`, under its name within a layer of Hugging Face."""

    name: str
    layer: str
    start: int
    size: int
    inputs: int


@dataclass(frozen=True)
class LoraConfig:
    """The adapters of a model: their rank, scale = alpha/rank, and the names of the modules that have one."""

    rank: int
    alpha: float
    modules: tuple[str, ...]
    base: str = ""  # path or hub name of the frozen model
    base_hash: str = ""  # of some of its weights, "" if unknown
    stabilized: bool = False  # rsLoRA: scale = alpha/√rank

    @property
    def scale(self) -> float:
        """The factor of the product with B."""
        return self.alpha / (math.sqrt(self.rank) if self.stabilized else self.rank)

    def record(self) -> dict[str, Any]:
        """Return the fields for a JSON file; `from_record` is the inverse."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> LoraConfig:
        """Return the config of a `record`."""
        return cls(**{**record, "modules": tuple(record["modules"])})


def chosen(modules: Sequence[Module], targets: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the modules that end in one of these names, all for none. Raises LlmpyError for no match."""
    for target in targets:
        if not any(_ends_in(m.name, target) for m in modules):
            known = sorted({m.name.rpartition(".")[2] for m in modules})
            hint = f"{did_you_mean(target, known)} Use {', '.join(known)}".lstrip()
            raise LlmpyError("lora.unknown-target", f"no linear layer of this model is called {target}", hint)
    return tuple(m.name for m in modules if not targets or any(_ends_in(m.name, target) for target in targets))


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


class Adapters:
    """The adapters of one model: their arenas, and their part of a linear layer's forward and backward."""

    def __init__(self, config: LoraConfig, modules: Sequence[Module], ops: Ops, layers: int) -> None:
        """`modules`: all that the model has."""
        self.config, self.ops = config, ops
        self.modules = [m for m in modules if m.name in config.modules]
        table = adapter_table(config, modules, layers)
        self.params = Arena(table, ops.empty, ops.wide)
        self.weights = self.params if ops.dtype == ops.wide else Arena(table, ops.empty, ops.dtype)
        self._rooms: tuple[int, Arena] | None = None  # rows, and scratch for up to as many

    def of(self, layer: str) -> list[Module]:
        """Return the adapted modules of a linear layer."""
        return [m for m in self.modules if m.layer == layer]

    def _matrices(self, arena: Arena, module: Module, l: int) -> tuple[Any, Any]:
        return getattr(arena, f"{module.name}.{A}")[l], getattr(arena, f"{module.name}.{B}")[l]

    def _room(self, rows: int) -> Arena:
        """Return scratch for at least this many rows."""
        if self._rooms is None or self._rooms[0] < rows:
            self._rooms = rows, Arena(room_table(self.config, self.modules, rows), self.ops.empty, self.ops.dtype)
        return self._rooms[1]

    def add(self, layer: str, l: int, out: Any, inp: Any) -> None:
        """out (…, rows of the layer) += what the adapters of this layer add to its product with inp."""
        rows = out.size // out.shape[-1]
        room = self._room(rows)
        for m in self.of(layer):
            a, b = self._matrices(self.weights, m, l)
            delta, low = room.outputs[: rows * m.size].reshape(rows, m.size), room.low[:rows]
            self.ops.linear_forward(low, inp, a, None)
            self.ops.linear_forward(delta, low, b, None)
            self.ops.add_columns(out, delta, m.start, self.config.scale)

    def backward(self, grads: Arena, layer: str, l: int, dinp: Any, dout: Any, inp: Any, acc: bool) -> None:
        """dinp += the gradient through the adapters of this layer; their own gradients by `acc`."""
        rows, C = inp.size // inp.shape[-1], inp.shape[-1]
        room, ops = self._room(rows), self.ops
        low, dlow, dx = room.low[:rows], room.dlow[:rows], room.inputs[: rows * C].reshape(rows, C)
        for m in self.of(layer):
            (a, b), (da, db) = self._matrices(self.weights, m, l), self._matrices(grads, m, l)
            delta = room.outputs[: rows * m.size].reshape(rows, m.size)
            ops.take_columns(delta, dout, m.start, self.config.scale)
            ops.linear_forward(low, inp, a, None)
            ops.linear_backward(dlow, db, None, delta, low, b, None, acc)
            ops.linear_backward(dx, da, None, dlow, inp, a, None, acc)
            ops.add_columns(dinp, dx, 0, 1.0)

    def dhidden(self, rows: int, C: int) -> Any:
        """Return scratch (rows, C) for the gradient of an activation function's output."""
        return self._room(rows).hidden[: rows * C].reshape(rows, C)


def adapter_table(config: LoraConfig, modules: Sequence[Module], layers: int) -> list[Tensor]:
    """Return the adapters' parameters: NAME.lora_A (L, r, in) and NAME.lora_B (L, out, r)."""
    table = []
    for m in (m for m in modules if m.name in config.modules):
        shape, bound = (layers, config.rank, m.inputs), 1 / math.sqrt(m.inputs)
        table.append(Tensor(f"{m.name}.{A}", shape, "uniform", bound, decay=True, per_layer=True))
        table.append(Tensor(f"{m.name}.{B}", (layers, m.size, config.rank), "zeros", decay=True, per_layer=True))
    return table


def room_table(config: LoraConfig, modules: Sequence[Module], rows: int) -> list[Tensor]:
    """Return the scratch of `Adapters` for this many rows; `modules` have adapters."""
    widest = max(m.inputs for m in modules)
    return [
        Tensor("low", (rows, config.rank)),
        Tensor("dlow", (rows, config.rank)),
        Tensor("outputs", (rows * max(m.size for m in modules),)),
        Tensor("inputs", (rows * widest,)),
        Tensor("hidden", (rows * widest,)),
    ]
