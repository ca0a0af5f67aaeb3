"""What is measured: parameter lists of real models and adapters, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ShapeSet:
    """The shapes of the parameters that one call is given.

    Attributes:
        name: as it stands in rows and tables.
        shapes: one shape a tensor.
        adapter: whether these are LoRA factors.
        note: what else there is to say.
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
    """A model: layers that repeat, and what it has once.

    Attributes:
        name: the model's.
        layer: shapes of one layer.
        layers: how many there are.
        rest: embeddings, final norm, head.
    """

    name: str
    layer: tuple[Shape, ...]
    layers: int
    rest: tuple[Shape, ...]

    def whole(self) -> ShapeSet:
        return ShapeSet(self.name, self.layer * self.layers + self.rest)

    def first(self, layers: int) -> ShapeSet:
        """The first ``layers`` layers alone, under a name that says so."""
        return ShapeSet(f"{self.name}, {layers} of {self.layers} layers", self.layer * layers)

    def within(self, numel: int) -> ShapeSet:
        """The model whole where it has at most ``numel`` parameters, else as many layers as fit.

        Raises:
            ValueError: not even one layer fits.
        """
        if self.whole().numel <= numel:
            return self.whole()
        layers = min(numel // ShapeSet(self.name, self.layer).numel, self.layers)
        if layers == 0:
            raise ValueError(f"not one layer of {self.name} fits into the memory given")
        return self.first(layers)


def _lora(rank: int, linears: tuple[Shape, ...], layers: int) -> tuple[Shape, ...]:
    """A (rank x in) and B (out x rank) of every linear (out x in)."""
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
# Its head is tied to the embedding: one tensor.
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
        ShapeSet("one-16Mi", ((2**24,),), note="the most that torch.quantile takes"),
        ShapeSet("one-64Mi", ((2**26,),)),
        ShapeSet("one-2Gi", ((2**31 + 12_345,),), note="more elements than an int32 counts"),
        LLAMA_32_1B,
        LLAMA_2_13B,
        ShapeSet("smoke", ((3, 5), (1000,), (70, 31), (1,)), note="to try the suite out"),
    )
}
QUICK = ("llama-2-13b-lora-r8", "one-16Mi")
_DEVICE = {
    "cpu": (*QUICK, "llama-2-13b-lora-r64", "one-64Mi", "llama-3.2-1b", "llama-2-13b"),
    "cuda": (*QUICK, "llama-2-13b-lora-r64", "llama-3.2-1b", "llama-2-13b", "one-2Gi"),
}


def by_default(device: str, quick: bool) -> tuple[str, ...]:
    """The names of what is measured on a device unless something else is asked for."""
    return QUICK if quick else _DEVICE[device]


def fitted(name: str, max_numel: int) -> ShapeSet:
    """The shape of that name; of a model as many layers as ``max_numel`` elements hold.

    Raises:
        ValueError: it does not fit.
    """
    shapes = SHAPES[name]
    if isinstance(shapes, Stack):
        return shapes.within(max_numel)
    if shapes.numel > max_numel:
        raise ValueError(f"{name} does not fit into the memory given")
    return shapes
