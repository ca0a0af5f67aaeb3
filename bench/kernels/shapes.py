"""The measured shapes: parameter lists of real models and adapters, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ShapeSet:
    """The shapes of the parameters of one call.

    Attributes:
        name: as in rows and tables.
        shapes: one shape per tensor.
        adapter: whether these are LoRA factors.
        note: a remark.
    """

    name: str
    shapes: tuple[Shape, ...]
    adapter: bool = False
    note: str = ""

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.shapes))


@dataclass(frozen=True)
class Stack:
    """A model of equal layers and other parameters.

    Attributes:
        name: name of the model.
        layer: shapes of one layer.
        layers: number of layers.
        rest: embeddings, final norm, head.
    """

    name: str
    layer: tuple[Shape, ...]
    layers: int
    rest: tuple[Shape, ...]

    def whole(self) -> ShapeSet:
        return ShapeSet(self.name, self.layer * self.layers + self.rest)

    def first(self, layers: int) -> ShapeSet:
        """The first ``layers`` layers only; the name contains their number."""
        return ShapeSet(f"{self.name}, {layers} of {self.layers} layers", self.layer * layers)

    def within(self, numel: int) -> ShapeSet:
        """The whole model if it has at most ``numel`` parameters, else as many layers as fit.

        Raises:
            ValueError: one layer has more than ``numel`` parameters.
        """
        if self.whole().numel <= numel:
            return self.whole()
        layers = min(numel // ShapeSet(self.name, self.layer).numel, self.layers)
        if layers == 0:
            raise ValueError(f"not one layer of {self.name} fits into the memory given")
        return self.first(layers)


def _lora(rank: int, linears: tuple[Shape, ...], layers: int) -> tuple[Shape, ...]:
    """A (rank x in) and B (out x rank) of every linear layer (out x in)."""
    return tuple(factor for out, into in linears for factor in ((rank, into), (out, rank))) * layers


def _llama(hidden: int, kv: int, intermediate: int) -> tuple[Shape, ...]:
    """q, k, v, o, gate, up, down of one layer."""
    attention = ((hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden))
    return (*attention, (intermediate, hidden), (intermediate, hidden), (hidden, intermediate))


_13B, _1B = _llama(5120, 5120, 13824), _llama(2048, 512, 8192)

LLAMA_2_13B = Stack(
    "llama-2-13b",
    layer=(*_13B, (5120,), (5120,)),
    layers=40,
    rest=((32000, 5120), (5120,), (32000, 5120)),
)
# The head and the embedding are one tensor.
LLAMA_32_1B = Stack("llama-3.2-1b", layer=(*_1B, (2048,), (2048,)), layers=16, rest=((128256, 2048), (2048,)))
LORA_R8 = ShapeSet(
    "llama-2-13b-lora-r8", _lora(8, ((5120, 5120),) * 2, 40), adapter=True, note="q and v, as released"
)
LORA_R64 = ShapeSet("llama-2-13b-lora-r64", _lora(64, _13B, 40), adapter=True, note="all linears")

SHAPES: dict[str, ShapeSet | Stack] = {
    shapes.name: shapes
    for shapes in (
        LORA_R8,
        LORA_R64,
        ShapeSet("one-16Mi", ((2**24,),), note="the maximum for torch.quantile"),
        ShapeSet("one-64Mi", ((2**26,),)),
        ShapeSet("one-2Gi", ((2**31 + 12_345,),), note="more elements than int32 can count"),
        LLAMA_32_1B,
        LLAMA_2_13B,
        ShapeSet("smoke", ((3, 5), (1000,), (70, 31), (1,)), note="to try out the suite"),
    )
}
QUICK = ("llama-2-13b-lora-r8", "one-16Mi")
_DEVICE = {
    "cpu": (*QUICK, "llama-2-13b-lora-r64", "one-64Mi", "llama-3.2-1b", "llama-2-13b"),
    "cuda": (*QUICK, "llama-2-13b-lora-r64", "one-64Mi", "llama-3.2-1b", "llama-2-13b", "one-2Gi"),
}


def by_default(device: str, quick: bool) -> tuple[str, ...]:
    """The names of the shapes that are measured on a device by default."""
    return QUICK if quick else _DEVICE[device]


def fitted(name: str, max_numel: int) -> ShapeSet:
    """The shapes called ``name``; for a model, as many layers as fit into ``max_numel`` elements.

    Raises:
        ValueError: the shapes, or one layer, have more than ``max_numel`` elements.
    """
    shapes = SHAPES[name]
    if isinstance(shapes, Stack):
        return shapes.within(max_numel)
    if shapes.numel > max_numel:
        raise ValueError(f"{name} does not fit into the memory given")
    return shapes
