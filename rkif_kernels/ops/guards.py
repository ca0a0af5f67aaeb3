"""Fast checks whether a prepared call still applies: addresses, dtypes, shapes and strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any, cast

from torch import Tensor
from torch._C._dynamo.guards import TensorGuards


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """The addresses of tensors; 0 for None."""
    try:
        return list(map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]
    except (RuntimeError, TypeError):
        return list(map(_address, tensors))


def _address(tensor: Tensor | None) -> int:
    try:
        return 0 if tensor is None else tensor.data_ptr()
    except (AttributeError, RuntimeError):
        return -1  # sparse, or no tensor: the argument checks refuse it by name


def same_kind(tensors: Sequence[Tensor | None]) -> Callable[[Sequence[Tensor | None]], bool]:
    """Return a test whether other tensors have the same dtypes, shapes, strides, devices and None entries."""
    present = [tensor is not None for tensor in tensors]
    some = list(compress(cast(Sequence[Tensor], tensors), present))
    # One call for all tensors; comparing three attributes in Python would take three calls per tensor.
    sizes: list[Any] = [list(tensor.shape) for tensor in some]
    strides: list[Any] = [list(tensor.stride()) for tensor in some]
    guards = TensorGuards(*some, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)

    def all_present(others: Sequence[Tensor | None]) -> bool:
        try:
            return len(others) == len(present) and guards.check(*others)
        except TypeError:  # a gradient is missing
            return False

    def some_present(others: Sequence[Tensor | None]) -> bool:
        same = [tensor is not None for tensor in others] == present
        return same and guards.check(*compress(others, present))

    return all_present if all(present) else some_present
