"""Methods whose weights and densities differ between tensors and models, as in a file of mergekit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

from rkif.checkpoint.methods.averages import Linear
from rkif.checkpoint.methods.interface import Method, require_weights
from rkif.checkpoint.methods.task_arithmetic import TaskArithmetic, magnitude_k
from rkif_kernels import require_fraction


class TensorSettings(NamedTuple):
    """Weight and density of each model in one tensor."""

    weight: tuple[float, ...]
    density: tuple[float, ...]


@dataclass(frozen=True)
class VaryingTaskArithmetic(TaskArithmetic):
    """Task arithmetic with weights and densities by tensor.

    Attributes:
        by_tensor: tensor name -> its settings.
        settings: the settings as the file gives them, ready for JSON.
    """

    by_tensor: Mapping[str, TensorSettings] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    streams: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for settings in self.by_tensor.values():
            require_weights(settings.weight)
            for density in settings.density:
                require_fraction("density", density)

    @property
    def needs_threshold(self) -> bool:
        return self.sparsification == "magnitude" and any(
            density < 1 for settings in self.by_tensor.values() for density in settings.density
        )

    def threshold_ks(self, tensor: str, numel: int) -> list[int]:
        """A density of 1 selects everything (k = -1), a density of 0 nothing (the largest k)."""
        ends = {0: numel - 1, 1: -1}
        return [
            ends[int(density)] if density in ends else magnitude_k(numel, density)
            for density in self._densities(tensor)
        ]

    def _weights(self, tensor: str) -> Sequence[float]:
        return self.by_tensor[tensor].weight

    def _densities(self, tensor: str) -> Sequence[float]:
        return self.by_tensor[tensor].density


@dataclass(frozen=True)
class VaryingLinear(Linear):
    """The weighted mean, with weights by tensor; attributes as in :class:`VaryingTaskArithmetic`."""

    by_tensor: Mapping[str, TensorSettings] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, settings in self.by_tensor.items():
            require_weights(settings.weight)
            if self.normalize and sum(settings.weight) == 0:
                raise ValueError(f"the weights of {name!r} must not sum to zero if they are normalized")

    def _weights(self, tensor: str) -> Sequence[float]:
        return self.by_tensor[tensor].weight


def varying_method(
    method: Method, by_tensor: Mapping[str, TensorSettings], settings: Mapping[str, Any]
) -> VaryingTaskArithmetic | VaryingLinear:
    """The same method with weights and densities by tensor.

    Raises:
        TypeError: the method cannot have them.
    """
    if not isinstance(method, TaskArithmetic | Linear):
        raise TypeError(f"{method.name} has no weights by tensor")
    values = {one.name: getattr(method, one.name) for one in fields(method)}
    if isinstance(method, Linear):
        return VaryingLinear(**values, by_tensor=by_tensor, settings=settings)
    return VaryingTaskArithmetic(**values | {"density": 1.0}, by_tensor=by_tensor, settings=settings)
