"""Contiguous copies of tensors that a backend cannot address directly."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def as_contiguous(tensor: Tensor, alignment: int = 1) -> Tensor:
    """``tensor``, or a copy if it is not contiguous, not aligned (in bytes), or a negated view."""
    if tensor.is_contiguous() and tensor.data_ptr() % alignment == 0 and not tensor.is_neg():
        return tensor
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def all_contiguous(tensors: Sequence[Tensor | None], alignment: int = 1) -> list[Tensor | None]:
    """:func:`as_contiguous` of each tensor; None remains None."""
    present: Any = [tensor for tensor in tensors if tensor is not None]
    dense = all(map(Tensor.is_contiguous, present)) and not any(map(Tensor.is_neg, present))
    if dense and alignment == 1:
        return list(tensors)
    return [None if tensor is None else as_contiguous(tensor, alignment) for tensor in tensors]


def same_tensors(ones: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    """Whether both lists hold the same objects."""
    return all(map(operator.is_, ones, others))


@contextmanager
def in_place(tensors: Sequence[Tensor], alignment: int = 1) -> Iterator[list[Tensor]]:
    """Yield contiguous tensors to write to instead of ``tensors``; copies are copied back after the block."""
    stand_ins = [as_contiguous(tensor, alignment) for tensor in tensors]
    yield stand_ins
    for tensor, stand_in in zip(tensors, stand_ins, strict=True):
        if stand_in is not tensor:
            tensor.detach().copy_(stand_in)
    # Autograd does not see writes through raw pointers.
    torch.autograd.graph.increment_version(tensors)
