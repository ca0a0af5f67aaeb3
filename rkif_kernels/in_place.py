"""Stand-ins for tensors that an implementation cannot address as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def dense(tensor: Tensor, alignment: int = 1) -> Tensor:
    """``tensor`` without gradient tracking, or a copy where it is not contiguous or not aligned (bytes)."""
    contiguous = tensor.detach().contiguous()
    if contiguous.data_ptr() % alignment == 0:
        return contiguous
    return contiguous.clone(memory_format=torch.contiguous_format)


@contextmanager
def in_place(tensors: Sequence[Tensor], alignment: int = 1) -> Iterator[list[Tensor]]:
    """Dense stand-ins for tensors that are written; what was a copy is copied back on leaving."""
    stand_ins = [dense(tensor, alignment) for tensor in tensors]
    yield stand_ins
    for tensor, stand_in in zip(tensors, stand_ins, strict=True):
        if stand_in.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(stand_in)
        elif not tensor.is_inference():
            # A write through a raw pointer is one that autograd must know of, too.
            torch.autograd.graph.increment_version(tensor)
